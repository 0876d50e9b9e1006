"""Pairs dealt to several processes: outputs, losses and averaged gradients are those of one process."""

import copy
from collections.abc import Callable

import pytest
import torch
from generation_cases import Case, both_losses
from maths_cases import Size, assert_close
from share_threads import Group
from torch import Tensor
from torch.nn import functional as F

from gcahng.generation import synthetic_loss
from gcahng.graph import GraphNetwork, UnitCoefficients, identity
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.network import Reducer
from gcahng.graph.pairs import class_major_plan

# The last has fewer block pairs (3) than processes, and anchors without negatives in some of them.
SHARES = pytest.mark.parametrize(
    ("size", "ranks"),
    [(Size(9, 2, 8, 2, 2), 2), (Size(7, 3, 12, 1, 2), 3), (Size(2, 2, 4, 2, 1), 4)],
    ids=str,
)


def whole_step(case: Case, graph: GraphNetwork, share: tuple[int, int], reduce: Reducer) -> dict[str, Tensor]:
    """Both losses with their gradients, the node loss with its own, and the running statistics."""
    plan = class_major_plan(case.size.num_classes, case.size.num_samples, share=share)
    found = both_losses(case, graph, plan, reduce)
    graph.zero_grad(set_to_none=True)
    z, labels = case.batch()
    z.requires_grad_()
    output = graph(z, labels, dropout_key=4, plan=plan, coefficient_gradient=False, reduce=reduce)
    node = F.cross_entropy(output.node_logits, labels)
    node.backward()
    assert z.grad is not None
    found |= {"node loss": node.detach(), "gradient z": found["gradient z"] + z.grad}
    for name, parameter in graph.named_parameters():
        if parameter.grad is not None:
            found[f"gradient-node {name}"] = parameter.grad.clone()
    for name, buffer in graph.named_buffers():
        found[f"buffer {name}"] = buffer.clone()
    return found


def compare(want: dict[str, Tensor], group: Group, work: Callable[[int, Group], dict[str, Tensor]]) -> None:
    """Averaged gradients and every other quantity of each process against one process's."""
    found = group.run(lambda rank: work(rank, group))
    got = {}
    for name in want:
        parts = torch.stack([one[name] for one in found])
        # Gradients are averaged over processes, as data-parallel wrappers do; all else is the same on each.
        got[name] = parts.mean(0) if name.startswith("gradient") else parts[0]
        if not name.startswith("gradient"):
            assert torch.equal(parts[:1].expand_as(parts), parts), name
    assert_close(got, want)


@pytest.mark.parametrize("dropout", ["tied", "independent"])
@SHARES
def test_shares_give_what_one_process_gives(size: Size, ranks: int, dropout: str) -> None:
    case = Case(size, {"edge_dropout": dropout, "dropout": 0.3})
    graph = case.graph("eager")
    compare(
        whole_step(case, copy.deepcopy(graph), (0, 1), identity),
        Group(ranks),
        lambda rank, group: whole_step(case, copy.deepcopy(graph), (rank, ranks), group.reducer(rank)),
    )


@SHARES
def test_one_coefficient_for_all(size: Size, ranks: int) -> None:
    case = Case(size)

    def losses(share: tuple[int, int], reduce: Reducer) -> dict[str, Tensor]:
        plan = class_major_plan(size.num_classes, size.num_samples, share=share)
        coefficients = UnitCoefficients(edge_layout(plan, None, 0))
        z = case.batch()[0].requires_grad_()
        loss = synthetic_loss(z, coefficients, case.synthesis(), reduce=reduce)
        (grad,) = torch.autograd.grad(loss, z)
        found = case.judge(z, coefficients, reduce)
        return {"synthetic": loss.detach(), "gradient z": grad, "total": found.total}

    compare(
        losses((0, 1), identity),
        Group(ranks),
        lambda rank, group: losses((rank, ranks), group.reducer(rank)),
    )
