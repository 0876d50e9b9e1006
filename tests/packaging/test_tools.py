"""The shell scripts behind `make`: plain errors, and one compilation per torch version.

A real compilation takes minutes, so a small script stands in for the environment's Python here;
`make test` runs the scripts for real.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

# A stand-in Python: importing torch_scatter works once a wheel whose content is "good" has been
# installed; `pip wheel` writes the content of $NEXT_WHEEL, or fails without one.
STAND_IN = """#!/usr/bin/env bash
state=$(dirname "$0")
case "$*" in
    *torch_scatter.scatter*) [ "$(cat "$state/installed" 2>/dev/null)" = good ] ;;
    *is_available*) exit 1 ;;
    *print*) echo torch-2.99.0-cp399 ;;
    *" install "*) echo install >> "$state/log"; cp "${@: -1}" "$state/installed" ;;
    *" wheel "*)
        echo "wheel FORCE_CUDA=$FORCE_CUDA" >> "$state/log"
        [ -n "$NEXT_WHEEL" ] || exit 1
        while [ "$1" != --wheel-dir ]; do shift; done
        echo "$NEXT_WHEEL" > "$2/torch_scatter-2.1.2-cp399.whl" ;;
    *) exit 99 ;;
esac
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def build(python: Path, next_wheel: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "GCAHNG_WHEELS": str(python.parent / "wheels"),
        "NEXT_WHEEL": next_wheel,
        "CXX": "sh",  # any command that exists: nothing is compiled
    }
    return subprocess.run(
        ["bash", TOOLS / "build_scatter.sh", python],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def log(python: Path) -> list[str]:
    path = python.parent / "log"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def kept(python: Path) -> list[Path]:
    return sorted((python.parent / "wheels").glob("torch-2.99.0-cp399-cpu/*"))


def test_builds_once_keeps_the_wheel_and_uses_it_again(python: Path) -> None:
    assert build(python, "good").returncode == 0
    assert log(python) == ["wheel FORCE_CUDA=0", "install"]
    assert [path.name for path in kept(python)] == ["torch_scatter-2.1.2-cp399.whl"]

    assert build(python, "").returncode == 0  # it works already: nothing to do
    assert len(log(python)) == 2

    (python.parent / "installed").unlink()  # a new environment
    assert build(python, "").returncode == 0
    assert log(python)[2:] == ["install"]


def test_a_stale_wheel_is_built_again(python: Path) -> None:
    assert build(python, "good").returncode == 0
    kept(python)[0].write_text("stale\n")
    (python.parent / "installed").unlink()
    done = build(python, "good")
    assert done.returncode == 0
    assert "the kept wheel does not work with this environment" in done.stdout
    assert log(python)[2:] == ["install", "wheel FORCE_CUDA=0", "install"]
    assert kept(python)[0].read_text() == "good\n"


def test_a_failed_build_is_loud_and_leaves_nothing(python: Path) -> None:
    done = build(python, "")
    assert done.returncode == 1
    assert "error: building torch_scatter failed." in done.stderr
    assert "make test SCATTER=0" in done.stderr
    assert kept(python) == []


def test_a_build_that_does_not_run_is_an_error(python: Path) -> None:
    done = build(python, "broken")
    assert done.returncode == 1
    assert "torch_scatter was built, but does not run" in done.stderr


def test_a_missing_compiler_is_named(python: Path) -> None:
    done = subprocess.run(
        ["bash", TOOLS / "build_scatter.sh", python],
        env={**os.environ, "GCAHNG_WHEELS": str(python.parent), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "needs a C++ compiler" in done.stderr


def create(python: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", TOOLS / "create_venv.sh", python, folder],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def stand_in(path: Path, condition: str) -> Path:
    """This Python, failing where its arguments match a shell pattern."""
    path.write_text(f'#!/usr/bin/env bash\ncase "$*" in {condition}) exit 1 ;; esac\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def test_python_is_not_found(tmp_path: Path) -> None:
    done = create("no-such-python", tmp_path / "venv")
    assert done.returncode == 1
    assert "error: 'no-such-python' was not found." in done.stderr


def test_python_is_too_old(tmp_path: Path) -> None:
    done = create(stand_in(tmp_path / "old", "*version_info*"), tmp_path / "venv")
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr


def test_python_lacks_venv(tmp_path: Path) -> None:
    done = create(stand_in(tmp_path / "bare", "*ensurepip*"), tmp_path / "venv")
    assert done.returncode == 1
    assert "(module venv or ensurepip is missing)" in done.stderr
    assert "apt install python3-venv" in done.stderr


def test_a_half_made_environment_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    broken = stand_in(tmp_path / "broken", f'"-m venv "*) mkdir -p {folder}; exit 1 ;; no')
    assert create(broken, folder).returncode == 1
    assert not folder.exists()


def test_makes_an_environment(tmp_path: Path) -> None:
    done = create(sys.executable, tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    assert shutil.which("python", path=str(tmp_path / "venv" / "bin"))
