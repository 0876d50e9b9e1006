"""Pairs dealt to several processes: outputs, losses and averaged gradients are those of one process."""

import copy

import pytest
import torch
from maths_cases import Size, assert_close, batch_of, generator, graph_of
from share_threads import Group
from torch import Tensor
from torch.nn import functional as F

from gcahng.generation import Interpolation
from gcahng.generation.block_losses import (
    coefficient_row_sums,
    coefficient_spread,
    generation_sums,
    synthetic_scores,
)
from gcahng.generation.block_synthesis import BatchSynthesis, class_major_plan
from gcahng.graph import GraphNetwork, identity
from gcahng.graph.network import Reducer
from gcahng.losses import diversity_from_spread, synthetic_loss_from_scores

RULE = Interpolation(alpha=2.0, mean_metric_loss=3.0)


def both_passes(
    graph: GraphNetwork,
    z: Tensor,
    labels: Tensor,
    size: Size,
    share: tuple[int, int],
    reduce: Reducer,
) -> dict[str, Tensor]:
    """Every reduced quantity of a step, and the gradients of their sum."""
    draw = generator(8)
    weights = torch.rand(size.num_samples, size.num_samples - 1, generator=draw).double()
    classifier = torch.randn(11, size.dim, generator=draw, dtype=torch.float64)
    plan = class_major_plan(size.num_classes, size.num_samples, share=share)
    z = z.clone().requires_grad_()
    output = graph(z, labels, dropout_key=4, plan=plan, reduce=reduce)
    coefficients = output.coefficients
    assert coefficients is not None
    batch = BatchSynthesis.of(z, plan, size.num_samples, RULE, weights)
    partial = synthetic_scores(batch, coefficients)
    scores, squares = reduce(partial.scores), reduce(partial.square_sum)
    sums = generation_sums(batch, coefficients, labels[: size.num_classes], lambda x: x @ classifier.T)
    row_mean = reduce(coefficient_row_sums(coefficients, plan)) / size.batch
    spread = reduce(coefficient_spread(coefficients, row_mean, plan))
    losses = {
        "node loss": F.cross_entropy(output.node_logits, labels),
        "synthetic loss": synthetic_loss_from_scores(z, scores, squares, size.num_samples),
        "classification": reduce(sums.classification),
        "similarity": reduce(sums.similarity),
        "diversity": diversity_from_spread(spread, size.batch),
    }
    torch.stack(list(losses.values())).sum().backward()
    assert z.grad is not None
    found = losses | {"scores": scores, "row mean": row_mean, "gradient z": z.grad}
    for name, parameter in graph.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[f"gradient {name}"] = parameter.grad
    found["running mean"], found["running variance"] = (
        graph.edge_norm.running_mean,
        graph.edge_norm.running_var,
    )
    return {name: value.detach().clone() for name, value in found.items()}


# The last has fewer block pairs (3) than processes.
@pytest.mark.parametrize(
    ("size", "ranks"),
    [(Size(9, 2, 8, 2, 2), 2), (Size(7, 3, 12, 1, 2), 3), (Size(2, 2, 4, 2, 1), 4)],
    ids=str,
)
def test_shares_give_what_one_process_gives(size: Size, ranks: int) -> None:
    z, labels = batch_of(size)
    graph = graph_of(size)
    want = both_passes(copy.deepcopy(graph), z, labels, size, (0, 1), identity)
    group = Group(ranks)

    def work(rank: int) -> dict[str, Tensor]:
        mine = copy.deepcopy(graph)
        return both_passes(mine, z, labels, size, (rank, ranks), group.reducer(rank))

    found = group.run(work)
    for name, value in want.items():
        parts = torch.stack([one[name] for one in found])
        # Parameter gradients are averaged over processes, as data-parallel wrappers do; all else
        # is the same on each.
        got = parts.mean(0) if name.startswith("gradient") else parts[0]
        if not name.startswith("gradient"):
            assert torch.equal(parts[0].expand_as(parts), parts), name
        found[0][name] = got
        assert got.shape == value.shape
    assert_close(found[0], want)
