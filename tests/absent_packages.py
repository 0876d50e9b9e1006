"""One optional package hidden at a time: what can still be imported and trained, and what is said of the rest.

A script: it imports what every installation has, then forks once per package, so that each case has a fresh gcahng.
Prints one JSON object {package: {"failed": [modules], "trained": bool, "said": [messages]}}.
"""

import importlib
import json
import logging
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# What each installation has; not imported anew in each case.
import accelerate  # noqa: E402, F401
import timm  # noqa: E402, F401
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
import torchvision  # noqa: E402, F401


class _Hidden:
    """A finder that knows everything but one package, as if that were not installed."""

    def __init__(self, finder: Any, package: str) -> None:
        self._finder, self._package = finder, package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] == self._package else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def hide(package: str) -> None:
    sys.meta_path[:] = [_Hidden(finder, package) for finder in sys.meta_path]
    for name in list(sys.modules):
        if name.partition(".")[0] in (package, "gcahng", "launch", "shards"):
            del sys.modules[name]


def modules_of(*packages: str) -> list[str]:
    found = []
    for package in packages:
        found += [package, *(info.name for info in pkgutil.walk_packages([str(ROOT / package)], f"{package}."))]
    return found


def said_by(probes: Sequence[Callable[[], Any]]) -> list[str]:
    """What each probe raises (a kind of ours and its words) or, if it does nothing of the kind, returns."""
    from gcahng.errors import InputError

    said = []
    for probe in probes:
        try:
            said.append(f"returned {probe()}")
        except InputError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def _pml() -> Any:
    from gcahng.training.pml_objects import find_pml

    return find_pml("pml.ContrastiveLoss", ("pytorch_metric_learning.losses",), "loss.metric")


def _deepspeed() -> Any:
    from run_cases import make_config

    from gcahng.training.deepspeed_checks import deepspeed_plugin

    return deepspeed_plugin(make_config(Path("shards"), Path("run")))


def _report() -> Any:
    from gcahng.report.build import check_installed

    return check_installed()


def _scatter() -> Any:
    from gcahng.graph.reference import scatter_library, scatter_sum

    words: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gcahng.graph.reference").addHandler(handler)
    assert scatter_library() is None
    total = scatter_sum(torch.ones(3, 1), torch.tensor([0, 0, 1]), 2).flatten().tolist()
    return f"{total}; {words[0]}"


def _probe(module: str, function: str, *arguments: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), function)(*arguments)


def _monitor() -> Any:
    from run_cases import make_trainer

    return make_trainer(SHARDS, WORK / "monitored", {"monitor.textfile": str(WORK / "run.prom")}).run()


PROBES: dict[str, list[Callable[[], Any]]] = {
    "deepspeed": [_deepspeed],
    "faiss": [_probe("gcahng.search.approximate", "load_faiss"), _probe("gcahng.search.clustering", "_load", "faiss")],
    "fontTools": [lambda: list(importlib.import_module("gcahng.data.sources.glyph_fonts")._read_face(Path("x.ttf")))],
    "jinja2": [_probe("gcahng.report.templates", "environment"), _report],
    "matplotlib": [
        _probe("gcahng.training.canvas", "require_matplotlib"),
        _probe("gcahng.data.sources.glyph_fonts", "matplotlib_fonts"),
        _report,
    ],
    "onnx": [_probe("gcahng.export.formats", "require_packages", "onnx")],
    "onnxruntime": [_probe("gcahng.export.formats", "require_packages", "onnx")],
    "onnxscript": [_probe("gcahng.export.formats", "require_packages", "onnx")],
    "prometheus_client": [_monitor],
    "pyarrow": [_probe("gcahng.search.assemble", "load_parquet")],
    "pytorch_metric_learning": [_pml],
    "scipy": [
        _probe("gcahng.data.sources.cars", "_read_annotations", Path("cars_annos.mat")),
        _probe("gcahng.tables.paired", "_t_quantile", 4),
    ],
    "sklearn": [_report, _probe("gcahng.search.clustering", "_load", "sklearn")],
    "torch_scatter": [_scatter],
    "triton": [_probe("gcahng.graph.kernels.triton_kernels", "triton_problem", "cpu")],
}


def case(package: str) -> dict[str, Any]:
    hide(package)
    failed = []
    for name in modules_of("gcahng", "launch", "shards"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            failed.append(f"{name}: {error}")
    cases = importlib.reload(importlib.import_module("run_cases"))
    results = cases.train(SHARDS, WORK / package, {"train.max_steps_per_epoch": 2, "train.log_every": 2})
    return {"failed": failed, "trained": results["steps"] == 2, "said": said_by(PROBES[package])}


def in_a_child(package: str) -> dict[str, Any]:
    """Forked: the parent has started no threads."""
    answer = WORK / f"{package}.json"
    child = os.fork()
    if child == 0:
        try:
            answer.write_text(json.dumps(case(package)), encoding="utf-8")
        except BaseException as error:
            answer.write_text(json.dumps({"failed": [f"{type(error).__name__}: {error}"]}), encoding="utf-8")
        os._exit(0)
    os.waitpid(child, 0)
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    import run_cases

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        WORK = Path(folder)
        os.chdir(WORK)
        SHARDS = run_cases.convert_patterns(run_cases.draw_patterns(WORK / "pictures"), WORK / "shards")
        print(json.dumps({package: in_a_child(package) for package in PROBES}))
