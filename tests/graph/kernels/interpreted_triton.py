"""The Triton kernels, interpreted on the CPU, against plain torch. `test_triton_interpreted` runs this file.

Not collected by itself: Triton must be told to interpret before it is imported.
"""

import random

import pytest
import torch
from triton_cases import CASES, Chunk, Draw, assert_near, edge_stage, reference, run

from gcahng.graph.backends import FusedKernels
from gcahng.graph.kernels import EagerKernels, HiddenWeights
from gcahng.graph.kernels.triton_kernels import TritonKernels, triton_problem

# Against float64: float32 throughout, and bfloat16 operands.
TOLERANCES = {None: 1e-5, torch.bfloat16: 4e-2}
# Single nodes, odd blocks, blocks that fill a tile, blocks larger than a tile's part, chunks that end inside a tile.
CHUNKS = (Chunk(2, 5, 48), Chunk(9, 1, 20), Chunk(1, 16, 12), Chunk(1, 17, 8))


def fresh_chunk(seed: int) -> Chunk:
    draw = random.Random(seed)
    return Chunk(draw.randint(1, 2), draw.randint(1, 16), 4 * draw.randint(1, 20))


def check(case: str, chunk: Chunk, low: torch.dtype | None, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare, with plain torch's part of the work forbidden meanwhile."""

    def refuse(*_: object) -> None:
        raise AssertionError("plain torch was called in place of a kernel")

    want = reference(case, chunk, seed)
    with monkeypatch.context() as patch:
        for name in ("normalise", "linear", "attended"):
            patch.setattr(EagerKernels, name, refuse)
        got = run(case, TritonKernels(float32_products=True), chunk, seed, low)
    try:
        assert_near(got, want, TOLERANCES[low])
    except AssertionError as error:
        raise AssertionError(f"{case}, {chunk}, seed {seed}: {error}") from error


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_plain_torch(case: str, chunk: Chunk, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, chunk, None, 1, monkeypatch)


@pytest.mark.parametrize("chunk", CHUNKS[:2], ids=str)
@pytest.mark.parametrize("case", ["messages", "hidden"])
def test_products_of_bfloat16(case: str, chunk: Chunk, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, chunk, torch.bfloat16, 1, monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_plain_torch_on_fresh_sizes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    check(case, fresh_chunk(seed), None, seed, monkeypatch)


@pytest.mark.parametrize(
    ("case", "chunk"),
    [
        ("mix", Chunk(1, 3, 384)),
        ("mix", Chunk(1, 2, 512)),
        ("messages", Chunk(1, 2, 192)),
        ("messages", Chunk(130, 1, 8)),
    ],
    ids=str,
)
def test_kernels_over_several_tiles(case: str, chunk: Chunk, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, chunk, None, 2, monkeypatch)


@pytest.mark.parametrize(
    ("block", "tied", "gelu", "low"),
    [(4, True, True, None), (3, False, True, None), (16, True, False, None), (4, True, True, torch.bfloat16)],
)
def test_edge_stage_with_gradients(block: int, tied: bool, gelu: bool, low: torch.dtype | None) -> None:
    options = {"block": block, "tied": tied, "gelu": gelu}
    want = edge_stage(EagerKernels(), Draw(4, torch.float64, "cpu"), None, **options)
    kernels = TritonKernels(float32_products=True)
    got = edge_stage(kernels, Draw(4, torch.float32, "cpu"), low, **options)
    assert_near(got, want, 2e-5 if low is None else 4e-2)


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_edge_stage_of_fused_kernels(low: torch.dtype | None) -> None:
    """What runs on CUDA: Triton's kernels, compiled functions for the rest (here traced, then run as they are)."""
    options = {"block": 3, "tied": False, "gelu": True}
    want = edge_stage(EagerKernels(), Draw(4, torch.float64, "cpu"), None, **options)
    got = edge_stage(FusedKernels("eager"), Draw(4, torch.float32, "cpu"), low, **options)
    assert_near(got, want, 2e-5 if low is None else 4e-2)


@pytest.mark.parametrize("case", CASES)
def test_what_the_kernels_cannot_take_goes_to_plain_torch(case: str) -> None:
    chunk = Chunk(2, 3, 12)
    kernels = TritonKernels(float32_products=True)
    double = CASES[case](kernels, Draw(1, torch.float64, "cpu"), chunk, None)
    assert_near(double, reference(case, chunk, 1), 1e-13)
    empty = run(case, kernels, Chunk(0, 3, 12), 1, None) if case != "hidden" else {}
    assert all(value.shape[0] == 0 for value in empty.values())


def test_blocks_beyond_a_tile_go_to_plain_torch() -> None:
    chunk = Chunk(1, 130, 4)
    got = run("messages", TritonKernels(float32_products=True), chunk, 1, None)
    assert_near(got, reference("messages", chunk, 1), 1e-5)


def test_a_kept_linear_is_not_computed_again() -> None:
    draw = Draw(1, torch.float32, "cpu")
    weights = HiddenWeights(*(draw.normal(*shape) for shape in ((32, 8), (32,), (8, 32), (8,))), 1e-5)
    kept, x, grad, row, mean = (draw.normal(5, width) for width in (32, 8, 8, 1, 1))
    got, want = (
        kernels.hidden_backward(x, kept, grad, row, mean, weights, None)
        for kernels in (TritonKernels(float32_products=True), EagerKernels())
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize("case", ["messages", "hidden"])
def test_float32_products_go_to_plain_torch_unless_asked_for(case: str) -> None:
    chunk = Chunk(2, 3, 12)
    got, want = run(case, TritonKernels(), chunk, 1, None), run(case, EagerKernels(), chunk, 1, None)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_interpreter_is_a_place_to_run() -> None:
    assert triton_problem("cpu") is None
