"""What takes seconds to import is imported where it is used: every process of every command would pay for it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLOW = {"accelerate", "deepspeed", "matplotlib", "onnx", "onnxruntime", "scipy", "sklearn", "timm", "torchvision"}


def imported_at_once(source: str) -> Iterator[str]:
    """Packages that importing a module imports, by its own statements."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]
        waiting += ast.iter_child_nodes(node)


def test_slow_packages_are_imported_in_functions() -> None:
    files = [path for folder in ("gcahng", "launch", "shards") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {path.name: slow for path in files if (slow := SLOW & set(imported_at_once(path.read_text("utf-8"))))}
    assert found == {}


def test_what_counts_as_at_once() -> None:
    source = "import a.b\nfrom c import d\ntry:\n    import e\nexcept ImportError:\n    pass\nclass F:\n    import g\n"
    later = "def h():\n    import i\nfrom . import j\nif TYPE_CHECKING:\n    import k\n"
    assert set(imported_at_once(source + later)) == {"a", "c", "e", "g"}
