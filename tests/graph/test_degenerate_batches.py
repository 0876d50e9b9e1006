"""Batches at the edge of the definition: constant embeddings, duplicates, one class, two samples."""

import copy

import pytest
import torch
from maths_cases import Size, assert_close, batch_of, graph_of, plan_of, results
from share_threads import Group
from torch import Tensor

from gcahng.graph import PairCoefficients, pair_plan
from gcahng.graph.features import unit_centred
from gcahng.graph.reference import initial_edges

SIZE = Size(4, 2, 12, 2, 2)
BACKENDS = pytest.mark.parametrize("backend", ["eager", "scatter"])


def assert_finite(found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        assert torch.isfinite(value).all(), name


def cosine_edges(z: Tensor) -> Tensor:
    """x_i * x_j / (|x_i| |x_j|) pair by pair, x centred over the channels: (B, B, D)."""
    centred = [row - row.mean() for row in z]
    return torch.stack([torch.stack([a * b / (a.norm() * b.norm()) for b in centred]) for a in centred])


def test_first_edges_sum_to_the_correlation() -> None:
    z, _ = batch_of(SIZE)
    row, column = (t.flatten() for t in torch.meshgrid(*[torch.arange(8)] * 2, indexing="ij"))
    edges = initial_edges(z, row, column).view(8, 8, -1)
    torch.testing.assert_close(edges.sum(-1), torch.corrcoef(z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(edges, cosine_edges(z), rtol=1e-12, atol=1e-14)
    unit = unit_centred(z)
    torch.testing.assert_close(unit[:, None] * unit[None], edges, rtol=1e-12, atol=1e-14)


@BACKENDS
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_embedding_is_finite(backend: str, value: float, dtype: torch.dtype) -> None:
    z, labels = batch_of(SIZE)
    z[3] = value
    graph = graph_of(SIZE, backend=backend).to(dtype)
    assert_finite(results(graph, z.to(dtype), labels, dropout_key=1))


def test_a_constant_embedding_has_zero_edges_and_no_gradient_through_them() -> None:
    z, _ = batch_of(SIZE)
    z[3] = 2.0
    z.requires_grad_()
    unit = unit_centred(z)
    assert float(unit[3].detach().abs().max()) == 0
    (gradient,) = torch.autograd.grad((unit * torch.arange(12)).sum(), z)
    assert float(gradient[3].abs().max()) == 0
    assert bool((gradient[[0, 1, 2, 4]].abs().amax(1) > 0).all())


@pytest.mark.parametrize("value", [0.3, -1e4, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_the_mean_is_no_signal(value: float, dtype: torch.dtype) -> None:
    # 512 times 0.3 in float32: the mean misses 0.3 by 3e-8, which scaled to unit length would be all there is.
    z = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[1] = value
    unit = unit_centred(z)
    assert float(unit[1].abs().max()) == 0
    torch.testing.assert_close(unit[[0, 2]].norm(dim=1), torch.ones(2, dtype=dtype))
    # A small signal on a large offset is one.
    z[1, :256] += 1e-3 * abs(value)
    assert float(unit_centred(z)[1].norm()) == pytest.approx(1, rel=1e-5)


def test_backends_agree_on_a_constant_embedding() -> None:
    z, labels = batch_of(SIZE)
    z[3] = 2.0
    want, got = (graph_of(SIZE, backend=backend)(z, labels, dropout_key=1) for backend in ("scatter", "eager"))
    assert_close(
        {"logits": got.node_logits, "coefficients": got.pull_coefficients},
        {"logits": want.node_logits, "coefficients": want.pull_coefficients},
    )


@pytest.mark.parametrize("same_class", [True, False])
def test_duplicate_images(same_class: bool) -> None:
    z, labels = batch_of(SIZE)
    z[5 if same_class else 2] = z[1]
    fast, plain = graph_of(SIZE, backend="eager"), graph_of(SIZE, backend="scatter")
    got = results(fast, z, labels, dropout_key=1, plan=plan_of(SIZE))
    assert_finite(got)
    assert_close(got, results(plain, z, labels, dropout_key=1))


def test_all_images_alike() -> None:
    # Every edge is the same, the read-out has variance 0: both paths divide by sqrt(eps).
    z, labels = batch_of(SIZE)
    z = z[:1].expand(8, -1)
    for backend in ("eager", "scatter"):
        assert_finite(results(graph_of(SIZE, backend=backend, dropout=0.0), z, labels))


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes(classes: int) -> None:
    size = Size(classes, 3, 8, 2, 2)
    z, labels = batch_of(size)
    fast, plain = graph_of(size, backend="eager"), graph_of(size, backend="scatter")
    got = results(fast, z, labels, dropout_key=1, plan=plan_of(size))
    assert_finite(got)
    assert_close(got, results(plain, z, labels, dropout_key=1))


@pytest.mark.parametrize("law", ["tied", "independent"])
@pytest.mark.parametrize("classes", [1, 2])
def test_two_samples_are_the_smallest_batch(classes: int, law: str) -> None:
    size = Size(classes, 2 // classes, 8, 1, 2)
    z, labels = batch_of(size)
    fast, plain = (graph_of(size, backend=backend, edge_dropout=law) for backend in ("eager", "scatter"))
    assert_close(results(fast, z, labels, dropout_key=1), results(plain, z, labels, dropout_key=1))


@pytest.mark.parametrize("law", ["tied", "independent"])
@pytest.mark.parametrize("training", [True, False])
def test_identical_embeddings_under_dropout(law: str, training: bool) -> None:
    # Edges differ by their masks alone.
    z, labels = batch_of(SIZE)
    z = z[:1].expand(8, -1)
    fast, plain = (graph_of(SIZE, backend=b, edge_dropout=law).train(training) for b in ("eager", "scatter"))
    got, want = (graph(z, labels, dropout_key=1) for graph in (fast, plain))
    assert_close({"coefficients": got.pull_coefficients}, {"coefficients": want.pull_coefficients}, 1e-9)


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("law", ["tied", "independent"])
def test_more_processes_than_block_pairs(ranks: int, law: str) -> None:
    # One block, one pair: all processes but one have nothing to add, and all end with the same numbers.
    size = Size(2, 2, 8, 2, 2)
    z, labels = batch_of(size)
    graph = graph_of(size, edge_dropout=law)
    want = copy.deepcopy(graph)(z, labels, dropout_key=1, plan=pair_plan(torch.arange(4), 4))
    group = Group(ranks)

    def work(rank: int) -> tuple[Tensor, int, dict[str, Tensor]]:
        mine = copy.deepcopy(graph)
        plan = pair_plan(torch.arange(4), 4, share=(rank, ranks))
        output = mine(z, labels, dropout_key=1, plan=plan, reduce=group.reducer(rank))
        assert isinstance(output.coefficients, PairCoefficients)
        rows = output.coefficients.logits().shape[0]
        output.node_logits.square().sum().backward()
        return output.node_logits.detach(), rows, dict(mine.named_buffers())

    found = group.run(work)
    assert sorted(rows for _, rows, _ in found)[:-1] == [0] * (ranks - 1)
    for logits, _, buffers in found:
        torch.testing.assert_close(logits, want.node_logits.detach(), rtol=1e-12, atol=1e-12)
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffer, found[0][2][name], rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_backends_agree_on_large_and_small_embeddings(scale: float) -> None:
    z, labels = batch_of(SIZE)
    fast, plain = (
        results(graph_of(SIZE, backend=backend), scale * z, labels, dropout_key=1) for backend in ("eager", "scatter")
    )
    assert_finite(fast)
    # Large ones make the attention choose one sample: its gradients are differences of roundings.
    compared = [name for name in fast if scale < 1 or not name.startswith("gradient")]
    assert_close({name: fast[name] for name in compared}, {name: plain[name] for name in compared}, 1e-9)


@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_evaluation_without_coefficients(backend: str) -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, backend=backend).eval()
    before = {name: buffer.clone() for name, buffer in graph.named_buffers()}
    whole = graph(z, labels)
    nodes = graph(z, labels, need_coefficients=False)
    assert nodes.coefficients is None
    assert torch.equal(nodes.node_logits, whole.node_logits)
    assert all(torch.equal(before[name], buffer) for name, buffer in graph.named_buffers())


@BACKENDS
def test_large_and_small_embeddings_stay_finite_in_float32(backend: str) -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, backend=backend).float()
    for scale in (1e-9, 1e6):
        assert_finite(results(graph, (scale * z).float(), labels, dropout_key=1))
