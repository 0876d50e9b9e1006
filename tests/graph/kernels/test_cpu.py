"""The CPU's inner loops: the numbers of the eager ones, in buffers that are written anew and given back."""

import copy
import pickle
from threading import Thread

import pytest
import torch
from edge_cases import NOTHING, edge_pass, normal, plans
from maths_cases import Size, batch_of, generator, graph_of, results
from torch import Tensor

from gcahng.graph.edge_messages import EdgePass
from gcahng.graph.edge_source import ProductEdges
from gcahng.graph.edge_update import BlockWeights, EndTerms, UpdateRule, update_edges
from gcahng.graph.kernels import EagerKernels, HiddenWeights, NormWeights
from gcahng.graph.kernels.cpu import CpuKernels

DIM, WIDTH = 6, 24
LOWS = pytest.mark.parametrize("low", [None, torch.bfloat16])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def weights_in(low: torch.dtype | None) -> HiddenWeights:
    wide, out = draw(WIDTH, DIM, seed=1), draw(DIM, WIDTH, seed=2)
    if low is not None:
        wide, out = wide.to(low), out.to(low)
    return HiddenWeights(wide, draw(WIDTH, seed=3), out, draw(DIM, seed=4), 1e-5)


@LOWS
@pytest.mark.parametrize("keep", [True, False])
def test_chunk_after_chunk_equals_the_eager_kernels(low: torch.dtype | None, keep: bool) -> None:
    # Chunks grow and shrink; one is empty.
    eager, cpu, weights = EagerKernels(), CpuKernels(), weights_in(low)
    for number, rows in enumerate((5, 9, 2, 0, 9, 1)):
        x = draw(rows, DIM, seed=10 + number)
        want, got = eager.hidden(x, weights, low, keep=keep), cpu.hidden(x, weights, low, keep=keep)
        assert (got[0] is None) == (not keep)
        for found, wanted in zip(got, want, strict=True):
            assert found is None if wanted is None else torch.equal(found, wanted)
        grad = draw(rows, DIM, seed=30 + number)
        grad = grad if low is None else grad.to(low)
        arguments = (x, want[0], grad, draw(rows, 1, seed=50 + number), want[2], weights, low)
        for found, wanted in zip(cpu.hidden_backward(*arguments), eager.hidden_backward(*arguments), strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_what_is_kept_outlives_the_next_chunk() -> None:
    kernels, weights = CpuKernels(), weights_in(None)
    inner, *_ = kernels.hidden(draw(4, DIM, seed=5), weights, None, keep=True)
    assert inner is not None
    before = inner.clone()
    kernels.hidden_backward(
        draw(4, DIM, seed=6), inner, draw(4, DIM, seed=7), draw(4, 1, seed=8), draw(4, 1, seed=9), weights, None
    )
    kernels.hidden(draw(4, DIM, seed=11), weights, None, keep=False)
    assert torch.equal(inner, before)


def run(call: EdgePass, positions: int) -> tuple[Tensor, ...]:
    x = normal(positions, DIM, seed=3, dtype=torch.float32)
    terms = EndTerms(
        *(normal(*s, seed=11, dtype=torch.float32) for s in ((positions, DIM), (positions,), (positions, DIM)))
    )
    shapes = ((DIM,), (DIM,), (WIDTH, DIM), (WIDTH,), (DIM, WIDTH), (DIM,))
    weights = BlockWeights(*(normal(*s, seed=20 + n, dtype=torch.float32) for n, s in enumerate(shapes)))
    raw = update_edges(ProductEdges(x), terms, weights, UpdateRule(0, True, 1e-5, 1e-5, False), call).raw
    inputs = [x, *vars(terms).values(), *vars(weights).values()]
    return raw, *torch.autograd.grad(raw, inputs, torch.ones_like(raw))


@LOWS
@pytest.mark.parametrize("keep_bytes", [1 << 30, NOTHING])
def test_an_update_is_that_of_the_eager_kernels(low: torch.dtype | None, keep_bytes: int) -> None:
    plan = plans(7)["padded, mixed order"]
    call = edge_pass(plan, "independent", low=low, keep_bytes=keep_bytes, storage=torch.float32)
    cpu = EdgePass(call.layout, CpuKernels(), low, torch.float32, keep_bytes)
    found = [run(one, plan.order.numel()) for one in (call, cpu)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # The end of a pass gives the space back.
    assert isinstance(cpu.kernels, CpuKernels)
    assert not cpu.kernels._buffers


def test_copies_take_no_buffers_along() -> None:
    kernels = CpuKernels()
    kernels.hidden(draw(4, DIM, seed=5), weights_in(None), None, keep=False)
    for twin in (copy.deepcopy(kernels), pickle.loads(pickle.dumps(kernels))):
        assert type(twin) is CpuKernels
        assert not twin._buffers


def test_a_network_goes_from_inference_to_training_and_between_precisions() -> None:
    size = Size(3, 2, 8, 2, 2)
    z, labels = batch_of(size)
    graph, fresh = (graph_of(size).float() for _ in range(2))
    with torch.inference_mode():
        graph(z.float(), labels, dropout_key=1)
    with torch.autocast("cpu", torch.bfloat16):
        results(graph, z.float(), labels, dropout_key=1)
    for one in (graph, fresh):
        one.edge_norm.reset_running_stats()
        one.node_norm.reset_running_stats()
    got, want = (results(one, z.float(), labels, dropout_key=1) for one in (graph, fresh))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_pass_cut_short_in_inference_mode_leaves_nothing_that_training_trips_over() -> None:
    kernels, weights = CpuKernels(), weights_in(None)
    with torch.inference_mode():
        kernels.hidden(draw(4, DIM, seed=5), weights, None, keep=False)
    want = EagerKernels().hidden(draw(4, DIM, seed=5), weights, None, keep=False)[1]
    assert torch.equal(kernels.hidden(draw(4, DIM, seed=5), weights, None, keep=False)[1], want)


def test_threads_do_not_write_into_each_others_buffers() -> None:
    kernels, weights = CpuKernels(), weights_in(None)
    mine = kernels.hidden(draw(4, DIM, seed=5), weights, None, keep=False)[1]
    want = mine.clone()
    other = Thread(target=lambda: kernels.hidden(draw(4, DIM, seed=6), weights, None, keep=False))
    other.start()
    other.join()
    assert torch.equal(mine, want)
    kernels.hidden(draw(4, DIM, seed=6), weights, None, keep=False)
    assert not torch.equal(mine, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [True, False])
def test_a_norm_written_into_a_buffer(gelu: bool, dtype: torch.dtype) -> None:
    norm, x = NormWeights(draw(DIM, seed=1), draw(DIM, seed=2), gelu, 1e-5), draw(5, DIM, seed=3)
    buffer, before = torch.zeros(9, DIM, dtype=dtype), x.clone()
    done = CpuKernels().normalise_into(x, norm, buffer[2:7])
    want = EagerKernels().normalise(x, norm)
    assert torch.equal(done, want)
    assert torch.equal(buffer[2:7], want.to(dtype))
    assert not buffer[:2].any()
    assert not buffer[7:].any()
    assert torch.equal(x, before)
