"""One training iteration of GCA-HNG: the three phases of the method, in order, in one place.

  1. Metric pass: embed the batch, J_metric = J_m + (1 - exp(-beta / mean J_gen)) J_syn + J_nce, move the metric
     model (with its loss's proxies) and the graph network.
  2. Classifier: cross-entropy on the detached embeddings, move the classifier.
  3. Generation pass: the graph network just moved, on the same detached embeddings, judged by the classifier just
     moved: J_gen = 1/2 (w_cls J_cls + w_sim J_sim + w_div J_div), move the graph network.

Each graph parameter that a pass does not reach stays as it is in that pass (`PassGate`). Without a graph or without
generation the phases shrink to what is left; a metric-loss baseline is phase 1 with J_m alone.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.errors import InputError, TrainingError
from gcahng.generation.block_losses import (
    coefficient_row_sums,
    coefficient_spread,
    generation_sums,
    synthetic_scores,
)
from gcahng.generation.block_synthesis import BatchSynthesis, class_major_plan, single_coefficients
from gcahng.generation.interpolation import SMALLEST_MEAN_LOSS, Interpolation
from gcahng.graph import Coefficients, GraphOutput, PairPlan, identity
from gcahng.graph.network import Reducer
from gcahng.graph.precision import product
from gcahng.losses import diversity_from_spread, synthetic_loss_from_scores
from gcahng.random import mixing_weights, stream_key
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import Backend

METRIC, CLASSIFIER, GENERATION = "metric", "classifier", "generation"


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Constants of the iteration.

    Attributes:
        seed: Of the mixing weights and dropout masks.
        num_samples: K.
        generate: Whether synthetic negatives take part.
        channel_coefficients: Take them from the graph; False: one coefficient 1 for all channels.
        alpha: Hardness pace.
        beta: Trust pace.
        normalised_distance: The paper's reading of d+ and d-.
        classifier_weight: Factor of the classifier's own cross-entropy.
        classification_weight, similarity_weight, diversity_weight: Factors of J_cls, J_sim and J_div in J_gen.
    """

    seed: int
    num_samples: int
    generate: bool = True
    channel_coefficients: bool = True
    alpha: float = 5.0
    beta: float = 20.0
    normalised_distance: bool = False
    classifier_weight: float = 10.0
    classification_weight: float = 20.0
    similarity_weight: float = 20.0
    diversity_weight: float = 0.6


class TrainingStep:
    """Runs iterations on a backend; holds no state of its own."""

    def __init__(self, backend: Backend, settings: StepSettings, *, reduce: Reducer = identity) -> None:
        """
        Args:
            backend: Holds "metric_model" and "metric_loss", and "graph" and "classifier" where they take part.
            settings: Constants.
            reduce: Differentiable sum of partial sums over processes.
        """
        self.backend = backend
        self.settings = settings
        self.reduce = reduce
        self.has_graph = backend.has("graph")
        self.graph_generates = self.has_graph and settings.generate and settings.channel_coefficients

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        averages: EpochAverages,
        *,
        step: int,
        mixing: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run one iteration.

        Args:
            images: (B, 3, height, width), or whatever the metric model takes.
            labels: (B,) int64 training labels, group-major.
            averages: Epoch means; this step's losses are added.
            step: Global step, a coordinate of every random draw.
            mixing: (K, K-1) mixing weights for "metric" and "generation", in place of drawn ones.
        Returns:
            Detached losses and weights by name.
        Raises:
            InputError: The labels are not group-major.
            TrainingError: An embedding, a loss or a gradient is not finite; no parameter has moved in that phase.
        """
        self._require_group_major(labels)
        plan = class_major_plan(labels.numel() // self.settings.num_samples, self.settings.num_samples, images.device)
        rule = Interpolation(self.settings.alpha, averages.metric_loss, self.settings.normalised_distance)

        # Phase 1
        z = self.backend.forward("metric_model", images).to(_loss_dtype(images))
        self._require_finite_rows(z, images)
        report = self._metric_pass(z, labels, plan, rule, averages, step, mixing)
        z = z.detach()
        if self.settings.generate:
            # Phase 2
            report |= self._classifier_pass(z, labels)
            # Phase 3
            report |= self._generation_pass(z, labels, plan, rule, step, mixing)
        averages.add(report["metric_loss"], report.get("generation_loss"))
        return report

    def _metric_pass(
        self,
        z: Tensor,
        labels: Tensor,
        plan: PairPlan,
        rule: Interpolation,
        averages: EpochAverages,
        step: int,
        mixing: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        metric_loss = self.backend.forward("metric_loss", z, labels)
        report = {"metric_loss": metric_loss}
        total = metric_loss
        coefficients: Coefficients = single_coefficients(plan, z)
        if self.has_graph:
            graph = self._graph(z, labels, plan, step, METRIC, gradient=False)
            report["node_loss"] = F.cross_entropy(graph.node_logits, labels)
            total = total + report["node_loss"]
            if self.graph_generates:
                coefficients = cast(Coefficients, graph.coefficients)
        if self.settings.generate:
            batch = self._synthesis(z, plan, rule, step, METRIC, mixing)
            partial = synthetic_scores(batch, coefficients)
            scores, squares = self.reduce(partial.scores), self.reduce(partial.square_sum)
            synthetic_loss = synthetic_loss_from_scores(z, scores, squares, self.settings.num_samples)
            trust = 1 - math.exp(-self.settings.beta / max(averages.generation_loss, SMALLEST_MEAN_LOSS))
            total = total + trust * synthetic_loss
            report |= {
                "synthetic_loss": synthetic_loss,
                "synthetic_weight": z.new_tensor(trust),
                "pull_factor": z.new_tensor(rule.factor),
            }
        report["total_loss"] = total
        self._move(total, ("metric_model", "metric_loss", "graph"), METRIC)
        return {name: value.detach() for name, value in report.items()}

    def _classifier_pass(self, z: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.backend.forward("classifier", z).to(z.dtype)
        loss = self.settings.classifier_weight * F.cross_entropy(logits, labels)
        self._move(loss, ("classifier",), CLASSIFIER)
        return {"classifier_loss": loss.detach()}

    def _generation_pass(
        self,
        z: Tensor,
        labels: Tensor,
        plan: PairPlan,
        rule: Interpolation,
        step: int,
        mixing: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        # Without coefficients to learn the loss is still measured: its epoch mean weighs J_syn.
        with torch.set_grad_enabled(self.graph_generates):
            coefficients: Coefficients = single_coefficients(plan, z)
            if self.graph_generates:
                graph = self._graph(z, labels, plan, step, GENERATION, gradient=True)
                coefficients = cast(Coefficients, graph.coefficients)
            batch = self._synthesis(z, plan, rule, step, GENERATION, mixing)
            sums = generation_sums(batch, coefficients, labels[: batch.num_classes], self._constant_classifier)
            entries = labels.numel() * batch.num_classes
            report = {
                "classification_loss": self.reduce(sums.classification) / entries,
                "similarity_loss": self.reduce(sums.similarity) / entries,
            }
            loss = self.settings.classification_weight * report["classification_loss"]
            loss = loss + self.settings.similarity_weight * report["similarity_loss"]
            if self.graph_generates:
                report["diversity_loss"] = self._diversity(coefficients, plan)
                loss = loss + self.settings.diversity_weight * report["diversity_loss"]
            report["generation_loss"] = 0.5 * loss
        if self.graph_generates:
            self._move(report["generation_loss"], ("graph",), GENERATION)
        return {name: value.detach() for name, value in report.items()}

    def _graph(
        self, z: Tensor, labels: Tensor, plan: PairPlan, step: int, phase: str, *, gradient: bool
    ) -> GraphOutput:
        output = self.backend.forward(
            "graph",
            z,
            labels,
            dropout_key=stream_key(self.settings.seed, "edge_dropout", step, phase),
            plan=plan,
            need_coefficients=self.graph_generates,
            coefficient_gradient=gradient,
            reduce=self.reduce,
        )
        return cast(GraphOutput, output)

    def _synthesis(
        self,
        z: Tensor,
        plan: PairPlan,
        rule: Interpolation,
        step: int,
        phase: str,
        mixing: Mapping[str, Tensor] | None,
    ) -> BatchSynthesis:
        num_samples = self.settings.num_samples
        if mixing is None:
            weights = mixing_weights(
                num_samples,
                seed=self.settings.seed,
                step=step,
                phase=phase,
                dtype=z.dtype,
                device=z.device,
            )
        else:
            weights = mixing[phase]
        return BatchSynthesis.of(z, plan, num_samples, rule, weights)

    def _diversity(self, coefficients: Coefficients, plan: PairPlan) -> Tensor:
        row_mean = self.reduce(coefficient_row_sums(coefficients, plan)) / plan.batch_size
        spread = self.reduce(coefficient_spread(coefficients, row_mean, plan))
        return diversity_from_spread(spread, plan.batch_size)

    def _constant_classifier(self, x: Tensor) -> Tensor:
        """Logits with the classifier's weights as constants: this pass does not move it."""
        layer = cast(nn.Linear, self.backend.module("classifier"))
        bias = None if layer.bias is None else layer.bias.detach()
        return product(x, layer.weight.detach(), bias, self.backend.matmul_dtype)

    def _move(self, loss: Tensor, names: tuple[str, ...], reach: str) -> None:
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"The {reach} loss is {float(loss.detach())}; no parameter was moved in this phase. "
                "Lower the learning rate, or train with precision fp32."
            )
        self.backend.backward(loss)
        self.backend.step(names, reach)

    def _require_group_major(self, labels: Tensor) -> None:
        num_samples = self.settings.num_samples
        groups = labels.view(num_samples, -1) if labels.numel() % num_samples == 0 else None
        if groups is None or not bool((groups == groups[0]).all()) or groups[0].unique().numel() != groups.shape[1]:
            raise InputError(
                f"`labels` must be group-major: expected {num_samples} groups of the same distinct classes in the "
                f"same order, got {labels[:12].tolist()}... Reorder the batch with "
                "`gcahng.layout.group_major(labels).order`."
            )

    def _require_finite_rows(self, z: Tensor, images: Tensor) -> None:
        finite = torch.isfinite(z.detach()).all(1)
        if bool(finite.all()):
            return
        # A norm over the batch spreads one bad image to every embedding: name the images that are bad themselves.
        whole = torch.isfinite(images.detach()).flatten(1).all(1)
        good = finite if bool(whole.all()) else whole
        raise NonFiniteEmbedding(torch.nonzero(~good)[:, 0].tolist())


class NonFiniteEmbedding(TrainingError):
    """Embeddings of a batch are NaN or infinite.

    Attributes:
        positions: Of the bad samples in the batch.
    """

    def __init__(self, positions: list[int]) -> None:
        self.positions = positions
        super().__init__(
            f"{len(positions)} embeddings of the batch are not finite, the first at position {positions[0]}; "
            "no parameter was moved. Check the images, or lower the learning rate."
        )


def _loss_dtype(images: Tensor) -> torch.dtype:
    """Losses are computed in float32, in float64 for float64 input."""
    return torch.float64 if images.dtype == torch.float64 else torch.float32
