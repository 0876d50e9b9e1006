"""Imports point downward: maths -> models and data -> training -> command lines (never back)."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """What a part of the project may import of the project, and of others (None: anything)."""

    own: tuple[str, ...] = ()
    others: tuple[str, ...] | None = None


TORCH = ("torch",)
MATHS = tuple(
    f"gcahng.{name}"
    for name in (
        "errors",
        "components",
        "layout",
        "random",
        "graph",
        "generation",
        "losses",
        "metrics",
    )
)
# docs/architecture.md in a table. A new package needs a line here, and a layer.
PARTS = {
    "gcahng": Part(others=()),
    "gcahng.errors": Part(others=()),
    "gcahng.components": Part(own=("gcahng.errors",), others=()),
    "gcahng.layout": Part(own=("gcahng.errors",), others=TORCH),
    "gcahng.random": Part(own=("gcahng.errors",), others=TORCH),
    "gcahng.graph": Part(
        own=("gcahng.errors", "gcahng.layout", "gcahng.random"),
        others=("torch", "torch_scatter", "triton"),
    ),
    "gcahng.generation": Part(
        own=("gcahng.errors", "gcahng.layout", "gcahng.random", "gcahng.graph", "gcahng.losses"), others=TORCH
    ),
    "gcahng.losses": Part(own=("gcahng.errors", "gcahng.layout"), others=TORCH),
    "gcahng.metrics": Part(own=("gcahng.errors", "gcahng.layout"), others=TORCH),
    "gcahng.models": Part(own=MATHS),
    "gcahng.data": Part(own=MATHS),
    "gcahng.distributed": Part(own=(*MATHS, "gcahng.data.ranks")),
    "gcahng.monitor": Part(own=("gcahng.errors",), others=("prometheus_client", "yaml")),
    "gcahng.training": Part(own=(*MATHS, "gcahng.models", "gcahng.data", "gcahng.distributed", "gcahng.monitor")),
    "gcahng.search": Part(own=(*MATHS, "gcahng.models", "gcahng.data", "gcahng.distributed", "gcahng.training")),
    "gcahng.export": Part(own=(*MATHS, "gcahng.models", "gcahng.data", "gcahng.distributed", "gcahng.training")),
    "gcahng.compat": Part(own=(*MATHS, "gcahng.models", "gcahng.data", "gcahng.distributed", "gcahng.training")),
    "gcahng.report": Part(
        own=(*MATHS, "gcahng.models", "gcahng.data", "gcahng.distributed", "gcahng.training", "gcahng.search")
    ),
    "gcahng.tables": Part(
        own=(*MATHS, "gcahng.models", "gcahng.data", "gcahng.distributed", "gcahng.training", "gcahng.report")
    ),
    "launch": Part(own=("gcahng",)),
    "shards": Part(own=("gcahng",)),
}
# Maths, models and data know nothing of ranks, whatever third-party packages they use.
NO_RANKS = (*MATHS, "gcahng.models", "gcahng.data")
RANKS = ("torch.distributed", "accelerate", "deepspeed")


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def part_of(module: str) -> str | None:
    """The longest entry of PARTS that holds the module; `gcahng` itself holds only its own file."""
    inside = [name for name in PARTS if name != "gcahng" and is_inside(module, name)]
    if module == "gcahng":
        return "gcahng"
    return max(inside, key=len, default=None)


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of each import, at any depth, also those for type checkers only.

    `from package import name` counts as package.name: it may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                keep = len(parents) - node.level + is_package
                base = ".".join(parents[:keep] + ([node.module] if node.module else []))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def fault(module: str, part: str, imported: str) -> str | None:
    """Why this import is not allowed, or None."""
    top = imported.split(".")[0]
    if top in ("gcahng", "launch", "shards"):
        if is_inside(imported, part) and (part != "gcahng" or imported == "gcahng"):
            return None
        allowed = any(is_inside(imported, name) for name in PARTS[part].own)
        return None if allowed else f"{part} may not import {imported}"
    if part in NO_RANKS and any(is_inside(imported, name) for name in RANKS):
        return f"{part} may not know of ranks: {imported}"
    others = PARTS[part].others
    if others is None or top in others or top in sys.stdlib_module_names:
        return None
    return f"{part} may import {', '.join(others) or 'the standard library only'}, not {top}"


def violations(root: Path) -> list[str]:
    """One line per import of gcahng/, launch/ and shards/ below `root` that is not allowed."""
    found = []
    for top in ("gcahng", "launch", "shards"):
        for path in sorted((root / top).rglob("*.py")):
            relative = path.relative_to(root)
            names = list(relative.with_suffix("").parts)
            is_package = names[-1] == "__init__"
            module = ".".join(names[:-1] if is_package else names)
            part = part_of(module)
            if part is None:
                found.append(f"{relative}: {module} has no layer; add it to PARTS")
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for line, imported in imported_modules(tree, module, is_package):
                reason = fault(module, part, imported)
                if reason:
                    found.append(f"{relative}:{line}: {reason}")
    return found


def test_imports_point_downward() -> None:
    assert len(list((ROOT / "gcahng").rglob("*.py"))) > 20, "looked into the wrong folder"
    assert violations(ROOT) == []


WRONG = {
    "gcahng/losses/a.py": ("from gcahng.graph import GraphNetwork", "may not import gcahng.graph"),
    "gcahng/graph/b.py": ("import gcahng.generation.fusion", "may not import gcahng.generation"),
    "gcahng/metrics/c.py": ("import numpy as np", "gcahng.metrics may import torch, not numpy"),
    "gcahng/generation/d.py": (
        "def f():\n    import torch.distributed as dist",
        "may not know of ranks: torch.distributed",
    ),
    "gcahng/data/e.py": ("from torch import distributed", "may not know of ranks"),
    "gcahng/models/f.py": (
        "from gcahng.training import config",
        "gcahng.models may not import gcahng.training.config",
    ),
    "gcahng/models/g.py": ("from gcahng import data", "may not import gcahng.data"),
    "gcahng/data/h.py": ("from ..training import config", "may not import gcahng.training.config"),
    "gcahng/training/i.py": ("from launch.cli import main", "may not import launch.cli.main"),
    "gcahng/training/j.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import shards.convert",
        "j.py:3: gcahng.training may not import shards.convert",
    ),
    "gcahng/errors.py": ("import torch", "may import the standard library only, not torch"),
    "gcahng/__init__.py": ("from gcahng.metrics import retrieval", "gcahng may not import"),
    "launch/k.py": ("from shards import convert", "launch may not import shards.convert"),
    "gcahng/surprise/l.py": ("import torch", "gcahng.surprise.l has no layer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_upward_import_is_found(tmp_path: Path, name: str) -> None:
    source, message = WRONG[name]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (line,) = violations(tmp_path)
    assert line.startswith(name)
    assert message in line


RIGHT = {
    "gcahng/losses/a.py": "import math\nimport torch.nn as nn\nfrom gcahng.layout import x",
    "gcahng/generation/b.py": "from gcahng.graph.pairs import x\nfrom . import fusion",
    "gcahng/graph/__init__.py": "from .network import x\nfrom gcahng.graph.network import y",
    "gcahng/graph/c.py": "import torch_scatter",
    "gcahng/training/d.py": "import torch.distributed, accelerate\nfrom gcahng.data import x",
    "launch/e.py": "from launch.cli import x\nfrom gcahng import training",
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_downward_import_passes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(RIGHT[name])
    assert violations(tmp_path) == []
