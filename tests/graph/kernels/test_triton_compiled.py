"""The Triton kernels compile for Hopper GPUs without one: no spilled registers, shared memory within the limit.

The sizes are those of ResNet-50 and BN-Inception (512), small vision transformers (384), and the least in use (64).
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gcahng.graph.kernels import (  # noqa: E402
    triton_common,
    triton_hidden,
    triton_hidden_backward,
    triton_messages,
    triton_mix,
)

pytestmark = pytest.mark.skipif(
    triton_common.INTERPRETED, reason="Triton interprets in this process (TRITON_INTERPRET): nothing is compiled"
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY = 227 << 10
# Arguments that are no tensors.
SCALARS = {"eps": "fp32", "num_rows": "i32", "num_pairs": "i32"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
DIMS = pytest.mark.parametrize("dim", [512, 384, 64])


def compiled(kernel: Any, constants: dict[str, Any], lowered: tuple[str, ...], dtype: torch.dtype) -> Any:
    """The kernel for compute capability 9.0.

    Args:
        kernel: A jitted function.
        constants: As its launch passes them.
        lowered: Tensors in `dtype`; the others are float32.
        dtype: Of the operands of matrix products.
    """
    options = {name: value for name, value in constants.items() if name in OPTIONS}
    constants = {name: value for name, value in constants.items() if name not in OPTIONS}
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name.endswith("_ptr"):
            signature[name] = pointer[dtype] if name.removesuffix("_ptr") in lowered else "*fp32"
            # As torch allocates: at multiples of 16 bytes.
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = SCALARS.get(name, "constexpr")
    assert set(constants) == {name for name, kind in signature.items() if kind == "constexpr"}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(found: Any, folder: Path) -> int:
    """Bytes of stack per thread in the machine code: there since registers were spilled."""
    path = folder / "kernel.cubin"
    path.write_bytes(found.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    match = re.search(r"STACK:(\d+)", usage)
    assert match, usage
    return int(match[1])


def check(found: Any, folder: Path, *, multiplies: bool) -> None:
    assert stack_bytes(found, folder) == 0
    assert "st.local" not in found.asm["ptx"]
    assert found.metadata.shared <= SHARED_MEMORY
    # The tensor cores' instructions, fed by asynchronous copies.
    assert ("wgmma.mma_async" in found.asm["ptx"]) == multiplies


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@DIMS
@pytest.mark.parametrize("is_product", [True, False], ids=["products", "stored"])
def test_mix(dim: int, is_product: bool, tmp_path: Path) -> None:
    constants = triton_mix.mix_constants(16, dim, product=is_product, gelu=True)
    check(compiled(triton_mix.mix_kernel, constants, (), torch.float32), tmp_path, multiplies=False)


@DIMS
def test_messages(dim: int, tmp_path: Path) -> None:
    constants = triton_messages.message_constants(
        16, dim, dim, torch.bfloat16, mirrored=True, masks=(dim == 512, dim == 512)
    )
    found = compiled(triton_messages.product_messages_kernel, constants, ("weight",), torch.bfloat16)
    check(found, tmp_path, multiplies=True)


def test_messages_of_single_edges(tmp_path: Path) -> None:
    constants = triton_messages.message_constants(1, 512, 512, torch.bfloat16, mirrored=False, masks=(False, False))
    found = compiled(triton_messages.product_messages_kernel, constants, ("weight",), torch.bfloat16)
    check(found, tmp_path, multiplies=True)


@DIMS
def test_hidden(dim: int, tmp_path: Path) -> None:
    constants = triton_hidden.hidden_constants(dim, 4 * dim, torch.bfloat16)
    found = compiled(triton_hidden.hidden_kernel, constants, ("x", "weight", "h"), torch.bfloat16)
    check(found, tmp_path, multiplies=True)


HIDDEN_BACKWARD = ("x", "grad", "weight_in", "weight_out", "grad_inner", "h")


@DIMS
def test_hidden_backward(dim: int, tmp_path: Path) -> None:
    constants = triton_hidden_backward.hidden_backward_constants(dim, 4 * dim, torch.bfloat16)
    found = compiled(triton_hidden_backward.hidden_backward_kernel, constants, HIDDEN_BACKWARD, torch.bfloat16)
    check(found, tmp_path, multiplies=True)
    # Two programs per multiprocessor: 64 K registers, 228 KB of shared memory.
    assert found.metadata.shared <= 113 << 10
    assert found.metadata.num_warps * 32 * triton_hidden_backward.TILES.registers * 2 <= 1 << 16


def test_statistics(tmp_path: Path) -> None:
    constants = triton_hidden.statistics_constants(2048, 16)
    check(compiled(triton_hidden.statistics_kernel, constants, (), torch.float32), tmp_path, multiplies=False)


def test_products_of_float32(tmp_path: Path) -> None:
    kind = torch.float32
    sizes = {"mirrored": True, "masks": (False, False)}
    for kernel, constants in (
        (triton_messages.product_messages_kernel, triton_messages.message_constants(16, 512, 512, kind, **sizes)),
        (triton_hidden.hidden_kernel, triton_hidden.hidden_constants(512, 2048, kind)),
        (
            triton_hidden_backward.hidden_backward_kernel,
            triton_hidden_backward.hidden_backward_constants(512, 2048, kind),
        ),
    ):
        check(compiled(kernel, constants, (), kind), tmp_path, multiplies=False)
