"""Rows of results: how benchmarks print them and write them to files."""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import machine


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: What was measured, device, precision and size included.
        value: The figure; None if it was not measured.
        unit: Of the value.
        ratio: The yardstick's value over ours, or what the benchmark's description says; None if there is none.
        floor: Least value that the machine allows, in the same unit; None if it is not known.
        share_of_floor: floor / value, at most 1 in theory.
        note: What else there is to say: why a figure is missing, what it was made with.
    """

    name: str
    value: float | None
    unit: str
    ratio: float | None
    floor: float | None = None
    share_of_floor: float | None = None
    note: str = ""

    def line(self) -> str:
        """For people."""
        value = "not run" if self.value is None else f"{self.value:.4g} {self.unit}"
        ratio = "" if self.ratio is None else f"ratio {self.ratio:.2f}"
        floor = "" if self.floor is None else f"floor {self.floor:.3g} {self.unit}"
        share = "" if self.share_of_floor is None else f"reached {self.share_of_floor:.0%}"
        return f"{self.name:<72} {value:>13}  {ratio:<11} {floor:<15} {share:<12} {self.note}".rstrip()


def write_rows(path: Path, rows: list[Row]) -> None:
    """The rows alone, a JSON list of objects."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def write_results(path: Path, rows: list[Row], device: str) -> None:
    """The rows with machine, versions, date, commit and command: a file of `benchmarks/results/`."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": machine.commit(),
        "machine": machine.describe(device),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
