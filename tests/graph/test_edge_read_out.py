"""Batch statistics of the edge read-out: those of BatchNorm1d over all B² ordered edges."""

from typing import Any

import pytest
import torch
from maths_cases import SIZES, Size, assert_close, batch_of, graph_of, plan_of
from torch import nn

from gcahng.graph import edge_stage
from gcahng.graph.blocks import frozen_bias_batch_norm
from gcahng.graph.edge_stage import dense
from gcahng.graph.read_out import update_running

SIZE = Size(7, 2, 12, 2, 2)


def last_edges(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Collects the (B², D) edges that enter the read-out of each forward."""
    collected: list[torch.Tensor] = []
    original = edge_stage.read_out

    def watch(edges: list[torch.Tensor], *rest: Any) -> list[torch.Tensor]:
        collected.append(dense(edges, plan_of(SIZE)).flatten(0, 1).detach())
        return original(edges, *rest)

    monkeypatch.setattr(edge_stage, "read_out", watch)
    return collected


def test_statistics_are_those_of_batch_norm_over_all_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE)
    twin = nn.BatchNorm1d(SIZE.dim).double()
    twin.weight.data.copy_(graph.edge_norm.weight.data)
    edges = last_edges(monkeypatch)
    for number in range(3):
        found = graph((1 + number) * z, labels, dropout_key=number, plan=plan_of(SIZE))
        assert edges[number].shape == (SIZE.batch**2, SIZE.dim)
        want = torch.sigmoid(graph.edge_out(twin(edges[number]))).view(SIZE.batch, SIZE.batch, -1)
        assert_close({"coefficients": found.pull_coefficients}, {"coefficients": want})
    assert_close(
        {"mean": graph.edge_norm.running_mean, "variance": graph.edge_norm.running_var},
        {"mean": twin.running_mean, "variance": twin.running_var},
    )
    assert int(graph.edge_norm.num_batches_tracked) == int(twin.num_batches_tracked) == 3


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_evaluation_uses_the_running_statistics(size: Size) -> None:
    z, labels = batch_of(size)
    fast, plain = graph_of(size, backend="pairs"), graph_of(size, backend="scatter")
    for graph in (fast, plain):
        for key in (1, 2):
            graph(z, labels, dropout_key=key)
        graph.eval()
    before = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    got, want = fast(z, labels, plan=plan_of(size)), plain(z, labels)
    assert_close(
        {"logits": got.node_logits, "coefficients": got.pull_coefficients},
        {"logits": want.node_logits, "coefficients": want.pull_coefficients},
    )
    assert all(torch.equal(before[name], buffer) for name, buffer in fast.named_buffers())
    with torch.no_grad():
        assert fast.edge_norm.running_mean is not None
        fast.edge_norm.running_mean.add_(1.0)
        assert not torch.allclose(fast(z, labels).pull_coefficients, got.pull_coefficients)


def test_running_update_of_a_single_value() -> None:
    norm = frozen_bias_batch_norm(2).double()
    update_running(norm, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), 5)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.running_mean.tolist() == pytest.approx([0.1, 0.2])
    assert norm.running_var.tolist() == pytest.approx([0.9 + 0.1 * 3 * 1.25, 0.9 + 0.1 * 4 * 1.25])
    assert int(norm.num_batches_tracked) == 1


def test_the_read_out_biases_are_frozen_at_zero() -> None:
    graph = graph_of(SIZE)
    for norm in (graph.edge_norm, graph.node_norm):
        assert not norm.bias.requires_grad
        assert norm.weight.requires_grad
        assert float(norm.bias.abs().max()) == 0
