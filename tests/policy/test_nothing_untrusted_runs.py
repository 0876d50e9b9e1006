"""What could run code from a file, or write outside of a folder, is nowhere called: no pickles, no eval, no shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("gcahng", "launch", "shards")
# Calls that are never right, by the end of their dotted name.
FORBIDDEN = {
    "pickle.load": "unpickles",
    "pickle.loads": "unpickles",
    "pickle.Unpickler": "unpickles",
    "dill.load": "unpickles",
    "joblib.load": "unpickles",
    "cloudpickle.load": "unpickles",
    "marshal.loads": "loads code",
    "shelve.open": "unpickles",
    "pandas.read_pickle": "unpickles",
    "torch.hub.load": "runs a repository's code",
    "torch.package.PackageImporter": "runs code",
    "yaml.load": "may construct any object",
    "yaml.load_all": "may construct any object",
    "yaml.unsafe_load": "constructs any object",
    "yaml.full_load": "may construct any object",
    "eval": "runs a text",
    "exec": "runs a text",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "tarfile.open": "believes a tar's names and links; see gcahng.data.tars",
    "extractall": "writes where an archive says",
    "extract": "writes where an archive says",
    "shutil.unpack_archive": "writes where an archive says",
    "jinja2.Template": "does not escape",
}
YAML_LOADERS = {"Loader", "FullLoader", "UnsafeLoader", "CLoader", "BaseLoader"}


def faults(text: str) -> list[str]:
    """ "line: what" of every such call."""
    tree = ast.parse(text)
    aliases = dict(_aliases(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func, aliases)
            options = {option.arg: option.value for option in node.keywords if option.arg}
            found += [f"{node.lineno}: {name} {why}" for why in _why(name, options)]
        elif isinstance(node, ast.ClassDef):
            bases = [_dotted(base, aliases) for base in node.bases]
            found += [f"{node.lineno}: {b} constructs objects" for b in bases if b.split(".")[-1] in YAML_LOADERS]
    return found


def _why(name: str, options: dict[str, ast.expr]) -> Iterator[str]:
    for forbidden, why in FORBIDDEN.items():
        anywhere = "." in forbidden or forbidden.startswith("extract")
        if name == forbidden or (anywhere and name.endswith(f".{forbidden}")):
            yield why
    if name == "torch.load" and not _is(options.get("weights_only"), True):
        yield "needs weights_only=True"
    if name in ("numpy.load", "numpy.save", "numpy.lib.format.open_memmap", "numpy.lib.format.read_array"):
        if "allow_pickle" in options and not _is(options["allow_pickle"], False):
            yield "needs allow_pickle=False"
        if name == "numpy.load" and "allow_pickle" not in options:
            yield "needs allow_pickle=False, said aloud"
    if "shell" in options and not _is(options["shell"], False):
        yield "runs a shell"
    if name.endswith("Image.open") and "formats" not in options:
        yield "needs formats=: some of the others open files and run programs"
    if name.endswith("Environment") and name.startswith("jinja2") and not _is(options.get("autoescape"), True):
        yield "needs autoescape=True"


def _is(value: ast.expr | None, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names that imports give to modules and what they hold."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def test_nothing_untrusted_runs() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 100, "looked into the wrong folder"
    found = [f"{p.relative_to(ROOT)}:{fault}" for p in paths for fault in faults(p.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("import torch\ntorch.load(f, weights_only=True)", 0),
        ("import torch\ntorch.load(f)", 1),
        ("import torch as t\nt.load(f, weights_only=False)", 1),
        ("from torch import load\nload(f)", 1),
        ("import pickle\npickle.loads(b)", 1),
        ("from pickle import load as read\nread(f)", 1),
        ("import yaml\nyaml.safe_load(f)\nclass L(yaml.SafeLoader): pass", 0),
        ("import yaml\nyaml.load(f, yaml.SafeLoader)", 1),
        ("import yaml\nclass L(yaml.Loader): pass", 1),
        ("model.eval()\nre.compile(x)", 0),
        ("eval(x)\nexec(y)", 2),
        ("import numpy as np\nnp.load(f, mmap_mode='r', allow_pickle=False)", 0),
        ("import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=True)\nnp.load(f, allow_pickle=x)", 3),
        ("import subprocess\nsubprocess.run(['ls'])\nsubprocess.run('ls', shell=True)", 1),
        ("import tarfile\nwith tarfile.open(f) as tar:\n    tar.extractall()", 2),
        ("import zipfile\nzipfile.ZipFile(f).extract(x)", 1),
        ("from PIL import Image\nImage.open(f)\nImage.open(f, formats=('PNG',))", 1),
        ("from jinja2 import Environment\nEnvironment(autoescape=True)\nEnvironment()", 1),
    ],
)
def test_what_is_found(text: str, number: int) -> None:
    assert len(faults(text)) == number, faults(text)
