"""What the losses chunk by chunk hold and compute: never all logits, never a channel for every ordered pair."""

from typing import Any

import pytest
from generation_cases import Case, both_losses
from maths_cases import Size, plan_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gcahng.generation import constant_classifier, synthetic_loss
from gcahng.graph.pairs import PairPlan, pair_plan

SIZE = Size(20, 2, 20, 1, 2, training_classes=300)
# A chunk has 32 entries in each direction.
SOME_EDGES, SOME_ROWS = 64, 24


class Largest(TorchDispatchMode):
    """Notes the sizes of everything that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.widest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
                if leaf.dim() == 2 and leaf.shape[1] == SIZE.training_classes:
                    self.widest = max(self.widest, leaf.shape[0])
        return found


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> PairPlan:
    monkeypatch.setitem(constant_classifier.LOGIT_BYTES, "cpu", SOME_ROWS * SIZE.training_classes * 8)
    plan = plan_of(SIZE)
    return pair_plan(plan.order, plan.block_size, edges_per_chunk=SOME_EDGES)


@pytest.mark.parametrize("dropout", ["tied", "independent"])
def test_nothing_is_as_large_as_all_pairs_or_all_logits(dropout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SIZE, {"edge_dropout": dropout})
    graph, plan = case.graph("eager"), small_chunks(monkeypatch)
    with Largest() as largest:
        both_losses(case, graph, plan)
    every_pair = SIZE.batch**2 * SIZE.dim
    # Of the nodes' classification.
    assert largest.widest == SIZE.batch
    # The edge buffer is the largest: half of all pairs, and the reverse edges that have rows of their own.
    assert plan.num_rows * SIZE.dim <= largest.elements < 0.85 * every_pair
    with Largest() as largest:
        both_losses(case, case.graph("scatter"), plan)
    assert largest.elements >= SIZE.batch * SIZE.num_classes * SIZE.training_classes


def test_the_losses_alone_hold_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the two edge buffers: the coefficients' logits, and their gradients over them."""
    case = Case(SIZE)
    z, labels = case.batch()
    plan = small_chunks(monkeypatch)
    z.requires_grad_()
    outputs = [
        case.graph("eager")(z.detach(), labels, dropout_key=5, plan=plan, coefficient_gradient=gradient)
        for gradient in (False, True)
    ]
    with Largest() as largest:
        synthetic_loss(z, outputs[0].coefficients, case.synthesis()).backward()
    per_chunk = SOME_EDGES * SIZE.dim
    assert largest.elements <= max(per_chunk, 4 * z.numel())
    with Largest() as largest:
        case.judge(z, outputs[1].coefficients)
    assert largest.widest == SOME_ROWS
    assert largest.elements == max(plan.num_rows * SIZE.dim, SOME_ROWS * SIZE.training_classes)


def test_the_classifier_takes_two_thirds_of_the_plain_arithmetic() -> None:
    """Measured as what more classes cost."""
    costs = {}
    for backend in ("eager", "scatter"):
        for classes in (100, 300):
            case = Case(Size(6, 2, 8, 1, 2, training_classes=classes))
            z, labels = case.batch()
            output = case.graph(backend)(z, labels, dropout_key=5, plan=plan_of(case.size))
            classifier = case.classifier()
            with FlopCounterMode(display=False) as counter:
                if backend == "eager":
                    case.judge(z, output.coefficients).total.backward()
                else:
                    weight = classifier.weight.requires_grad_()
                    synthetic = case.synthesis().all_at_once(z, output.pull_coefficients)
                    (synthetic @ weight.t()).sum().backward()
            costs[backend, classes] = counter.get_total_flops()
    ours, plain = (costs[backend, 300] - costs[backend, 100] for backend in ("eager", "scatter"))
    assert plain == 3 * 2 * 12 * 6 * 8 * 200
    assert 3 * ours == 2 * plain
