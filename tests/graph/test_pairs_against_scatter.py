"""The fast path on unordered pairs gives what the edge list gives: outputs, gradients, running statistics."""

import pytest
import torch
from maths_cases import SIZES, Size, assert_close, batch_of, graph_of, plan_of, results

from gcahng.graph import GraphNetwork, PairPlan, pair_plan

SWITCHES: dict[str, dict[str, object]] = {
    "tied dropout": {},
    "no dropout": {"dropout": 0.0},
    "much dropout": {"dropout": 0.6},
    "independent dropout": {"edge_dropout": "independent"},
    "much independent dropout": {"dropout": 0.6, "edge_dropout": "independent"},
    "layer norm": {"norm": "layer_norm"},
    "no node propagation": {"node_propagation": False},
    "no edge-to-node sum": {"edge_to_node": False},
}
KEY = 2**63 + 12345


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backends_agree(size: Size, switch: str) -> None:
    z, labels = batch_of(size)
    fast = graph_of(size, backend="eager", **SWITCHES[switch])
    plain = graph_of(size, backend="scatter", **SWITCHES[switch])
    want = results(plain, z, labels, dropout_key=KEY)
    for plan, keep_bytes in ((None, 1 << 40), (plan_of(size), 0)):
        fast.keep_bytes = keep_bytes
        fast.edge_norm.reset_running_stats()
        fast.node_norm.reset_running_stats()
        assert_close(results(fast, z, labels, dropout_key=KEY, plan=plan), want)


@pytest.mark.parametrize("seed", range(4))
def test_backends_agree_on_samples_in_any_order(seed: int) -> None:
    size = Size(6, 3, 12, 2, 2)
    z, labels = batch_of(size, seed)
    shuffled = torch.randperm(size.batch, generator=torch.Generator().manual_seed(seed))
    z, labels = z[shuffled], labels[shuffled]
    fast, plain = graph_of(size, seed, backend="eager"), graph_of(size, seed, backend="scatter")
    assert_close(results(fast, z, labels, dropout_key=seed), results(plain, z, labels, dropout_key=seed))


def test_backends_agree_on_classes_of_unequal_size() -> None:
    size = Size(5, 2, 8, 2, 2)
    z, _ = batch_of(size)
    labels = torch.tensor([0, 0, 0, 1, 0, 2, 2, 1, 0, 3])
    fast, plain = graph_of(size, backend="eager"), graph_of(size, backend="scatter")
    assert_close(results(fast, z, labels, dropout_key=1), results(plain, z, labels, dropout_key=1))


def plans(batch: int) -> dict[str, PairPlan]:
    order = torch.arange(batch)
    mixed = torch.randperm(batch, generator=torch.Generator().manual_seed(1))
    return {
        "one block": pair_plan(order, batch),
        "single samples": pair_plan(order, 1),
        "padded": pair_plan(order, 4),
        "padded, one pair per chunk": pair_plan(order, 4, edges_per_chunk=1),
        "more padding than one block holds samples": pair_plan(order, batch + 5),
        "mixed order": pair_plan(mixed, 5, edges_per_chunk=60),
    }


@pytest.mark.parametrize("law", ["tied", "independent"])
@pytest.mark.parametrize("layers", [1, 2])
def test_blocks_and_chunks_change_nothing(layers: int, law: str) -> None:
    # Only the order of sums differs: 1e-12 leaves room for that alone. Dropout is on: its masks
    # belong to pairs, not to places in a chunk.
    size = Size(5, 3, 12, layers, 2)
    z, labels = batch_of(size)
    graph = graph_of(size, backend="eager", dropout=0.3, edge_dropout=law)

    def run(plan: PairPlan | None) -> dict[str, torch.Tensor]:
        graph.edge_norm.reset_running_stats()
        graph.node_norm.reset_running_stats()
        return results(graph, z, labels, dropout_key=KEY, plan=plan)

    want = run(None)
    for plan in plans(size.batch).values():
        assert_close(run(plan), want, 1e-12)


def test_the_dropout_key_alone_decides_the_masks() -> None:
    size = Size(4, 2, 8, 2, 2)
    z, labels = batch_of(size)
    graph = graph_of(size, dropout=0.5)

    def table(key: int) -> torch.Tensor:
        return graph(z, labels, dropout_key=key).pull_coefficients

    first = table(3)
    torch.manual_seed(99)
    assert torch.equal(first, table(3))
    assert not torch.allclose(first, table(4), atol=1e-3)


def test_without_a_key_masks_come_from_the_global_generator() -> None:
    size = Size(4, 2, 8, 1, 2)
    z, labels = batch_of(size)
    graph = graph_of(size, dropout=0.5)
    torch.manual_seed(1)
    first, second = (graph(z, labels).pull_coefficients for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, graph(z, labels).pull_coefficients)
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_coefficients_without_gradient_keep_their_values(backend: str) -> None:
    size = Size(4, 3, 8, 2, 2)
    z, labels = batch_of(size)
    graph = graph_of(size, backend=backend)
    whole = graph(z, labels, dropout_key=1)
    cut = graph(z, labels, dropout_key=1, coefficient_gradient=False)
    torch.testing.assert_close(cut.pull_coefficients, whole.pull_coefficients.detach(), rtol=1e-13, atol=1e-14)
    assert torch.equal(cut.node_logits, whole.node_logits)
    assert not cut.pull_coefficients.requires_grad
    assert cut.node_logits.requires_grad
    nodes = [p for n, p in graph.named_parameters() if p.requires_grad and "edge" not in n]
    wanted = torch.autograd.grad(whole.node_logits.square().sum(), nodes)
    got = torch.autograd.grad(cut.node_logits.square().sum(), nodes)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_the_metric_pass_keeps_nothing_of_the_last_edge_block(backend: str) -> None:
    size = Size(5, 2, 8, 1, 2)
    z, labels = batch_of(size)
    graph = graph_of(size, backend=backend)

    def hidden_layers_kept(*, coefficient_gradient: bool) -> int:
        """Tensors of edges, four times as wide as an edge, that wait for the backward pass."""
        shapes: list[torch.Size] = []

        def note(kept: torch.Tensor) -> torch.Tensor:
            shapes.append(kept.shape)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            graph(z, labels, dropout_key=1, coefficient_gradient=coefficient_gradient)
        wide = [s for s in shapes if len(s) > 1 and s[-1] == 4 * size.dim]
        return sum(s.numel() > 10 * 4 * size.dim for s in wide)

    assert hidden_layers_kept(coefficient_gradient=True) > 0
    assert hidden_layers_kept(coefficient_gradient=False) == 0


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_nodes_alone_when_no_coefficients_are_needed(backend: str) -> None:
    size = Size(4, 2, 8, 2, 2)
    z, labels = batch_of(size)
    graph = graph_of(size, backend=backend)
    want = graph(z, labels, dropout_key=1).node_logits
    output = graph(z, labels, dropout_key=1, need_coefficients=False)
    assert torch.equal(output.node_logits, want)
    assert output.coefficients is None


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_moving_samples_moves_rows_and_columns(backend: str) -> None:
    size = Size(5, 2, 12, 2, 3)
    z, labels = batch_of(size)
    graph: GraphNetwork = graph_of(size, backend=backend, dropout=0.0)
    moved = torch.randperm(size.batch, generator=torch.Generator().manual_seed(3))
    want, got = graph(z, labels), graph(z[moved], labels[moved])
    assert_close(
        {"logits": got.node_logits, "coefficients": got.pull_coefficients},
        {
            "logits": want.node_logits[moved],
            "coefficients": want.pull_coefficients[moved][:, moved],
        },
    )


def test_names_of_the_classes_do_not_matter() -> None:
    size = Size(4, 2, 8, 1, 2)
    z, labels = batch_of(size)
    graph = graph_of(size, dropout=0.0)
    renamed = (labels + 3) * 1000
    assert torch.equal(graph(z, labels).node_logits, graph(z, renamed).node_logits)
