"""What a run tells: `metrics.jsonl` (one object per logged step and evaluation), `hardness.jsonl` (one object per
recorded step, see `gcahng.training.hardness`) and TensorBoard. Rank 0 writes.

A value is one of all ranks together unless its name ends in `_local`, which is rank 0's alone. Losses are of the global
batch, evaluations of all images, counts (`skipped_images`, `repaired_draws`) are sums over ranks, and times
(`step_seconds`, `data_seconds`) are the slowest rank's. `samples` is a checksum of the global batch's rows in order:
runs that draw the same samples show the same, whatever their number of ranks.

A full disk ends no training: what it refuses is kept in memory and written when there is room, once and in order.
Checkpoints hold the rows that wait, so that a run that is killed then has them after its resume.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gcahng.errors import TrainingError
from gcahng.training.appended_file import AppendedFile
from gcahng.training.event_file import EventFile

METRICS_FILE = "metrics.jsonl"
HARDNESS_FILE = "hardness.jsonl"


class RunLog:
    """Appends rows to a run folder's logs; use as a context manager."""

    def __init__(
        self,
        run_dir: Path,
        *,
        from_step: int | None = None,
        evaluated: bool = True,
        unwritten: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """
        Args:
            run_dir: Run folder.
            from_step: Continue a run at this step: rows of later steps are dropped. None starts anew.
            evaluated: False drops evaluations of that very step too: they are made again.
            unwritten: What `unwritten` gave when the run was at that step; those that are in the files since then
                are not added again.
        Raises:
            TrainingError: The files cannot be written.
        """
        self.path = run_dir / METRICS_FILE
        missed = {} if unwritten is None else unwritten
        try:
            again = () if evaluated else ("evaluation",)
            rows, late_rows = _cut_back(self.path, from_step, missed.get(METRICS_FILE, ()), again)
            hardness = run_dir / HARDNESS_FILE
            hardness_rows, late_hardness = _cut_back(hardness, from_step, missed.get(HARDNESS_FILE, ()))
            _replace(self.path, rows)
            _replace(hardness, hardness_rows)
            _await_next_second(run_dir / "tensorboard")
            self._files = {name: AppendedFile(run_dir / name) for name in (METRICS_FILE, HARDNESS_FILE)}
            self._board = EventFile(run_dir / "tensorboard", 0 if from_step is None else from_step + 1)
        except OSError as error:
            raise TrainingError(f"The logs of {run_dir} cannot be written ({error}): make room.") from error
        for row in late_rows:
            self._show(row)
        for row in late_hardness:
            self._show(row | {"kind": "hardness"})

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One row: {"kind": ..., "step": ..., values}.

        Fractional numbers go to TensorBoard too, as kind/name, or kind/split/name where a row has a split.
        """
        row = {"kind": kind, "step": step} | {name: _plain(value) for name, value in values.items()}
        self._files[METRICS_FILE].append(_line(row))
        self._show(row)

    def write_hardness(self, step: int, values: Mapping[str, Any]) -> None:
        """One row {"step": ..., values} of `hardness.jsonl`; fractional numbers go to TensorBoard as hardness/name."""
        row = {"step": step} | dict(values)
        self._files[HARDNESS_FILE].append(_line(row))
        self._show(row | {"kind": "hardness"})

    def _show(self, row: Mapping[str, Any]) -> None:
        group = f"{row['kind']}/{row['split']}" if "split" in row else row["kind"]
        curves = {f"{group}/{name}": value for name, value in row.items() if isinstance(value, float)}
        self._board.add_scalars(curves, row["step"])

    def unwritten(self) -> dict[str, list[str]]:
        """The rows that the disk still refuses, as they stand in the file, by file; files without any are left out."""
        for file in self._files.values():
            file.flush()
        return {name: [line.decode() for line in file.waiting] for name, file in self._files.items() if file.waiting}

    def sync(self) -> None:
        """Have the rows on the disk; any thread may call it."""
        for file in self._files.values():
            file.sync()

    def finish(self) -> None:
        """The run has ended: all rows must be in the files.

        Raises:
            TrainingError: The disk still refuses some.
        """
        waiting = self.unwritten()
        if waiting:
            counts = ", ".join(f"{len(rows)} rows of {self.path.with_name(name)}" for name, rows in waiting.items())
            raise TrainingError(
                f"{counts} cannot be written, but training has ended and its last checkpoint holds them. Make room, "
                "then start the run again with train.resume=auto: it writes them and ends."
            )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (*self._files.values(), self._board):
            file.close()


class NoLog:
    """What a rank that is not the first has in place of a `RunLog`."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Rank 0 writes."""

    def write_hardness(self, step: int, values: Mapping[str, Any]) -> None:
        """Rank 0 writes."""

    def unwritten(self) -> dict[str, list[str]]:
        """Rank 0 writes."""
        return {}

    def sync(self) -> None:
        """Rank 0 writes."""

    def finish(self) -> None:
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


def _cut_back(
    path: Path, from_step: int | None, missed: Sequence[str], again: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a file up to `from_step`, none if that is None, and those of `missed` that they lack.

    Rows of that very step whose kind is in `again` are left out.
    """
    rows = [] if from_step is None else read_rows(path)
    kept = [
        row for row in rows if row["step"] < from_step or (row["step"] == from_step and row.get("kind") not in again)
    ]
    late = [row for row in map(json.loads, missed) if row not in kept]
    return kept + late, late


def _replace(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Make a file hold these rows, in one move."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(b"".join(_line(row) for row in rows))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of such a file; a last line that a crash cut is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity; they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
