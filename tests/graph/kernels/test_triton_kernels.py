"""Where the Triton kernels refuse to work, and what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gcahng.errors import InputError
from gcahng.graph.kernels.triton_kernels import TritonKernels, triton_problem

ROOT = Path(__file__).parents[3]
HAS_TRITON = importlib.util.find_spec("triton") is not None
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def test_without_triton_the_module_loads_and_says_so() -> None:
    # A process of its own, where triton is not to be had.
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from gcahng.graph.kernels.triton_kernels import triton_problem\n"
        "print(triton_problem('cuda'))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("the package triton is not installed"), run.stderr


def test_the_graph_loads_no_triton() -> None:
    script = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "import gcahng.graph, gcahng.graph.kernels.triton_kernels\n"
        "print(before or 'triton' not in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"]


@NEEDS_TRITON
def test_the_cpu_is_refused() -> None:
    assert triton_problem("cpu") == "the Triton kernels need an NVIDIA GPU: the device is cpu"


@NEEDS_TRITON
def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert triton_problem("cuda") == "triton 3.6 or newer is needed: found 3.5.1"


@NEEDS_TRITON
def test_a_gpu_without_bfloat16_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert triton_problem("cuda") == "the Triton kernels need compute capability 8.0: the GPU has 7.5"


@NEEDS_TRITON
def test_a_machine_without_a_c_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    assert triton_problem("cuda") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = triton_problem("cuda")
    assert problem is not None and problem.startswith("triton needs a C compiler")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_kernels_that_cannot_run_are_not_made() -> None:
    with pytest.raises(InputError, match=r"Triton kernels cannot be used: .*Take the backend eager"):
        TritonKernels()
