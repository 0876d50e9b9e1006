"""The Triton kernels on a GPU: values and gradients against plain torch in float64, and the same bits in every run.

Needs torch, triton and pytest alone.
"""

import pytest
import torch
from triton_cases import CASES, Chunk, Draw, assert_near, edge_stage, reference, run

from gcahng.graph.kernels import EagerKernels
from gcahng.graph.kernels.triton_kernels import TritonKernels, triton_problem

PROBLEM = triton_problem("cuda")
pytestmark = pytest.mark.skipif(
    PROBLEM is not None or not torch.cuda.is_available(), reason=f"no GPU for Triton: {PROBLEM}"
)

# Against float64: float32 throughout, and bfloat16 operands.
TOLERANCES = {None: 1e-5, torch.bfloat16: 4e-2}
LOW = pytest.mark.parametrize("low", TOLERANCES, ids=["float32", "bfloat16"])
CHUNKS = (
    Chunk(5, 16, 512),
    Chunk(7, 15, 384),
    Chunk(33, 8, 64),
    Chunk(300, 1, 512),
    Chunk(2, 11, 100),
    Chunk(1, 40, 512),
)
STAGES = pytest.mark.parametrize(("block", "tied", "gelu"), [(4, True, True), (3, False, True), (16, True, False)])


@LOW
@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_plain_torch(case: str, chunk: Chunk, low: torch.dtype | None) -> None:
    got = run(case, TritonKernels(float32_products=True), chunk, 1, low, "cuda")
    assert_near(got, reference(case, chunk, 1), TOLERANCES[low])


@pytest.mark.parametrize("case", ["messages", "hidden"])
def test_bfloat16_is_no_worse_than_that_of_plain_torch(case: str) -> None:
    chunk = Chunk(5, 16, 512)
    want = reference(case, chunk, 2)
    got, plain = (
        run(case, kernels, chunk, 2, torch.bfloat16, "cuda")
        for kernels in (TritonKernels(float32_products=True), EagerKernels())
    )
    for name, value in want.items():
        ours, theirs = ((found[name].double().cpu() - value).norm() for found in (got, plain))
        assert ours <= 1.2 * theirs, name


@LOW
@pytest.mark.parametrize("case", CASES)
def test_every_run_gives_the_same_bits(case: str, low: torch.dtype | None) -> None:
    kernels = TritonKernels(float32_products=True)
    first, *others = (run(case, kernels, Chunk(5, 16, 512), 3, low, "cuda") for _ in range(3))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@LOW
@STAGES
def test_edge_stage_with_gradients(block: int, tied: bool, gelu: bool, low: torch.dtype | None) -> None:
    options = {"block": block, "tied": tied, "gelu": gelu, "dim": 64}
    want = edge_stage(EagerKernels(), Draw(4, torch.float64, "cpu"), None, **options)
    got = edge_stage(TritonKernels(float32_products=True), Draw(4, torch.float32, "cuda"), low, **options)
    assert_near(got, want, 2e-5 if low is None else 4e-2)


def test_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    chunk = Chunk(2, 5, 64)
    for case in CASES:
        got = run(case, TritonKernels(), chunk, 1, torch.bfloat16, "cuda:1")
        assert_near(got, reference(case, chunk, 1), TOLERANCES[torch.bfloat16])
