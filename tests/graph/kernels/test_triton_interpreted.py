"""The Triton kernels equal plain torch, without a GPU: Triton's interpreter runs them on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CASES = Path(__file__).with_name("interpreted_triton.py")
TESTS = Path(__file__).parents[2]


def test_interpreted_kernels_equal_plain_torch() -> None:
    # A process of its own: Triton reads the setting once, when a kernel is defined.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent), CASES]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
