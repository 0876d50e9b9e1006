"""The edge block: values, gradients and moments of the plain formula, and what it keeps for the backward pass."""

import dataclasses
from typing import Any

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
    plain_update,
    plans,
    some_pairs,
    stored,
    table_of,
)
from maths_cases import assert_close, generator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gcahng.graph import PairPlan, identity
from gcahng.graph.blocks import EdgeBlock
from gcahng.graph.edge_messages import EdgePass
from gcahng.graph.edge_source import EdgeSource, ProductEdges
from gcahng.graph.edge_update import BlockWeights, EndTerms, UpdateRule, update_edges
from gcahng.graph.pairs import pair_plan

BATCH, DIM = 7, 6
PLANS = pytest.mark.parametrize("name", plans(BATCH))
KEEP = pytest.mark.parametrize("keep_bytes", [EVERYTHING, NOTHING], ids=["all kept", "nothing kept"])


def rule(*, gelu: bool = True, layer: int = 1, moments: bool = False) -> UpdateRule:
    return UpdateRule(layer, gelu, 1e-5, 1e-5, moments)


def terms_of(batch: int, dim: int, dtype: torch.dtype = torch.float64) -> EndTerms:
    return EndTerms(
        normal(batch, dim, seed=11, scale=0.5, dtype=dtype),
        normal(batch, seed=12, dtype=dtype),
        normal(batch, dim, seed=13, dtype=dtype),
    )


def weights_of(dim: int, dtype: torch.dtype = torch.float64) -> BlockWeights:
    return BlockWeights(
        normal(dim, seed=21, dtype=dtype),
        normal(dim, seed=22, dtype=dtype),
        normal(4 * dim, dim, seed=23, scale=dim**-0.5, dtype=dtype),
        normal(4 * dim, seed=24, dtype=dtype),
        normal(dim, 4 * dim, seed=25, scale=dim**-0.5, dtype=dtype),
        normal(dim, seed=26, dtype=dtype),
    )


def fields(record: EndTerms | BlockWeights) -> dict[str, Tensor]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def centred(weights: BlockWeights) -> BlockWeights:
    """As `EdgeBlock.weights` hands them over: the rows of weight_out add up to zero."""
    out = weights.weight_out
    return dataclasses.replace(weights, weight_out=out - out.mean(1, keepdim=True))


def at_positions(terms: EndTerms, plan: PairPlan) -> EndTerms:
    return EndTerms(*(plan.positions(t) for t in fields(terms).values()))


def gradients(table: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A table and the gradients of a random functional of it that tells the two directions apart."""
    mix = torch.randn(table.shape, generator=generator(7), dtype=torch.float64).to(table.dtype)
    grads = torch.autograd.grad((table * mix).sum(), list(inputs.values()))
    found = {f"gradient {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {"raw": table.detach()} | found


@PLANS
@pytest.mark.parametrize("law", LAWS)
def test_update_of_product_edges(name: str, law: str) -> None:
    call = edge_pass(plans(BATCH)[name], law, layers=2)
    x, terms, weights = normal(BATCH, DIM, seed=3), terms_of(BATCH, DIM), weights_of(DIM)
    inputs = {"x": x} | fields(terms) | fields(weights)
    source = ProductEdges(call.layout.plan.positions(x))
    raw = update_edges(source, at_positions(terms, call.layout.plan), centred(weights), rule(), call).raw
    want = plain_update(x[:, None] * x[None], terms, centred(weights), LAWS[law], layer=1, gelu=True)
    assert_close(gradients(table_of(call.layout, raw), inputs), gradients(want, inputs), 1e-12)


@PLANS
@pytest.mark.parametrize(("law", "gelu"), [("none", False), ("tied", True), ("independent", True)])
def test_update_of_stored_edges(name: str, law: str, gelu: bool) -> None:
    call = edge_pass(plans(BATCH)[name], law, layers=2, keep_bytes=NOTHING)
    before = normal(call.layout.num_rows, DIM, seed=3)
    terms, weights = terms_of(BATCH, DIM), weights_of(DIM)
    source = stored(before, DIM, gelu=gelu)
    # The weights of the norm before the block are those of another block.
    inputs = {"raw": before, "weight before": source.weight, "bias before": source.bias}
    inputs |= fields(terms) | fields(weights)
    raw = update_edges(source, at_positions(terms, call.layout.plan), centred(weights), rule(gelu=gelu), call).raw
    edges = table_of(call.layout, norm_of(before, source.weight, source.bias, gelu=gelu))
    # A row that stands for both directions has symmetric masks, so the plain formula may compute either.
    want = plain_update(edges, terms, centred(weights), LAWS[law], layer=1, gelu=gelu)
    assert_close(gradients(table_of(call.layout, raw), inputs), gradients(want, inputs), 1e-12)


def test_a_plan_of_some_pairs_updates_those() -> None:
    call = edge_pass(some_pairs(BATCH, 2), "independent", keep_bytes=NOTHING, layers=2)
    x, terms, weights = normal(BATCH, DIM, seed=3), terms_of(BATCH, DIM), weights_of(DIM)
    inputs = {"x": x} | fields(terms) | fields(weights)
    source = ProductEdges(call.layout.plan.positions(x))
    updated = update_edges(source, at_positions(terms, call.layout.plan), centred(weights), rule(moments=True), call)
    raw, moments = updated.raw, updated.moments
    listed = listed_edges(call.layout)
    plain = plain_update(x[:, None] * x[None], terms, centred(weights), LAWS["independent"], layer=1, gelu=True)
    want = plain * listed[..., None]
    assert_close(gradients(table_of(call.layout, raw), inputs), gradients(want, inputs), 1e-12)
    assert moments is not None
    mean, variance = moments.over(identity, call.layout.plan.edge_count)
    new = norm_of(plain[listed > 0], weights.norm_weight, weights.norm_bias, gelu=True).detach()
    torch.testing.assert_close(mean, new.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, new.var(0, correction=0), rtol=1e-12, atol=1e-12)


@PLANS
@pytest.mark.parametrize("law", LAWS)
def test_moments_are_those_of_the_new_edges(name: str, law: str) -> None:
    call = edge_pass(plans(BATCH)[name], law, layers=2)
    x, terms, weights = normal(BATCH, DIM, seed=3), terms_of(BATCH, DIM), weights_of(DIM)
    source = ProductEdges(call.layout.plan.positions(x))
    arguments = (source, at_positions(terms, call.layout.plan), centred(weights))
    updated = update_edges(*arguments, rule(moments=True), call)
    raw, moments = updated.raw, updated.moments
    assert moments is not None
    mean, variance = moments.over(identity, BATCH**2)
    table = norm_of(table_of(call.layout, raw), weights.norm_weight, weights.norm_bias, gelu=True).detach()
    want_variance, want_mean = torch.var_mean(table.flatten(0, 1), 0, correction=0)
    torch.testing.assert_close(mean, want_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, want_variance, rtol=1e-12, atol=1e-12)
    assert update_edges(*arguments, rule(), call).moments is None


@pytest.mark.parametrize("kind", ["products", "stored"])
@pytest.mark.parametrize("law", ["none", "independent"])
def test_derivatives_are_those_of_differences(kind: str, law: str) -> None:
    call = edge_pass(plans(3)["padded, mixed order"], law, keep_bytes=NOTHING)
    positions = call.layout.plan.order.numel()
    source: EdgeSource
    if kind == "products":
        source = ProductEdges(normal(positions, 2, seed=3))
    else:
        source = stored(normal(call.layout.num_rows, 2, seed=3), 2, gelu=False)
    inputs = [*fields(terms_of(positions, 2)).values(), *fields(weights_of(2)).values()]

    def raw(*tensors: Tensor) -> Tensor:
        terms, weights = EndTerms(*tensors[:3]), BlockWeights(*tensors[3:9])
        return update_edges(source.with_tensors(tensors[9:]), terms, weights, rule(), call).raw

    assert torch.autograd.gradcheck(raw, (*inputs, *source.tensors), fast_mode=True)


def run_both(call: EdgePass) -> dict[str, Tensor]:
    """One update of float32 product edges, forward and backward."""
    x = normal(BATCH, 32, seed=3, scale=32**-0.5, dtype=torch.float32)
    terms, weights = terms_of(BATCH, 32, torch.float32), weights_of(32, torch.float32)
    source = ProductEdges(call.layout.plan.positions(x))
    raw = update_edges(source, at_positions(terms, call.layout.plan), centred(weights), rule(), call).raw
    assert raw.dtype == call.storage
    return gradients(table_of(call.layout, raw).float(), {"x": x} | fields(terms) | fields(weights))


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@KEEP
def test_bfloat16_operands_stay_close(storage: torch.dtype, keep_bytes: int) -> None:
    plan = plans(BATCH)["padded, mixed order"]
    want = run_both(edge_pass(plan, "tied", layers=2, storage=torch.float32))
    call = edge_pass(plan, "tied", layers=2, keep_bytes=keep_bytes, low=torch.bfloat16, storage=storage)
    off = {name: float((got - want[name]).norm() / want[name].norm()) for name, got in run_both(call).items()}
    assert max(off.values()) < 4e-2, off
    # bfloat16 took part in all but the gradient of what is added last.
    assert min(error for name, error in off.items() if name != "gradient shift") > 1e-4, off


def test_keeping_changes_no_bit() -> None:
    plan = plans(BATCH)["padded, mixed order"]
    found = [
        run_both(edge_pass(plan, "tied", layers=2, keep_bytes=keep, storage=torch.float32))
        for keep in (EVERYTHING, NOTHING)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_a_backward_pass_inside_autocast_changes_no_bit(low: torch.dtype | None) -> None:
    plan = plans(BATCH)["padded, mixed order"]
    call = edge_pass(plan, "tied", layers=2, low=low, keep_bytes=NOTHING, storage=torch.float32)
    x, terms, weights = (
        normal(plan.order.numel(), 16, seed=3, dtype=torch.float32),
        terms_of(plan.order.numel(), 16, torch.float32),
        weights_of(16, torch.float32),
    )
    raw = update_edges(ProductEdges(x), terms, weights, rule(), call).raw
    inputs = [x, *fields(terms).values(), *fields(weights).values()]
    want = torch.autograd.grad(raw, inputs, torch.ones_like(raw), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(raw, inputs, torch.ones_like(raw))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and not value._is_view():
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(("kind", "law"), [("products", "independent"), ("stored", "none"), ("stored", "tied")])
def test_nothing_grows_with_the_edges_but_the_buffer(kind: str, law: str) -> None:
    """Beyond the buffers (rows, D) themselves, no tensor is larger than the hidden layer of one chunk."""
    plan = pair_plan(torch.arange(2 * BATCH), 4, edges_per_chunk=16)
    call = edge_pass(plan, law, layers=2, keep_bytes=NOTHING)
    terms, weights = terms_of(2 * BATCH, DIM), weights_of(DIM)
    rows = call.layout.num_rows
    source: EdgeSource = ProductEdges(plan.positions(normal(2 * BATCH, DIM, seed=3)))
    if kind == "stored":
        source = stored(normal(rows, DIM, seed=3), DIM, gelu=True)
    # One chunk's hidden layer is smaller than the buffer, that of all chunks is not.
    assert max(part.chunk.num_rows for part in call.layout.all_rows()) * 4 < rows
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        raw = update_edges(source, at_positions(terms, plan), centred(weights), rule(), call).raw
        raw.backward(torch.ones_like(raw))
    assert largest.elements == rows * DIM
    assert max(kept) == rows * DIM


def test_per_row_little_is_kept() -> None:
    plan = plans(2 * BATCH)["padded, mixed order"]
    x, terms, weights = normal(2 * BATCH, DIM, seed=3), terms_of(2 * BATCH, DIM), weights_of(DIM)
    sizes: dict[int, int] = {}
    for keep_bytes in (NOTHING, EVERYTHING):
        call = edge_pass(plan, "tied", layers=2, keep_bytes=keep_bytes)
        kept: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            source = ProductEdges(plan.positions(x))
            update_edges(source, at_positions(terms, plan), centred(weights), rule(), call)
        sizes[keep_bytes] = sum(kept)
    rows = call.layout.num_rows
    assert sizes[EVERYTHING] - sizes[NOTHING] == rows * 4 * DIM
    nodes = 8 * plan.order.numel() * DIM + sum(t.numel() for t in fields(weights).values()) * 2
    assert sizes[NOTHING] <= rows * (DIM + 6) + nodes


def test_the_folded_weight_is_that_of_its_formula() -> None:
    """Linear(LayerNorm(h)) by the folded weight, in value and in every gradient, at once for two uses of the block."""
    block = EdgeBlock(4, gelu_norm=True).double()
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(number), dtype=torch.float64))
    h = torch.randn(5, 16, generator=generator(99), dtype=torch.float64)
    folded = block.weights()
    variance, mean = torch.var_mean(h, 1, correction=0, keepdim=True)
    found = (h @ folded.weight_out.t()) * torch.rsqrt(variance + block.ffn_norm.eps) + folded.shift
    wanted = block.ffn_out(block.ffn_norm(h))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    parameters = (block.ffn_out.weight, block.ffn_out.bias, block.ffn_norm.weight, block.ffn_norm.bias)
    got, want = (torch.autograd.grad(x.sin().sum(), parameters) for x in (found, wanted))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
