"""The losses of a step on a sparse graph against a mask over all pairs: values and every gradient, by both passes."""

import copy
from dataclasses import dataclass

import pytest
import torch
from maths_cases import Size, assert_close, batch_of, generator, graph_of, plan_of
from share_threads import Group
from sparse_reference import MaskedLosses, kept_by_loops, masked_graph
from torch import Tensor
from torch.nn import functional as F

from gcahng.generation import Interpolation
from gcahng.generation.constant_classifier import ConstantClassifier
from gcahng.generation.generation_loss import LossFactors, generation_loss
from gcahng.generation.synthesis import Synthesis
from gcahng.generation.synthetic_loss import synthetic_loss
from gcahng.graph import GraphNetwork, PairPlan, UnitCoefficients, identity
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.neighbours import neighbour_plan
from gcahng.graph.network import Reducer

SPARSE = ((Size(7, 2, 12, 1, 2), 1), (Size(9, 3, 8, 2, 4), 2), (Size(6, 4, 16, 2, 1), 2))
ALPHA, MEAN_LOSS, TRUST = 2.0, 3.0, 0.6
FACTORS = LossFactors(classification=20.0, similarity=15.0, diversity=0.6)
METRIC_KEY, GENERATION_KEY = 5, 6


@dataclass
class Case:
    """A batch, a graph network and a classifier."""

    size: Size
    z: Tensor
    labels: Tensor
    graph: GraphNetwork
    classifier: torch.nn.Linear
    weights: Tensor

    @classmethod
    def of(cls, size: Size, **options: object) -> "Case":
        z, labels = batch_of(size)
        draw = generator(8)
        weights = torch.rand(size.num_samples, size.num_samples - 1, generator=draw, dtype=torch.float64)
        classifier = torch.nn.Linear(size.dim, size.training_classes, dtype=torch.float64)
        with torch.no_grad():
            for parameter in classifier.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        return cls(size, z, labels, graph_of(size, dropout=0.2, **options), classifier, weights)

    @property
    def class_labels(self) -> Tensor:
        return self.labels[: self.size.num_classes]


def gradients(graph: GraphNetwork, phase: str) -> dict[str, Tensor]:
    found = {f"gradient-{phase} {n}": p.grad.clone() for n, p in graph.named_parameters() if p.grad is not None}
    graph.zero_grad(set_to_none=True)
    return found


def by_plan(case: Case, plan: PairPlan, reduce: Reducer = identity) -> dict[str, Tensor]:
    """Losses and gradients of both passes, block by block."""
    graph, z = copy.deepcopy(case.graph), case.z.clone().requires_grad_()
    synthesis = Synthesis(case.size.num_samples, Interpolation(ALPHA, MEAN_LOSS), case.weights)
    output = graph(z, case.labels, dropout_key=METRIC_KEY, plan=plan, coefficient_gradient=False, reduce=reduce)
    assert output.coefficients is not None
    node = F.cross_entropy(output.node_logits, case.labels)
    synthetic = synthetic_loss(z, output.coefficients, synthesis, reduce=reduce)
    (node + TRUST * synthetic).backward()
    assert z.grad is not None
    found = {"node": node, "synthetic": synthetic, "gradient z": z.grad} | gradients(graph, "metric")
    output = graph(z.detach(), case.labels, dropout_key=GENERATION_KEY, plan=plan, reduce=reduce)
    assert output.coefficients is not None
    classifier = ConstantClassifier(case.classifier.weight, case.classifier.bias)
    losses = generation_loss(z, output.coefficients, synthesis, classifier, case.class_labels, FACTORS, reduce=reduce)
    losses.total.backward()
    assert case.classifier.weight.grad is None
    assert losses.diversity is not None
    found |= {"total": losses.total, "classification": losses.classification, "similarity": losses.similarity}
    found |= {"diversity": losses.diversity} | gradients(graph, "generation")
    return {name: value.detach() for name, value in found.items()}


def by_mask(case: Case, kept: Tensor) -> dict[str, Tensor]:
    """The same from the witness."""
    graph, z = copy.deepcopy(case.graph), case.z.clone().requires_grad_()

    def run(z: Tensor, key: int, *, gradient: bool) -> tuple[Tensor, Tensor, MaskedLosses]:
        logits, table = masked_graph(graph, z, case.labels, kept, EdgeDropout(0.2, key, graph.tied))
        pulls = table if gradient else table.detach()
        return logits, table, MaskedLosses(z, pulls, kept, case.weights, ALPHA, MEAN_LOSS)

    logits, _, losses = run(z, METRIC_KEY, gradient=False)
    node, synthetic = F.cross_entropy(logits, case.labels), losses.synthetic_loss()
    (node + TRUST * synthetic).backward()
    assert z.grad is not None
    found = {"node": node, "synthetic": synthetic, "gradient z": z.grad} | gradients(graph, "metric")
    _, _, losses = run(z.detach(), GENERATION_KEY, gradient=True)
    parts = {
        "classification": losses.classification(case.classifier, case.class_labels),
        "similarity": losses.similarity(),
        "diversity": losses.diversity(),
    }
    total = 0.5 * sum(getattr(FACTORS, name) * part for name, part in parts.items())
    grads = torch.autograd.grad(total, [p for p in graph.parameters() if p.requires_grad], allow_unused=True)
    named = [name for name, p in graph.named_parameters() if p.requires_grad]
    found |= {"total": total} | parts
    found |= {f"gradient-generation {n}": g for n, g in zip(named, grads, strict=True) if g is not None}
    return {name: value.detach() for name, value in found.items()}


def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    # The key bias of an edge block has a gradient of rounding noise in the witness, exactly 0 or none here.
    names = [name for name in want if not name.endswith("key.bias")]
    assert set(names) <= set(got)
    assert_close({name: got[name] for name in names}, {name: want[name] for name in names}, tolerance)


@pytest.mark.parametrize("edge_dropout", ["tied", "independent"])
@pytest.mark.parametrize(("size", "k"), SPARSE, ids=str)
def test_both_passes_equal_a_mask_over_all_pairs(size: Size, k: int, edge_dropout: str) -> None:
    case = Case.of(size, edge_dropout=edge_dropout)
    kept = kept_by_loops(case.z, size.num_samples, k)
    assert not kept.all()
    check(by_plan(case, neighbour_plan(case.z, size.num_samples, k)), by_mask(case, kept))


@pytest.mark.parametrize("size", [SPARSE[0][0], SPARSE[1][0], Size(5, 4, 16, 1, 2)], ids=str)
def test_all_classes_as_neighbours_give_the_dense_step(size: Size) -> None:
    case = Case.of(size)
    sparse = by_plan(case, neighbour_plan(case.z, size.num_samples, size.num_classes - 1))
    check(sparse, by_plan(case, plan_of(size)), 1e-12)


@pytest.mark.parametrize(
    ("size", "k", "ranks"), [(*SPARSE[1], 2), (*SPARSE[0], 3), (Size(3, 2, 4, 1, 1), 1, 4)], ids=str
)
def test_shares_of_the_pairs_give_what_one_process_gives(size: Size, k: int, ranks: int) -> None:
    case = Case.of(size)
    want = by_plan(case, neighbour_plan(case.z, size.num_samples, k))
    group = Group(ranks)
    found = group.run(
        lambda rank: by_plan(
            case, neighbour_plan(case.z, size.num_samples, k, share=(rank, ranks)), group.reducer(rank)
        )
    )
    for one in found:
        assert torch.equal(one["total"], found[0]["total"])
    check({name: torch.stack([one[name] for one in found]).mean(0) for name in want}, want)


@pytest.mark.parametrize(("size", "k"), SPARSE[:2], ids=str)
def test_one_coefficient_for_all_on_a_sparse_graph(size: Size, k: int) -> None:
    case = Case.of(size)
    plan = neighbour_plan(case.z, size.num_samples, k)
    coefficients = UnitCoefficients(edge_layout(plan, None, 1))
    synthesis = Synthesis(size.num_samples, Interpolation(ALPHA, MEAN_LOSS), case.weights)
    found = {}
    for name in ("blocks", "mask"):
        z = case.z.clone().requires_grad_()
        if name == "blocks":
            loss = synthetic_loss(z, coefficients, synthesis)
            classifier = ConstantClassifier(case.classifier.weight, case.classifier.bias)
            judged = generation_loss(z, coefficients, synthesis, classifier, case.class_labels, FACTORS)
            parts = judged.classification, judged.similarity
        else:
            losses = MaskedLosses(z, None, kept_by_loops(case.z, size.num_samples, k), case.weights, ALPHA, MEAN_LOSS)
            loss = losses.synthetic_loss()
            parts = losses.classification(case.classifier, case.class_labels), losses.similarity()
        (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
        found[name] = {"loss": loss, "grad": grad, "classification": parts[0], "similarity": parts[1]}
    blocks, mask = ({name: value.detach() for name, value in found[which].items()} for which in ("blocks", "mask"))
    assert_close(blocks, mask)
