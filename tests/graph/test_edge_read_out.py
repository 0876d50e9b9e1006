"""The edge read-out: batch statistics over all ordered edges, values and gradients of BatchNorm1d and Linear."""

import dataclasses

import pytest
import torch
from edge_cases import LAWS, edge_pass, norm_of, normal, plans, rows_of, samples_of, stored, symmetric, table_of
from maths_cases import SIZES, Size, assert_close, batch_of, generator, graph_of, plan_of
from share_threads import Group
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.graph import ConstantCoefficients, GraphNetwork, PairCoefficients, PairPlan, identity
from gcahng.graph.blocks import frozen_bias_batch_norm
from gcahng.graph.edge_layout import EdgeLayout
from gcahng.graph.edge_messages import EdgePass
from gcahng.graph.edge_moments import EdgeMoments
from gcahng.graph.edge_source import StoredEdges
from gcahng.graph.network import Reducer
from gcahng.graph.pairs import ends, pair_plan
from gcahng.graph.read_out import ReadOut, ReadOutGradient, update_running

SIZE = Size(7, 2, 12, 2, 2)
BATCH, DIM = 7, 6
PLANS = pytest.mark.parametrize("name", plans(BATCH))
NAMES = ("raw", "norm weight", "norm bias", "scale", "weight", "bias")


def last_edges(coefficients: object) -> Tensor:
    """The (B², D) edges that entered the read-out."""
    assert isinstance(coefficients, PairCoefficients)
    edges = coefficients.read_out.edges
    norm = edges.norm
    values = norm_of(edges.raw, norm.weight, norm.bias, gelu=norm.gelu)
    return table_of(coefficients.layout, values).flatten(0, 1).detach()


def test_statistics_are_those_of_batch_norm_over_all_edges() -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE)
    twin = nn.BatchNorm1d(SIZE.dim).double()
    twin.load_state_dict(graph.edge_norm.state_dict())
    for number in range(3):
        found = graph((1 + number) * z, labels, dropout_key=number, plan=plan_of(SIZE))
        edges = last_edges(found.coefficients)
        assert edges.shape == (SIZE.batch**2, SIZE.dim)
        want = torch.sigmoid(graph.edge_out(twin(edges))).view(SIZE.batch, SIZE.batch, -1)
        assert_close({"coefficients": found.pull_coefficients}, {"coefficients": want})
    assert_close(
        {"mean": graph.edge_norm.running_mean, "variance": graph.edge_norm.running_var},
        {"mean": twin.running_mean, "variance": twin.running_var},
    )
    assert int(graph.edge_norm.num_batches_tracked) == int(twin.num_batches_tracked) == 3


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_evaluation_uses_the_running_statistics(size: Size) -> None:
    z, labels = batch_of(size)
    fast, plain = graph_of(size, backend="eager"), graph_of(size, backend="scatter")
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


def statistics(call: EdgePass, edges: StoredEdges, reduce: Reducer) -> tuple[Tensor, Tensor]:
    """Mean and variance of the stored edges, as the pass finds them."""
    moments = EdgeMoments.zeros(edges.weight)
    with torch.no_grad():
        for part in call.layout.all_rows():
            values = edges.values(part.chunk).flatten(0, 2)
            moments.add(values, call.layout.weights(part, values.dtype))
        return moments.over(reduce, call.layout.plan.edge_count)


def read_out_of(
    call: EdgePass, raw: Tensor, *, training: bool = True, reduce: Reducer = identity, dtype: torch.dtype | None = None
) -> ReadOut:
    """A read-out with random weights over a buffer of raw edges."""
    dim = raw.shape[1]
    dtype = raw.dtype if dtype is None else dtype
    edges = stored(raw, dim, gelu=True)
    edges = edges.with_tensors((raw, *(t.detach().to(dtype).requires_grad_() for t in edges.tensors[1:])))
    assert isinstance(edges, StoredEdges)
    if training:
        mean, variance = statistics(call, edges, reduce)
    else:
        mean, variance = normal(dim, seed=50).detach().to(dtype), normal(dim, seed=51).detach().exp().to(dtype)
    scale, bias = normal(dim, seed=52, dtype=dtype), normal(dim, seed=53, dtype=dtype)
    weight = normal(dim, dim, seed=54, scale=dim**-0.5, dtype=dtype)
    return ReadOut(call.layout, edges, mean, variance, training, scale, 1e-5, weight, bias, call.low)


def plain_coefficients(read_out: ReadOut, table: Tensor) -> Tensor:
    """sigmoid(Linear(BatchNorm(norm(raw)))) of the raw edges as a table."""
    norm = read_out.edges.norm
    edges = norm_of(table, norm.weight, norm.bias, gelu=norm.gelu).flatten(0, 1)
    training = read_out.batch_statistics
    # In training the running statistics are only written to.
    running = (read_out.mean.clone(), read_out.variance.clone())
    normalised = F.batch_norm(edges, *running, read_out.scale, None, training, 0.1, read_out.eps)
    return torch.sigmoid(F.linear(normalised, read_out.weight, read_out.bias)).view(table.shape)


def written_out(read_out: ReadOut, mix: Tensor, reduce: Reducer = identity) -> dict[str, Tensor]:
    """Gradients of sum(mix * coefficients) over the ordered edges, chunk by chunk as a loss takes them."""
    layout = read_out.layout
    with torch.no_grad():
        buffer = read_out.fill(torch.empty_like(read_out.edges.raw))
        # Rows of padding hold what a careless loss would leave there: `add_directions` must get zeros from it.
        gradient = ReadOutGradient(read_out, buffer)
        factors = torch.sigmoid(buffer.to(read_out.bias.dtype) + read_out.bias)
        factors = factors * (1 - factors)
        for part in layout.parts:
            first, second = samples_of(layout, part.chunk)
            forward, backward = layout.directions(part, factors)
            forward = forward * mix[first, second]
            backward = None if backward is None else backward * mix[second, first]
            if layout.plan.valid is not None:
                at_first, at_second = ends(layout.plan.valid.to(factors.dtype), part.chunk)
                real = (at_first[:, :, None] * at_second[:, None, :])[..., None]
                forward, backward = forward * real, None if backward is None else backward * real
            layout.add_directions(part, forward, backward, buffer)
        for part in layout.all_rows():
            gradient.add_weights(part)
        return dict(zip(NAMES, gradient.finish(reduce), strict=True))


def mix_of(dim: int = DIM, offset: float = 0.0) -> Tensor:
    return offset + torch.randn(BATCH, BATCH, dim, generator=generator(60), dtype=torch.float64)


@PLANS
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_those_of_torch(name: str, law: str, training: bool) -> None:
    call = edge_pass(plans(BATCH)[name], law, layers=2)
    raw = normal(call.layout.num_rows, DIM, seed=3)
    read_out = read_out_of(call, raw, training=training)
    coefficients = plain_coefficients(read_out, table_of(call.layout, raw))
    with torch.no_grad():
        logits = read_out.fill(torch.empty_like(raw))
        values = torch.sigmoid(logits + read_out.bias)
    mix = mix_of()
    wanted = torch.autograd.grad((coefficients * mix).sum(), read_out.tensors)
    by_rows = table_of(call.layout, read_out.rows())
    by_autograd = torch.autograd.grad((by_rows * mix).sum(), read_out.tensors)
    want = {"values": coefficients} | {f"gradient {n}": g for n, g in zip(NAMES, wanted, strict=True)}
    got = {"values": by_rows} | {f"gradient {n}": g for n, g in zip(NAMES, by_autograd, strict=True)}
    assert_close(got, want, 1e-11)
    got = {"values": table_of(call.layout, values)}
    got |= {f"gradient {n}": g for n, g in written_out(read_out, mix).items()}
    assert_close(got, want, 1e-11)


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_processes_add_up(ranks: int, training: bool) -> None:
    table = symmetric(BATCH, DIM, seed=3)
    mix = mix_of()

    def run(share: tuple[int, int], reduce: Reducer) -> tuple[EdgeLayout, dict[str, Tensor]]:
        call = edge_pass(plans(BATCH, share)["padded, mixed order"], "tied")
        raw = rows_of(call.layout, table).requires_grad_()
        read_out = read_out_of(call, raw, training=training, reduce=reduce)
        return call.layout, written_out(read_out, mix, reduce)

    layout, want = run((0, 1), identity)
    group = Group(ranks)
    parts = group.run(lambda rank: run((rank, ranks), group.reducer(rank)))
    got = {name: torch.stack([part[name] for _, part in parts]).sum(0) for name in NAMES[1:]}
    got["raw"] = torch.stack([table_of(mine, part["raw"]) for mine, part in parts]).sum(0)
    want["raw"] = table_of(layout, want["raw"])
    assert_close(
        {f"gradient {name}": got[name] for name in NAMES}, {f"gradient {name}": want[name] for name in NAMES}, 1e-11
    )


def test_logits_may_take_the_place_of_the_edges() -> None:
    call = edge_pass(plans(BATCH)["padded, mixed order"], "independent")
    raw = normal(call.layout.num_rows, DIM, seed=3).detach()
    read_out = read_out_of(call, raw)
    want = read_out.fill(torch.empty_like(raw))
    found = read_out.fill(raw)
    assert found is raw
    assert torch.equal(raw, want)


def run_lowered(
    plan: PairPlan, mix: Tensor, low: torch.dtype | None, storage: torch.dtype, *, training: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Coefficients and gradients in float32 with lowered products and storage."""
    call = edge_pass(plan, "tied", low=low, storage=storage)
    raw = rows_of(call.layout, symmetric(plan.batch_size, mix.shape[-1], seed=3)).to(storage).requires_grad_()
    read_out = read_out_of(call, raw, dtype=torch.float32)
    read_out = dataclasses.replace(read_out, batch_statistics=training)
    values = torch.sigmoid(read_out.fill(torch.empty_like(raw.detach())).float() + read_out.bias.detach())
    found = written_out(read_out, mix)
    return values, found | {"raw": table_of(call.layout, found["raw"]).float()}


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_bfloat16_operands_stay_close(storage: torch.dtype, offset: float) -> None:
    plan, mix = plans(BATCH)["padded, mixed order"], mix_of(32, offset).float()
    want_values, want = run_lowered(plan, mix, None, torch.float32)
    values, got = run_lowered(plan, mix, torch.bfloat16, storage)
    assert 0 < float((values - want_values).abs().max()) < 2e-2
    for name in ("raw", "scale", "weight", "bias"):
        assert float((got[name] - want[name]).norm() / want[name].norm()) < 4e-2, name


def test_what_the_batch_statistics_take_out_is_out_in_bfloat16_too() -> None:
    """Gradients that all point one way: the normalisation cancels nearly all of the sum over the edges.

    A weight rounded in the product but not in the means would leave 1e-3 of it in every edge.
    """
    plan = pair_plan(torch.arange(40), 8)
    mix = (3 + torch.randn(40, 40, 16, generator=generator(60), dtype=torch.float64)).float()
    _, exact = run_lowered(plan, mix, None, torch.float32)
    _, uncancelled = run_lowered(plan, mix, None, torch.float32, training=False)
    _, got = run_lowered(plan, mix, torch.bfloat16, torch.float32)
    size = float(uncancelled["norm bias"].norm())
    assert float(exact["norm bias"].norm()) < 1e-6 * size
    assert 0 < float(got["norm bias"].norm()) < 2e-4 * size


def test_running_update_of_a_single_value() -> None:
    norm = frozen_bias_batch_norm(2).double()
    update_running(norm, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), 5)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.running_mean.tolist() == pytest.approx([0.1, 0.2])
    assert norm.running_var.tolist() == pytest.approx([0.9 + 0.1 * 3 * 1.25, 0.9 + 0.1 * 4 * 1.25])
    assert int(norm.num_batches_tracked) == 1


def test_the_read_out_biases_are_frozen_at_zero() -> None:
    graph = GraphNetwork(8, 5)
    for norm in (graph.edge_norm, graph.node_norm):
        assert not norm.bias.requires_grad
        assert norm.weight.requires_grad
        assert float(norm.bias.abs().max()) == 0


@pytest.mark.parametrize("plan", [None, plan_of(SIZE)], ids=["default", "class-major"])
def test_constant_coefficients_are_those_with_gradient(plan: PairPlan | None) -> None:
    z, labels = batch_of(SIZE)
    graph = graph_of(SIZE, edge_dropout="independent")
    free = graph(z, labels, dropout_key=1, plan=plan).coefficients
    fixed = graph(z, labels, dropout_key=1, plan=plan, coefficient_gradient=False).coefficients
    assert isinstance(free, PairCoefficients)
    assert isinstance(fixed, ConstantCoefficients)
    torch.testing.assert_close(fixed.logits(), free.logits(), rtol=1e-12, atol=1e-12)
    assert torch.equal(fixed.bias, free.bias)
    torch.testing.assert_close(fixed.table(), free.table().detach(), rtol=1e-12, atol=1e-12)
    # The free ones may be asked again: their edges are still there.
    assert torch.equal(free.table(), free.table())
    assert torch.equal(free.logits(), free.logits())
