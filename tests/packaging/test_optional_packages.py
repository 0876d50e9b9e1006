"""Every optional package may be absent: all modules import, training runs, and what needs it says what to install."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# What each probe of tests/absent_packages.py says, in its order.
REPORT = ["InputError", "pip install 'gcahng[report]'"]
EXPORT = ["InputError", "pip install 'gcahng[export]'", "--format torch-export"]
GLYPHS = ["InputError", 'pip install "gcahng[glyphs]"']
WANTED: dict[str, list[list[str]]] = {
    "deepspeed": [["ConfigError", "pip install 'gcahng[deepspeed]'"]],
    "faiss": [["InputError", "pip install 'gcahng[search]'"]] * 2,
    "fontTools": [GLYPHS],
    "jinja2": [REPORT, REPORT],
    "matplotlib": [REPORT, GLYPHS, REPORT],
    "onnx": [EXPORT],
    "onnxruntime": [EXPORT],
    "onnxscript": [EXPORT],
    "prometheus_client": [["ConfigError", "`monitor.textfile`", "pip install 'gcahng[monitor]'"]],
    "pyarrow": [["ConfigError", "pip install 'gcahng[search]'"]],
    "pytorch_metric_learning": [["ConfigError", "pip install 'gcahng[pml]'"]],
    "scipy": [['pip install "gcahng[cars]"'], ["pip install scipy"]],
    "sklearn": [REPORT, REPORT],
    # Not an error: torch's own scatter does as well.
    "torch_scatter": [["returned [2.0, 1.0]", 'pip install --no-build-isolation "gcahng[scatter]"']],
    "triton": [["returned the package triton is not installed"]],
}
# The kernels themselves: imported when a `TritonKernels` is made.
KERNELS = "gcahng.graph.kernels.triton_"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    script = ROOT / "tests" / "absent_packages.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    answers: dict[str, Any] = json.loads(run.stdout)
    return answers


def test_every_optional_package_has_its_case(found: dict[str, Any]) -> None:
    assert found.keys() == WANTED.keys()


@pytest.mark.parametrize("package", WANTED)
def test_without_a_package_everything_else_works(found: dict[str, Any], package: str) -> None:
    answer = found[package]
    unexpected = [name for name in answer["failed"] if not (package == "triton" and name.startswith(KERNELS))]
    assert unexpected == []
    assert answer["trained"]
    assert len(answer["said"]) == len(WANTED[package])
    for said, parts in zip(answer["said"], WANTED[package], strict=True):
        assert all(part in said for part in parts), said
