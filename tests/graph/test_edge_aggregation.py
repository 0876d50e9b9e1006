"""How a node's edge messages come together: sum, mean, or a sum that acts like one over 80 edges."""

import logging
from collections.abc import Iterator

import pytest
import torch
from maths_cases import SIZES, Size, assert_close, batch_of, graph_of, plan_of, results
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.graph import GraphNetwork, network

PLAIN = {"dropout": 0.0}


@pytest.fixture
def nothing_said() -> Iterator[None]:
    network._warn_of_large_sums.cache_clear()
    yield
    network._warn_of_large_sums.cache_clear()


@pytest.mark.parametrize("kind", ["mean", "scaled"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_backend_agrees(size: Size, kind: str) -> None:
    z, labels = batch_of(size)
    want = results(graph_of(size, backend="scatter", edge_aggregation=kind), z, labels, dropout_key=3)
    for edges in ("tied", "independent"):
        options = {"edge_aggregation": kind, "edge_dropout": edges}
        if edges == "independent":
            want = results(graph_of(size, backend="scatter", **options), z, labels, dropout_key=3)
        got = results(graph_of(size, backend="eager", **options), z, labels, dropout_key=3, plan=plan_of(size))
        assert_close(got, want)


def first_sums(size: Size, backend: str, kind: str) -> torch.Tensor:
    """The message that reaches the nodes of the first layer, (B, D)."""
    z, labels = batch_of(size)
    graph = graph_of(size, backend=backend, edge_aggregation=kind, **PLAIN)
    block = graph.node_blocks[0]
    seen: list[torch.Tensor] = []
    update = block.update

    def watch(h, attended, message, dtype):
        seen.append(message)
        return update(h, attended, message, dtype)

    block.update = watch  # type: ignore[method-assign]
    graph(z, labels)
    return seen[0].detach()


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_against_a_loop_over_edges(backend: str) -> None:
    size = Size(3, 2, 6, 1, 2)
    z, labels = batch_of(size)
    layer = graph_of(size, **PLAIN).node_blocks[0].edge_to_node
    centred = z - z.mean(1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True)
    messages = torch.stack([torch.stack([F.gelu(layer(a * b)) for b in unit]) for a in unit]).detach()
    want = {"sum": messages.sum(1), "mean": messages.mean(1), "scaled": messages.mean(1) * 80}
    for kind, values in want.items():
        torch.testing.assert_close(first_sums(size, backend, kind), values, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_scaled_is_the_sum_at_a_batch_of_80(backend: str) -> None:
    size = Size(40, 2, 8, 1, 2, 45)
    z, labels = batch_of(size)
    sums, scaled = (
        results(graph_of(size, backend=backend, edge_aggregation=kind), z, labels, dropout_key=1)
        for kind in ("sum", "scaled")
    )
    assert_close(scaled, sums, 1e-15)


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_the_mean_times_the_batch_is_the_sum(backend: str) -> None:
    size = Size(7, 3, 12, 1, 3)
    mean, total = (first_sums(size, backend, kind) for kind in ("mean", "sum"))
    torch.testing.assert_close(mean * size.batch, total, rtol=1e-12, atol=1e-13)
    scaled = first_sums(size, backend, "scaled")
    torch.testing.assert_close(scaled * size.batch / 80, total, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_large_sums_are_called_so_once(nothing_said: None, backend: str, caplog: pytest.LogCaptureFixture) -> None:
    def run(classes: int, kind: str = "sum", **options: object) -> None:
        size = Size(classes, 2, 4, 1, 1, classes)
        z, labels = batch_of(size)
        graph_of(size, backend=backend, edge_aggregation=kind, **options)(z, labels, need_coefficients=False)

    with caplog.at_level(logging.WARNING, logger="gcahng.graph.network"):
        run(80)
        for kind in ("mean", "scaled"):
            run(81, kind)
        run(81, edge_to_node=False)
        assert not caplog.messages
        run(81)
        run(90)
    assert len(caplog.messages) == 1
    assert "more than 160 edge messages" in caplog.messages[0]
    assert "Set edge_aggregation to scaled" in caplog.messages[0]


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError, match="`edge_aggregation` must be one of sum, mean, scaled: got 'max'"):
        GraphNetwork(8, 5, edge_aggregation="max")  # type: ignore[arg-type]
