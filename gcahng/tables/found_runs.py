"""Run folders on disk: which experiment each is, and what its evaluation says, or why it has none to count."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gcahng.errors import ConfigError
from gcahng.tables.settings import compared_settings, local_manifest
from gcahng.training.checkpoint import CONFIG, LINKS, STATE
from gcahng.training.config import Config, load_config
from gcahng.training.results import evaluation_columns, metric_columns
from gcahng.training.run_log import METRICS_FILE, read_rows

TIMING_FILE = "timing.json"
"""What `gcahng.tables.timing` leaves in a run folder."""


class NoResult(Exception):
    """A run has no evaluation that can be counted; the message says why."""


@dataclass(frozen=True)
class FoundRun:
    """A run folder.

    Attributes:
        folder: The folder.
        config: Of the run.
    """

    folder: Path
    config: Config

    @cached_property
    def settings(self) -> dict[str, str]:
        """What is compared with a table's runs."""
        return compared_settings(self.config)

    @cached_property
    def data_digest(self) -> str | None:
        """Digest of the data that it was trained on, from its newest checkpoint; None where that is gone."""
        try:
            state = json.loads((self.folder / "last" / STATE).read_text(encoding="utf-8"))
            return str(state["data"]["manifest"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def trained_on(self, data_dir: str) -> bool:
        """Whether its data is that of a folder: by manifest, or by the folder's name where one manifest is gone."""
        expected = local_manifest(data_dir)
        if expected is not None and self.data_digest is not None:
            return expected[1] == self.data_digest
        own = self.config.data.dir
        return own == data_dir or ("://" not in own + data_dir and os.path.abspath(own) == os.path.abspath(data_dir))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Of `metrics.jsonl`."""
        return read_rows(self.folder / METRICS_FILE)


def find_runs(roots: Iterable[Path]) -> tuple[list[FoundRun], list[str]]:
    """All run folders below some folders, in order of their paths.

    Returns:
        The runs, and a line for each folder whose configuration cannot be read.
    """
    runs: dict[Path, FoundRun] = {}
    unreadable: dict[Path, str] = {}
    for root in roots:
        for folder in _folders(root):
            resolved = folder.resolve()
            if resolved in runs or resolved in unreadable:
                continue
            try:
                runs[resolved] = FoundRun(folder, load_config(folder / CONFIG))
            except ConfigError as error:
                unreadable[resolved] = f"{folder}: its configuration cannot be used. {error}"
    return list(runs.values()), list(unreadable.values())


def _folders(root: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for path, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # links may lead in circles
            folders.clear()
            continue
        seen.add(real)
        # Checkpoints hold the configuration too. Elsewhere `best` may be the name of a run.
        passed_over = (*LINKS, "tensorboard") if CONFIG in files else ()
        folders[:] = sorted(n for n in folders if not n.startswith("step-") and n not in passed_over)
        if CONFIG in files:
            yield Path(path)


def read_evaluation(run: FoundRun, which: str) -> tuple[int, dict[str, float]]:
    """The evaluation of a finished run that counts.

    Args:
        run: A run.
        which: "best_test", "last", or "best": the test classes in the epoch that was best by validation.
    Returns:
        Its epoch, and every metric in percent by the name to print.
    Raises:
        NoResult: The run is not finished, or damaged, or has no such evaluation.
    """
    results = _results(run)
    row = results["best_test" if which == "best_test" else "last"]
    if which == "best":
        row = _best_by_validation(run, results)
    try:
        # Rows of earlier releases have fewer metrics.
        columns = evaluation_columns(row) if "mrr" in row else metric_columns(row)
        epoch = int(row["epoch"])
    except (KeyError, TypeError, ValueError) as error:
        raise NoResult(f"damaged: an evaluation in results.json lacks {error}") from None
    bad = [f"{name} is {value}" for name, value in columns.items() if not _is_percentage(value)]
    if bad:
        raise NoResult(f"not to be counted: {', '.join(bad)}")
    return epoch, columns


def _results(run: FoundRun) -> dict[str, Any]:
    """`results.json` of a run that has come to the end that its configuration says."""
    file = run.folder / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        ended = int(results["last"]["epoch"])
        results["best_test"]["epoch"]
    except FileNotFoundError:
        raise NoResult(_unfinished(run)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoResult(f"damaged: results.json cannot be used ({type(error).__name__}: {error})") from None
    epochs = run.config.train.epochs
    if ended != epochs:  # of an earlier, shorter run in the same folder
        raise NoResult(f"unfinished: results.json is of epoch {ended}, the configuration says {epochs}")
    found: dict[str, Any] = results
    return found


def _unfinished(run: FoundRun) -> str:
    text = "unfinished: no results.json"
    epochs = [row["epoch"] for row in run.rows if row.get("kind") == "step" and isinstance(row.get("epoch"), int)]
    if epochs:  # counted from 0
        text += f", last logged in epoch {max(epochs) + 1} of {run.config.train.epochs}"
    log = log_file(run.folder)
    if log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines[-20:] if line.startswith("error: ")]
        text += f"; {errors[-1]}" if errors else ""
    return text


def log_file(folder: Path) -> Path:
    """Where the output of the training command goes that fills a run folder: beside it."""
    return folder.with_name(f"{folder.name}.log")


def _best_by_validation(run: FoundRun, results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The evaluation of the test classes in the epoch that is best on the validation classes."""
    best = results.get("best_validation")
    if not best:
        raise NoResult("has no validation classes (data.validation is 0), so no epoch is best by them")
    rows = [row for row in run.rows if row.get("kind") == "evaluation" and row.get("split") == "test"]
    found: list[Mapping[str, Any]] = [row for row in rows if row.get("epoch") == best.get("epoch")]
    if not found:
        raise NoResult(f"damaged: {METRICS_FILE} has no evaluation of epoch {best.get('epoch')}")
    return found[-1]


def _is_percentage(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 100


def measured_seconds(run: FoundRun) -> dict[str, float]:
    """Seconds per iteration of training (median of the logged means), and of inference where it was measured."""
    found = {}
    steps = [row.get("step_seconds") for row in run.rows if row.get("kind") == "step"]
    seconds = [float(value) for value in steps if isinstance(value, (int, float)) and math.isfinite(value)]
    if seconds:
        found["train_seconds"] = statistics.median(seconds)
    try:
        timing = json.loads((run.folder / TIMING_FILE).read_text(encoding="utf-8"))
        found["inference_seconds"] = float(timing["seconds_per_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured
    return found
