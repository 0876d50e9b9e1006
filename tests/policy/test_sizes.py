"""One idea per file: no Python file over 400 lines, no function over 60."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("gcahng", "launch", "shards", "tests", "benchmarks", "tools")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def oversize(path: Path) -> list[str]:
    """What is too long in one file, docstrings and comments counted, decorators not."""
    text = path.read_text(encoding="utf-8")
    found = []
    num_lines = len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        found.append(f"{path.name}: {num_lines} lines (at most {MAX_FILE_LINES})")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(
                    f"{path.name}:{node.lineno}: {node.name} has {length} lines (at most {MAX_FUNCTION_LINES})"
                )
    return found


def test_files_and_functions_stay_small() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 40, "looked into the wrong folder"
    assert [line for path in [*paths, ROOT / "setup.py"] for line in oversize(path)] == []


@pytest.mark.parametrize(("num_lines", "is_allowed"), [(60, True), (61, False)])
def test_function_limit(tmp_path: Path, num_lines: int, is_allowed: bool) -> None:
    path = tmp_path / "one.py"
    path.write_text("@decorator\ndef f():\n" + "    x = 1\n" * (num_lines - 1))
    assert oversize(path) == ([] if is_allowed else [f"one.py:2: f has {num_lines} lines (at most 60)"])


@pytest.mark.parametrize(("num_lines", "is_allowed"), [(400, True), (401, False)])
def test_file_limit(tmp_path: Path, num_lines: int, is_allowed: bool) -> None:
    path = tmp_path / "two.py"
    path.write_text("x = 1\n" * num_lines)
    assert oversize(path) == ([] if is_allowed else ["two.py: 401 lines (at most 400)"])
