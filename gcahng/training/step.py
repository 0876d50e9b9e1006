"""One training iteration of GCA-HNG: the three phases of the method, in order, in one place.

  1. Metric pass: embed the batch, J_metric = J_m + (1 - exp(-beta / mean J_gen)) J_syn + J_nce, move the metric
     model (with its loss's proxies) and the graph network.
  2. Classifier: cross-entropy on the detached embeddings, move the classifier.
  3. Generation pass: the graph network just moved, on the same detached embeddings, judged by the classifier just
     moved: J_gen = 1/2 (w_cls J_cls + w_sim J_sim + w_div J_div), move the graph network.

Each graph parameter that a pass does not reach stays as it is in that pass (`PassGate`). Without a graph or without
generation the phases shrink to what is left; a metric-loss baseline is phase 1 with J_m alone. With a part "generator"
(`generator_passes`) J_syn is of generated negatives, and phase 3 moves the generator.

With several ranks each embeds its own images and everything behind runs on the gathered global batch: block pairs are
shared out, the rest is computed by every rank alike (the gradient rule: `gcahng.distributed`). One rank runs the same.

Letters: B = P * K samples of the global batch group-major, P classes, K samples per class, D channels, W ranks with
P_r classes each.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from gcahng.distributed import ONE, Ranks
from gcahng.distributed.batch_exchange import BatchExchange
from gcahng.errors import InputError
from gcahng.generation import LossFactors, Synthesis, synthetic_loss
from gcahng.generation.interpolation import SMALLEST_MEAN_LOSS, Interpolation
from gcahng.graph import PairPlan
from gcahng.graph.neighbours import neighbour_plan
from gcahng.graph.pairs import class_major_plan
from gcahng.layout import BatchLayout
from gcahng.random import mixing_weights, picking_weights, stream_key
from gcahng.training.accumulation import cached_embeddings, check_accumulation
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import Backend
from gcahng.training.generator_passes import GeneratorBatch, GeneratorPasses, GeneratorSettings
from gcahng.training.graph_passes import Judge, generation, node_and_synthetic
from gcahng.training.hardness import HardnessRecord
from gcahng.training.sharded_parts import class_loss, constant_classifier
from gcahng.training.step_batch import StepBatch, loss_dtype, unit_coefficients, whole_rows

METRIC, CLASSIFIER, GENERATION = "metric", "classifier", "generation"


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Constants of the iteration.

    Attributes:
        seed: Of the mixing weights and dropout masks.
        num_samples: K.
        generate: Whether synthetic negatives take part.
        channel_coefficients: Take them from the graph; False: one coefficient 1 for all channels.
        fusion: "mix" a class's K interpolations with random weights, or "pick" one of them at random.
        alpha: Hardness pace.
        beta: Trust pace.
        neighbours: Nearest classes to which an anchor keeps its edges (`gcahng.graph.neighbours`); None: all.
        normalised_distance: The paper's reading of d+ and d-.
        classifier_weight: Factor of the classifier's own cross-entropy.
        classification_weight, similarity_weight, diversity_weight: Factors of J_cls, J_sim and J_div in J_gen.
        generator: Of the part "generator", which takes single coefficients and every pair.
        micro_batch: Images that the backbone sees at once (`gcahng.training.accumulation`); None: all of a rank.
        microbatch_statistics: Whether its BatchNorms may take their statistics from those.
    """

    seed: int
    num_samples: int
    generate: bool = True
    channel_coefficients: bool = True
    fusion: Literal["mix", "pick"] = "mix"
    alpha: float = 5.0
    beta: float = 20.0
    neighbours: int | None = None
    normalised_distance: bool = False
    classifier_weight: float = 10.0
    classification_weight: float = 20.0
    similarity_weight: float = 20.0
    diversity_weight: float = 0.6
    generator: GeneratorSettings = GeneratorSettings()
    micro_batch: int | None = None
    microbatch_statistics: bool = False


class TrainingStep:
    """Runs iterations on a backend; holds no state of its own."""

    def __init__(
        self,
        backend: Backend,
        settings: StepSettings,
        *,
        ranks: Ranks = ONE,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            backend: Holds "metric_model" and "metric_loss", and "graph", "classifier" and "generator" where they take
                part; also "node_classifier" where the graph has none of its own.
            settings: Constants.
            ranks: All processes of the run.
            class_counts: (W,) classes of a batch that each rank holds (`gcahng.data.ranks.rank_sizes`); one rank alone
                takes any.
        Raises:
            InputError: Several ranks without one number of classes each.
            ConfigError: The metric model cannot be run in micro-batches.
        """
        if ranks.size > 1 and (class_counts is None or len(class_counts) != ranks.size):
            raise InputError(
                f"`class_counts` must say how many classes of a batch each of the {ranks.size} ranks holds: got "
                f"{class_counts}. Pass the loader's `rank_sizes`."
            )
        if settings.micro_batch is not None:
            metric_model = backend.module("metric_model")
            check_accumulation(metric_model, settings.micro_batch, settings.microbatch_statistics)
        self.backend = backend
        self.settings = settings
        self.ranks = ranks
        self.class_counts = tuple(class_counts or ())
        self.has_graph = backend.has("graph")
        self.generator: GeneratorPasses | None = None
        if backend.has("generator"):
            micro_batch, own_statistics = settings.micro_batch, settings.microbatch_statistics
            known = (backend, settings.generator, ranks, self.class_counts, micro_batch, own_statistics)
            self.generator = GeneratorPasses(*known)
        self.graph_generates = self.has_graph and settings.generate and settings.channel_coefficients

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        averages: EpochAverages,
        *,
        step: int,
        mixing: Mapping[str, Tensor] | None = None,
        record: HardnessRecord | None = None,
        trace: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run one iteration.

        Args:
            images: (K * P_r, 3, height, width), or whatever the metric model takes: this rank's part of the batch.
            labels: (K * P_r,) int64 training labels, group-major. They are looked at on the CPU: best left there, for
                reading them back from another device waits for it.
            averages: Epoch means; this step's losses are added.
            step: Global step, a coordinate of every random draw.
            mixing: (K, K-1) mixing weights for "metric" and "generation", in place of drawn ones.
            record: Takes the hardness of the batch, on all ranks or on none; nothing of the training depends on it.
            trace: Takes what the later passes begin with: "embeddings" (B, D) and, with a generator, "features" (B, C).
        Returns:
            Detached losses and weights by name: all of the global batch, the same on every rank; what the metric loss
            measures of it; with `record` also "hard_negative_ratio", unless the loss has measured that, and signals of
            a collapse.
        Raises:
            InputError: The labels are not group-major, or a rank's part of the batch is not as planned.
            NotFinite: An embedding, a loss or a gradient is not finite, here or, where the backend's checks are
                deferred, in an earlier step; no parameter has moved in that phase or since.
        """
        self.backend.checks.begin(step)
        batch, report = self.metric_pass(images, labels, averages, step=step, mixing=mixing, record=record, trace=trace)
        if self.settings.generate:
            report |= self.classifier_pass(batch)
            report |= self.generation_pass(batch)
        averages.add(report["metric_loss"], report.get("generation_loss"))
        self.backend.checks.end()
        return report

    def metric_pass(
        self,
        images: Tensor,
        labels: Tensor,
        averages: EpochAverages,
        *,
        step: int,
        mixing: Mapping[str, Tensor] | None = None,
        record: HardnessRecord | None = None,
        trace: dict[str, Tensor] | None = None,
    ) -> tuple[StepBatch, dict[str, Tensor]]:
        """Phase 1, arguments as for the step: the batch as the later passes take it, and what the pass found."""
        exchange = BatchExchange(self.ranks, labels, images.shape, self.class_counts, self.settings.num_samples, step)
        generated = None if self.generator is None else self.generator.embed(images, loss_dtype(images))
        own = self._embed(images).to(loss_dtype(images)) if generated is None else generated.own
        labels = exchange.labels()
        require_group_major(labels, self.settings.num_samples)
        labels = labels.to(images.device, non_blocking=True)
        z = self.ranks.gather(own, self.class_counts)
        self.backend.checks.embeddings(z, self.ranks.gather(whole_rows(images, own), self.class_counts))
        if trace is not None:
            trace["embeddings"] = z.detach()
            if generated is not None:
                trace["features"] = generated.features.detach()
        batch = StepBatch(z, generated, labels, self._plan(z), self._rule(averages), step, mixing, record)
        report = self._metric_losses(batch, averages)
        batch = replace(batch, z=z.detach())
        return batch, report | self._hardness(batch, report)

    def batch_of(
        self, z: Tensor, features: Tensor | None, labels: Tensor, averages: EpochAverages, step: int
    ) -> StepBatch:
        """What `metric_pass` gives, of embeddings (and a generator's features) of before, on one rank."""
        z, generated = z.detach(), None
        if self.generator is not None:
            assert features is not None
            generated = GeneratorBatch(self.generator, z, features, {})
        return StepBatch(z, generated, labels, self._plan(z), self._rule(averages), step)

    def _rule(self, averages: EpochAverages) -> Interpolation:
        return Interpolation(self.settings.alpha, averages.metric_loss, self.settings.normalised_distance)

    def _hardness(self, batch: StepBatch, report: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the record says of the embeddings, as far as the metric loss has not said it of its own triplets."""
        z, plan, rule, num_samples = batch.z, batch.plan, batch.rule, self.settings.num_samples
        if batch.record is None:
            return {}
        found = batch.record.take_batch(z, batch.labels, plan, rule, num_samples)
        if batch.generated is not None or not self.settings.generate:
            batch.record.take_negatives(z, plan, rule, num_samples)
        return {name: value for name, value in found.items() if name not in report}

    def _embed(self, images: Tensor) -> Tensor:
        """(K * P_r, D) embeddings of this rank's images."""
        micro_batch, own_statistics = self.settings.micro_batch, self.settings.microbatch_statistics
        if micro_batch is None:
            return cast(Tensor, self.backend.forward("metric_model", images))
        return cast(Tensor, self.backend.run("metric_model", cached_embeddings, images, micro_batch, own_statistics))

    def _metric_losses(self, batch: StepBatch, averages: EpochAverages) -> dict[str, Tensor]:
        z, generated, plan, record = batch.z, batch.generated, batch.plan, batch.record
        with self._drawing_alike(z.device, batch.step):
            metric_loss, measured = self._metric_loss(z, batch.labels)
        report = {"metric_loss": metric_loss} | measured
        synthesis = self._synthesis(batch, METRIC) if self.settings.generate else None
        if self.has_graph:
            report |= self.backend.run(
                "graph",
                node_and_synthetic,
                z,
                batch.labels,
                synthesis,
                self.graph_generates,
                self._graph_call(plan, batch.step, METRIC),
                record,
            )
        if "node_features" in report:  # the node classifier is a part of its own
            features = report.pop("node_features")
            report["node_loss"] = self.backend.run("node_classifier", class_loss, features, batch.labels)
        if synthesis is not None and generated is not None:
            report["synthetic_loss"] = generated.synthetic_loss(z, synthesis)
        elif synthesis is not None and not self.graph_generates:
            report["synthetic_loss"] = synthetic_loss(z, unit_coefficients(plan), synthesis, reduce=self.ranks.sum)
            report |= {} if record is None else record.take_candidates(z, unit_coefficients(plan), synthesis)
        total = metric_loss
        if "node_loss" in report:
            total = total + report["node_loss"]
        if synthesis is not None:
            trust = 1 - math.exp(-self.settings.beta / max(averages.generation_loss, SMALLEST_MEAN_LOSS))
            total = total + trust * report["synthetic_loss"]
            report |= {
                "synthetic_weight": z.new_full((), trust),
                "pull_factor": z.new_full((), batch.rule.factor),
            }
        report["total_loss"] = total
        names = ("metric_model", "metric_loss", "graph", "node_classifier")
        self._move(total, tuple(name for name in names if self.backend.has(name)), METRIC)
        return {name: value.detach() for name, value in report.items()}

    def classifier_pass(self, batch: StepBatch) -> dict[str, Tensor]:
        """Phase 2."""
        known = batch.z if batch.generated is None else batch.generated.classified(batch.z)
        loss = self.settings.classifier_weight * self.backend.run("classifier", class_loss, known, batch.labels)
        self._move(loss, ("classifier",), CLASSIFIER)
        return {"classifier_loss": loss.detach()}

    def generation_pass(self, batch: StepBatch) -> dict[str, Tensor]:
        """Phase 3."""
        z, labels = batch.z, batch.labels
        synthesis = self._synthesis(batch, GENERATION)
        if batch.generated is not None:
            found = batch.generated.generation(z, labels, synthesis)
            self._move(found["generation_loss"], ("generator",), GENERATION)
            return {name: value.detach() for name, value in found.items()}
        judge = Judge(
            synthesis,
            lambda: constant_classifier(self.backend.module("classifier"), self.backend.matmul_dtype),
            labels[: labels.numel() // self.settings.num_samples],
            LossFactors(
                self.settings.classification_weight, self.settings.similarity_weight, self.settings.diversity_weight
            ),
            self.ranks.sum,
            batch.record,
        )
        if self.graph_generates:
            call = self._graph_call(batch.plan, batch.step, GENERATION)
            found = self.backend.run("graph", generation, z, labels, judge, call)
            self._move(found["generation_loss"], ("graph",), GENERATION)
        else:
            # Without coefficients to learn the loss is still measured: its epoch mean weighs J_syn.
            found = judge(z, unit_coefficients(batch.plan))
        return {name: value.detach() for name, value in found.items()}

    def _plan(self, z: Tensor) -> PairPlan:
        """The edges of a step."""
        num_samples, neighbours = self.settings.num_samples, self.settings.neighbours
        num_classes = z.shape[0] // num_samples
        if neighbours is None or neighbours >= num_classes - 1:
            return class_major_plan(num_classes, num_samples, z.device, self.ranks.share)
        # The shape of a sparse graph depends on z, which the host waits for: then it can as well know that z is good.
        self.backend.checks.settle()
        low = self.backend.matmul_dtype
        return neighbour_plan(z.detach(), num_samples, neighbours, low=low, share=self.ranks.share)

    def _metric_loss(self, z: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """J_m, and what else the loss has measured of the batch."""
        loss = self.backend.module("metric_loss")
        known: dict[str, Any] = {}
        takes = inspect.signature(loss.forward).parameters
        if "layout" in takes and self.backend.checks.gate is not None:
            # The loss would look at z and labels again, and wait for them.
            num_samples = self.settings.num_samples
            num_classes = labels.numel() // num_samples
            order = torch.arange(labels.numel(), device=labels.device)
            known["layout"] = BatchLayout(num_classes, num_samples, order, labels[:num_classes])
        if "share" in takes:  # each rank its anchors
            known |= {"share": self.ranks.share, "reduce": self.ranks.sum}
        value = cast(Tensor, self.backend.forward("metric_loss", z, labels, **known))
        return value, dict(getattr(loss, "measured", {}))

    @contextmanager
    def _drawing_alike(self, device: torch.device, step: int) -> Iterator[None]:
        """Within it, torch's generators give the same on all ranks, however many: each computes the same batch's loss.

        Before and after they are each rank's own, as its images ask for.
        """
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(stream_key(self.settings.seed, "metric_loss", step) >> 1)
            yield

    def _graph_call(self, plan: PairPlan, step: int, phase: str) -> dict[str, Any]:
        """Arguments of the graph network in one pass."""
        return {
            "dropout_key": stream_key(self.settings.seed, "edge_dropout", step, phase),
            "plan": plan,
            "reduce": self.ranks.sum,
            "check_values": self.backend.checks.gate is None,
        }

    def _synthesis(self, batch: StepBatch, phase: str) -> Synthesis:
        z, num_samples = batch.z, self.settings.num_samples
        if batch.mixing is not None:
            return Synthesis(num_samples, batch.rule, batch.mixing[phase])
        draw = picking_weights if self.settings.fusion == "pick" else mixing_weights
        weights = draw(
            num_samples, seed=self.settings.seed, step=batch.step, phase=phase, dtype=z.dtype, device=z.device
        )
        return Synthesis(num_samples, batch.rule, weights)

    def _move(self, loss: Tensor, names: tuple[str, ...], reach: str) -> None:
        self.backend.checks.loss(loss, reach)
        self.backend.backward(loss)
        self.backend.step(names, reach)


def require_group_major(labels: Tensor, num_samples: int) -> None:
    """Raise InputError unless `labels`, (B,), are `num_samples` groups of the same distinct classes in one order.

    Nothing but the CPU works at it, so that a check of labels on the CPU waits for no device.
    """
    values = labels.detach().cpu().numpy().reshape(-1)
    groups = values.reshape(num_samples, -1) if values.size % num_samples == 0 else None
    if groups is None or not (groups == groups[0]).all() or np.unique(groups[0]).size != groups.shape[1]:
        raise InputError(
            f"`labels` must be group-major: expected {num_samples} groups of the same distinct classes in the "
            f"same order, got {values[:12].tolist()}... Reorder the batch with "
            "`gcahng.layout.group_major(labels).order`."
        )
