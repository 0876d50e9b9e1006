"""The edge-to-node sum: values and gradients of the plain formula, whatever the plan keeps or lists."""

import pytest
import torch
from edge_cases import (
    EVERYTHING,
    LAWS,
    NOTHING,
    edge_pass,
    listed_edges,
    norm_of,
    normal,
    plans,
    rows_of,
    some_pairs,
    stored,
    symmetric,
    table_of,
)
from maths_cases import assert_close, generator
from torch import Tensor
from torch.nn import functional as F

from gcahng.graph.edge_messages import EdgePass, accumulate_product, edge_to_node_sums
from gcahng.graph.edge_source import EdgeSource, ProductEdges

BATCH, DIM = 7, 6
PLANS = pytest.mark.parametrize("name", plans(BATCH))
KEEP = pytest.mark.parametrize("keep_bytes", [EVERYTHING, NOTHING], ids=["all kept", "nothing kept"])


def linear(dim: int = DIM) -> tuple[Tensor, Tensor]:
    return normal(dim, dim, seed=1, scale=0.7), normal(dim, seed=2)


def gradients(sums: Tensor, inputs: dict[str, Tensor], seed: int = 7) -> dict[str, Tensor]:
    """The sums and the gradients of a random functional of them."""
    mix = torch.randn(sums.shape, generator=generator(seed), dtype=torch.float64).to(sums.dtype)
    grads = torch.autograd.grad((sums * mix).sum(), list(inputs.values()))
    found = {f"gradient {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {"sums": sums.detach()} | found


def plain_sums(table: Tensor, weight: Tensor, bias: Tensor, listed: Tensor | None = None) -> Tensor:
    messages = F.gelu(F.linear(table, weight, bias))
    return (messages if listed is None else messages * listed[..., None]).sum(1)


@PLANS
@pytest.mark.parametrize("law", LAWS)
def test_sums_over_product_edges(name: str, law: str) -> None:
    call = edge_pass(plans(BATCH)[name], law, layers=2)
    x = normal(BATCH, DIM, seed=3)
    weight, bias = linear()
    inputs = {"x": x, "weight": weight, "bias": bias}
    got = edge_to_node_sums(ProductEdges(call.layout.plan.positions(x)), weight, bias, call)
    want = plain_sums(x[:, None] * x[None], weight, bias)
    assert_close(gradients(got, inputs), gradients(want, inputs), 1e-12)


@PLANS
@pytest.mark.parametrize(("law", "gelu"), [("none", False), ("tied", True), ("independent", True)])
def test_sums_over_stored_edges(name: str, law: str, gelu: bool) -> None:
    call = edge_pass(plans(BATCH)[name], law, layers=2, keep_bytes=NOTHING)
    raw = normal(call.layout.num_rows, DIM, seed=3)
    source = stored(raw, DIM, gelu=gelu)
    weight, bias = linear()
    inputs = {"raw": raw, "norm weight": source.weight, "norm bias": source.bias, "weight": weight, "bias": bias}
    got = edge_to_node_sums(source, weight, bias, call)
    table = table_of(call.layout, norm_of(raw, source.weight, source.bias, gelu=gelu))
    assert_close(gradients(got, inputs), gradients(plain_sums(table, weight, bias), inputs), 1e-12)


def test_rows_of_padding_get_no_gradient() -> None:
    call = edge_pass(plans(BATCH)["more padding than samples"])
    raw = normal(call.layout.num_rows, DIM, seed=3)
    weight, bias = linear()
    edge_to_node_sums(stored(raw, DIM, gelu=True), weight, bias, call).sum().backward()
    assert raw.grad is not None
    real = rows_of(call.layout, torch.ones(BATCH, BATCH, 1, dtype=torch.float64))
    part = call.layout.parts[0]
    mask, _ = call.layout.masks(part, torch.float64)
    assert mask is not None
    assert real.shape[0] == mask.numel() == raw.shape[0]
    touched = raw.grad.abs().amax(1) > 0
    assert torch.equal(touched, mask.flatten() > 0)


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("law", LAWS)
def test_parts_of_the_processes_add_up(ranks: int, law: str) -> None:
    x = normal(BATCH, DIM, seed=3)
    weight, bias = linear()
    inputs = {"x": x, "weight": weight, "bias": bias}

    def run(share: tuple[int, int]) -> dict[str, Tensor]:
        # Six processes share three pairs of blocks: some have none.
        call = edge_pass(plans(BATCH, share)["padded, mixed order"], law, keep_bytes=NOTHING)
        return gradients(edge_to_node_sums(ProductEdges(call.layout.plan.positions(x)), weight, bias, call), inputs)

    parts = [run((rank, ranks)) for rank in range(ranks)]
    assert_close({name: sum(part[name] for part in parts) for name in parts[0]}, run((0, 1)), 1e-12)  # type: ignore[misc]


@KEEP
def test_a_plan_of_some_pairs_sums_over_those(keep_bytes: int) -> None:
    call = edge_pass(some_pairs(BATCH, 2), "tied", keep_bytes=keep_bytes)
    listed = listed_edges(call.layout)
    x = normal(BATCH, DIM, seed=3)
    weight, bias = linear()
    inputs = {"x": x, "weight": weight, "bias": bias}
    got = edge_to_node_sums(ProductEdges(call.layout.plan.positions(x)), weight, bias, call)
    want = plain_sums(x[:, None] * x[None], weight, bias, listed)
    assert_close(gradients(got, inputs), gradients(want, inputs), 1e-12)


def test_keeping_changes_no_bit() -> None:
    x = normal(BATCH, DIM, seed=3)
    weight, bias = linear()
    found = []
    for keep_bytes in (EVERYTHING, NOTHING):
        call = edge_pass(plans(BATCH)["padded, mixed order"], "independent", keep_bytes=keep_bytes)
        sums = edge_to_node_sums(ProductEdges(call.layout.plan.positions(x)), weight, bias, call)
        found.append(gradients(sums, {"x": x, "weight": weight, "bias": bias}))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_a_backward_pass_inside_autocast_changes_no_bit(low: torch.dtype | None) -> None:
    call = edge_pass(plans(BATCH)["padded, mixed order"], "tied", low=low, keep_bytes=NOTHING)
    inputs = [normal(*shape, seed=1, dtype=torch.float32) for shape in ((BATCH, 16), (16, 16), (16,))]
    x, weight, bias = inputs
    sums = edge_to_node_sums(ProductEdges(call.layout.plan.positions(x)), weight, bias, call)
    want = torch.autograd.grad(sums, inputs, torch.ones_like(sums), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(sums, inputs, torch.ones_like(sums))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["products", "stored"])
def test_derivatives_are_those_of_differences(kind: str) -> None:
    call = edge_pass(plans(4)["padded, mixed order"], "independent")
    weight, bias = linear(3)
    source: EdgeSource
    if kind == "products":
        source = ProductEdges(normal(call.layout.plan.order.numel(), 3, seed=3))
    else:
        source = stored(normal(call.layout.num_rows, 3, seed=3), 3, gelu=True)

    def sums(weight: Tensor, bias: Tensor, *tensors: Tensor) -> Tensor:
        return edge_to_node_sums(source.with_tensors(tensors), weight, bias, call)

    assert torch.autograd.gradcheck(sums, (weight, bias, *source.tensors), fast_mode=True)


def kept_shapes(call: EdgePass, source: EdgeSource) -> list[torch.Size]:
    """Of what waits for the backward pass."""
    weight, bias = linear()
    shapes: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        edge_to_node_sums(source, weight, bias, call).sum().backward()
    return shapes


def test_no_more_is_kept_than_allowed() -> None:
    plan = plans(BATCH)["padded, mixed order"]
    x = normal(plan.order.numel(), DIM, seed=3)
    rows = edge_pass(plan).layout.num_rows
    of_nodes = (x.shape, (BATCH, DIM), (DIM, DIM))
    inner = rows * DIM * 8
    for allowed, kept in ((inner, rows), (inner - 1, 0), (NOTHING, 0)):
        call = edge_pass(plan, keep_bytes=allowed)
        shapes = kept_shapes(call, ProductEdges(x))
        assert sum(s[0] for s in shapes if len(s) == 2 and s not in of_nodes) == kept


def test_bfloat16_operands_stay_close() -> None:
    exact = edge_pass(plans(BATCH)["padded, mixed order"], "tied")
    rounded = edge_pass(
        plans(BATCH)["padded, mixed order"], "tied", keep_bytes=NOTHING, low=torch.bfloat16, storage=torch.bfloat16
    )
    raw = rows_of(exact.layout, symmetric(BATCH, 32, 3, torch.float32))

    def run(call: EdgePass, buffer: Tensor) -> dict[str, Tensor]:
        buffer = buffer.detach().clone().requires_grad_()
        source = stored(buffer, 32, gelu=True)
        source = source.with_tensors((buffer, *(t.detach().float().requires_grad_() for t in source.tensors[1:])))
        weight = normal(32, 32, seed=1, scale=0.2, dtype=torch.float32)
        bias = normal(32, seed=2, dtype=torch.float32)
        inputs = dict(zip(("raw", "norm weight", "norm bias"), source.tensors, strict=True))
        return gradients(edge_to_node_sums(source, weight, bias, call), inputs | {"weight": weight, "bias": bias})

    want, got = run(exact, raw), run(rounded, raw.bfloat16())
    assert got["gradient raw"].dtype == torch.bfloat16
    for name, value in want.items():
        error = float((got[name].float() - value).norm() / value.norm())
        assert 1e-4 < error < 4e-2, name


def test_products_are_added_up_in_the_dtype_of_the_sum() -> None:
    into = torch.ones(3, 2)
    left, right = (torch.randn(5, n, generator=generator(n)) for n in (3, 2))
    accumulate_product(into, left, right)
    torch.testing.assert_close(into, 1 + left.T @ right)
    into = torch.full((3, 2), 1000.0)
    accumulate_product(into, left.bfloat16(), right.bfloat16())
    torch.testing.assert_close(into - 1000, left.T @ right, rtol=0.05, atol=0.05)  # bfloat16 has steps of 4 there
