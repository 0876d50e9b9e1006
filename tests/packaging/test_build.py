"""The sdist and the wheel build, and the wheel works in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gcahng", "launch", "shards")
SOURCES = (
    *PACKAGES,
    "configs",
    "docs",
    "ops",
    "benchmarks",
    "tests",
    "tools",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "Makefile",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "constraints.txt",
)

PACKAGE_DATA = {
    "gcahng/py.typed",
    "gcahng/report/paper_results.yaml",
    "gcahng/report/templates/page.css",
    "gcahng/report/templates/page.html",
    "gcahng/report/templates/parts.html",
}

SMOKE = """
import importlib.metadata
import pathlib
import sys

import torch

import gcahng, launch, shards
from gcahng.graph import GraphNetwork
from gcahng.losses import NPairLoss
from gcahng.metrics import retrieval

home = pathlib.Path(sys.prefix).resolve()
for module in (gcahng, launch, shards):
    assert home in pathlib.Path(module.__file__).resolve().parents, module.__file__
assert (pathlib.Path(gcahng.__file__).parent / "py.typed").is_file()
assert importlib.metadata.version("gcahng") == gcahng.__version__

z = torch.randn(8, 16, requires_grad=True)
labels = torch.arange(4).repeat(2)
output = GraphNetwork(16, num_classes=5, num_layers=1, num_heads=2)(z, labels)
assert output.node_logits.shape == (8, 5) and output.pull_coefficients.shape == (8, 8, 16)
(NPairLoss()(z, labels) + output.pull_coefficients.mean()).backward()
assert z.grad.isfinite().all()
assert 0 <= retrieval(z, labels, ks=(1,)).map_at_r <= 1

from gcahng.report.results_table import paper_results
from gcahng.report.templates import environment
assert len(paper_results()["tables"]) > 10
assert {"page.html", "parts.html", "page.css"} <= set(environment().list_templates())
print("smoke test passed")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command without the variables that would lead it back to the source tree."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building writes beside them."""
    folder = tmp_path_factory.mktemp("build") / "source"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dist(source: Path) -> Path:
    """Folder with the sdist, and the wheel made from that sdist."""
    folder = source.parent / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=source)
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment that holds the wheel alone and borrows its dependencies.

    The dependencies come by a path entry after its own packages. Path files inside that folder,
    such as an editable install's of this checkout, are not read that way.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"),
        *("install", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    borrowed = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in borrowed))
    return python


def test_wheel_holds_every_module_and_nothing_else(source: Path, dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    modules = {path.relative_to(source).as_posix() for package in PACKAGES for path in (source / package).rglob("*.py")}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == modules | PACKAGE_DATA
    assert any(name.endswith("/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert "Requires-Dist: torch>=2.11" in text


def test_sdist_holds_what_its_tests_need(source: Path, dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "Makefile", "constraints.txt", "pyproject.toml"}
    for folder, pattern in (("tests", "*.py"), ("tests", "*.npz"), ("configs", "*.yaml"), ("benchmarks", "*")):
        wanted |= {p.relative_to(source).as_posix() for p in (source / folder).rglob(pattern) if p.is_file()}
    assert wanted | PACKAGE_DATA <= names
    assert not [name for name in names if "__pycache__" in name]


def test_installed_wheel_passes_a_smoke_test(installed: Path, tmp_path: Path) -> None:
    assert run(installed, "-I", "-c", SMOKE, cwd=tmp_path).endswith("smoke test passed\n")


@pytest.mark.parametrize("module", ["shards.convert", "launch.train", "launch.evaluate"])
def test_installed_command_lines_start(installed: Path, tmp_path: Path, module: str) -> None:
    assert "usage:" in run(installed, "-I", "-m", module, "--help", cwd=tmp_path)
