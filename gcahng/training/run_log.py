"""What a run tells: `metrics.jsonl` (one object per logged step and evaluation), `hardness.jsonl` (one object per
recorded step, see `gcahng.training.hardness`) and TensorBoard. Rank 0 writes.

A value is one of all ranks together unless its name ends in `_local`, which is rank 0's alone. Losses are of the global
batch, evaluations of all images, counts (`skipped_images`, `repaired_draws`) are sums over ranks, and times
(`step_seconds`, `data_seconds`) are the slowest rank's. `samples` is a checksum of the global batch's rows in order:
runs that draw the same samples show the same, whatever their number of ranks.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
HARDNESS_FILE = "hardness.jsonl"


class RunLog:
    """Appends rows to a run folder's logs; use as a context manager."""

    def __init__(self, run_dir: Path, *, from_step: int | None = None, evaluated: bool = True) -> None:
        """
        Args:
            run_dir: Run folder.
            from_step: Continue a run at this step: rows of later steps are dropped. None starts anew.
            evaluated: False drops evaluations of that very step too: they are made again.
        """
        self.path = run_dir / METRICS_FILE
        self._file = _continued(self.path, from_step, evaluated=evaluated)
        self._hardness_file = _continued(run_dir / HARDNESS_FILE, from_step)
        # TensorBoard hides what earlier files of the folder hold from `purge_step` on.
        first_step = 0 if from_step is None else from_step + 1
        _await_next_second(run_dir / "tensorboard")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One row: {"kind": ..., "step": ..., values}.

        Fractional numbers go to TensorBoard too, as kind/name, or kind/split/name where a row has a split.
        """
        row = {"kind": kind, "step": step} | {name: _plain(value) for name, value in values.items()}
        _append(self._file, row)
        self._show(f"{kind}/{row['split']}" if "split" in row else kind, row)

    def write_hardness(self, step: int, values: Mapping[str, Any]) -> None:
        """One row {"step": ..., values} of `hardness.jsonl`; fractional numbers go to TensorBoard as hardness/name."""
        row = {"step": step} | dict(values)
        _append(self._hardness_file, row)
        self._show("hardness", row)

    def _show(self, group: str, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{group}/{name}", value, row["step"])

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._hardness_file.close()
        self._board.close()


class NoLog:
    """What a rank that is not the first has in place of a `RunLog`."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Rank 0 writes."""

    def write_hardness(self, step: int, values: Mapping[str, Any]) -> None:
        """Rank 0 writes."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is open."""


def beside_the_bar(values: Mapping[str, float]) -> dict[str, str]:
    """What a progress bar shows of a logged step: its loss and, where negatives are generated, the pull factor."""
    shown = {"loss": f"{values['total_loss']:.3f}"}
    return shown | ({"pull": f"{values['pull_factor']:.3g}"} if "pull_factor" in values else {})


def _await_next_second(folder: Path) -> None:
    """Wait until a new event file sorts behind those of `folder`.

    TensorBoard reads event files by name, that is by the second in which they were begun; two of one second may come
    in the wrong order, and then steps that the later one hides stay hidden.
    """
    stamps = [f.name.split(".")[3] for f in folder.glob("events.out.tfevents.[0-9]*")]
    begun = [int(stamp) for stamp in stamps if stamp.isdigit()]
    patience = time.monotonic() + 2.0  # a clock that was set back does not stop the run
    while begun and int(time.time()) <= max(begun) and time.monotonic() < patience:
        time.sleep(0.02)


def _continued(path: Path, from_step: int | None, *, evaluated: bool = True) -> TextIO:
    """A file of rows, open at its end: without rows of later steps than `from_step`, empty if that is None."""
    rows = [] if from_step is None else read_rows(path)
    again = () if evaluated else ("evaluation",)
    kept = [
        row for row in rows if row["step"] < from_step or (row["step"] == from_step and row.get("kind") not in again)
    ]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(path)
    return open(path, "a", encoding="utf-8")


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of such a file; a last line that a crash cut is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity; they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
