"""Both losses of a step on a small batch, with their gradients, that tests of the generation share."""

from dataclasses import dataclass, field

import torch
from maths_cases import Size, batch_of, generator, graph_of, plan_of
from torch import Tensor

from gcahng.generation import (
    ConstantClassifier,
    GenerationLoss,
    Interpolation,
    LossFactors,
    Synthesis,
    generation_loss,
    synthetic_loss,
)
from gcahng.graph import Coefficients, GraphNetwork, PairPlan, identity, pair_plan
from gcahng.graph.network import Reducer

FACTORS = LossFactors(classification=20.0, similarity=15.0, diversity=3.0)
ALPHA, MEAN_LOSS = 2.0, 3.0


@dataclass
class Case:
    """A batch with what both losses take.

    Attributes:
        size: Of the batch.
        options: Of the graph network.
        normalised: Whether distances are measured between normalised embeddings.
        duplicates: Whether some images stand in the batch twice, within a class and across classes.
        low: Dtype of the classifier's products.
        seed: Of the draws.
        dtype: Of everything.
        per_block: Classes per node block, the last block padded; None: what `class_major_plan` takes.
    """

    size: Size
    options: dict[str, object] = field(default_factory=dict)
    normalised: bool = False
    duplicates: bool = False
    low: torch.dtype | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float64
    per_block: int | None = None

    def plan(self) -> PairPlan:
        plan = plan_of(self.size)
        if self.per_block is None:
            return plan
        # Some chunks of a few block pairs.
        block = self.per_block * self.size.num_samples
        return pair_plan(plan.order[: self.size.batch], block, edges_per_chunk=2 * block**2)

    def batch(self) -> tuple[Tensor, Tensor]:
        z, labels = batch_of(self.size, self.seed)
        if self.duplicates:
            z[1] = z[0]
            z[-1] = z[-2]
            # A positive that is its anchor.
            z[self.size.num_classes] = z[0]
        return z.to(self.dtype), labels

    def synthesis(self) -> Synthesis:
        draw = generator(self.seed + 40)
        weights = torch.rand(self.size.num_samples, self.size.num_samples - 1, generator=draw, dtype=torch.float64)
        rule = Interpolation(ALPHA, MEAN_LOSS, self.normalised)
        return Synthesis(self.size.num_samples, rule, weights.to(self.dtype))

    def classifier(self) -> ConstantClassifier:
        draw = generator(self.seed + 41)
        classes = max(self.size.training_classes, self.size.num_classes)
        weight = torch.randn(classes, self.size.dim, generator=draw, dtype=torch.float64)
        bias = torch.randn(classes, generator=draw, dtype=torch.float64)
        return ConstantClassifier(weight.to(self.dtype), bias.to(self.dtype), self.low)

    def graph(self, backend: str) -> GraphNetwork:
        return graph_of(self.size, self.seed, backend=backend, **self.options).to(self.dtype)

    def judge(self, z: Tensor, coefficients: Coefficients, reduce: Reducer = identity) -> GenerationLoss:
        labels = self.batch()[1][: self.size.num_classes]
        return generation_loss(z, coefficients, self.synthesis(), self.classifier(), labels, FACTORS, reduce=reduce)


def both_losses(
    case: Case, graph: GraphNetwork, plan: PairPlan | None = None, reduce: Reducer = identity
) -> dict[str, Tensor]:
    """Losses of the metric and of the generation pass, and the gradients by z and by each graph parameter."""
    z, labels = case.batch()
    plan = case.plan() if plan is None else plan
    z.requires_grad_()
    output = graph(z, labels, dropout_key=4, plan=plan, coefficient_gradient=False, reduce=reduce)
    assert output.coefficients is not None
    synthetic = synthetic_loss(z, output.coefficients, case.synthesis(), reduce=reduce)
    # The loss enters its total with a factor.
    (0.7 * synthetic).backward()
    assert z.grad is not None
    found = {"synthetic": synthetic, "gradient z": z.grad.clone()}
    graph.zero_grad(set_to_none=True)
    output = graph(z.detach(), labels, dropout_key=5, plan=plan, reduce=reduce)
    assert output.coefficients is not None
    losses = case.judge(z, output.coefficients, reduce)
    (0.3 * losses.total).backward()
    assert losses.diversity is not None
    found |= {"total": losses.total, "classification": losses.classification}
    found |= {"similarity": losses.similarity, "diversity": losses.diversity}
    for name, parameter in graph.named_parameters():
        if parameter.grad is not None:
            found[f"gradient {name}"] = parameter.grad
    return {name: value.detach().clone() for name, value in found.items()}
