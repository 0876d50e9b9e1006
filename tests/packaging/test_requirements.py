"""constraints.txt pins what setup.py asks for, within its ranges; constraints-min.txt the lower bounds themselves."""

import importlib.metadata
import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Requirement]]:
    """Requirements of setup.py by extra ("" for the package itself)."""
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    groups = {"": given["install_requires"], **given["extras_require"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


@pytest.fixture
def pins() -> dict[str, str]:
    return read_pins("constraints.txt")


@pytest.fixture
def oldest() -> dict[str, str]:
    return read_pins("constraints-min.txt")


def read_pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.!]+)", line)
            assert match, f"not an exact pin: {line}"
            found[canonicalize_name(match[1])] = match[2]
    return found


def test_what_make_installs_is_pinned_within_its_range(
    asked: dict[str, list[Requirement]], pins: dict[str, str]
) -> None:
    for group in ("", "glyphs", "pictures", "test", "scatter"):
        for requirement in asked[group]:
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{name} is not in constraints.txt"
            assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}"


def test_the_oldest_versions_are_the_lower_bounds(asked: dict[str, list[Requirement]], oldest: dict[str, str]) -> None:
    """Of everything that users install; tools of the tests alone may be newer."""
    compared = 0
    for group in asked.keys() - {"test", "scatter"}:
        for requirement in asked[group]:
            bound = next(s.version for s in requirement.specifier if s.operator == ">=")
            pin = Version(oldest[canonicalize_name(requirement.name)])
            assert requirement.specifier.contains(pin), f"{requirement} against {pin}"
            # A bound "1.1" is met first by 1.1.0, unless that was never published.
            assert pin.release[: len(Version(bound).release)] == Version(bound).release, f"{requirement}: oldest {pin}"
            compared += 1
    assert compared > 20


def test_every_dependency_of_a_dependency_is_pinned(asked: dict[str, list[Requirement]], pins: dict[str, str]) -> None:
    """Follow the installed packages' own requirements; each torch build brings its CUDA parts."""
    todo = [r for group in ("", "glyphs", "test") for r in asked[group]]
    seen: set[str] = set()
    while todo:
        name = canonicalize_name(todo.pop().name)
        if name in seen or name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue
        seen.add(name)
        assert name in pins, f"{name} is not in constraints.txt"
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement)


def test_constraints_leave_the_cuda_build_open(pins: dict[str, str]) -> None:
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert not [name for name, version in pins.items() if "+" in version]
