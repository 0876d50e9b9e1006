"""Finished runs of a table, by their settings: what each cell has, and what is missing."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gcahng.tables.found_runs import FoundRun, NoResult, find_runs, measured_seconds, read_evaluation
from gcahng.tables.plan import Cell, Plan
from gcahng.tables.settings import compared_settings


@dataclass(frozen=True)
class SeedResult:
    """A finished run.

    Attributes:
        seed: Its seed.
        folder: Where it lies.
        epoch: Of the evaluation that counts.
        values: By metric, in percent or seconds; a metric that the run did not report is missing.
    """

    seed: int
    folder: Path
    epoch: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class CellResult:
    """What there is for a row on a data set.

    Attributes:
        cell: The cell.
        results: Finished runs, one for each seed that has one, in order of the plan.
        notes: Folders of this experiment that are not counted, and why.
    """

    cell: Cell
    results: tuple[SeedResult, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> list[int]:
        """Seeds without a finished run."""
        done = {result.seed for result in self.results}
        return [run.seed for run in self.cell.planned if run.seed not in done]

    def values(self, metric: str) -> list[float]:
        """Of all runs that report it."""
        return [result.values[metric] for result in self.results if metric in result.values]

    def mean(self, metric: str) -> float | None:
        """Over seeds; None where no run reports it."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Collected:
    """A table with what has been run of it.

    Attributes:
        plan: The table.
        which: Which evaluation of each run counts.
        cells: In the plan's order.
        unreadable: Run folders whose configuration cannot be used: they may be anything.
    """

    plan: Plan
    which: str
    cells: tuple[CellResult, ...]
    unreadable: tuple[str, ...] = ()

    def of_data_set(self, name: str) -> list[CellResult]:
        """The cells of one data set, in order of the rows."""
        return [found for found in self.cells if found.cell.data_set == name]


def collect(plan: Plan, roots: Sequence[Path], which: str | None = None) -> Collected:
    """Look for the runs of a table.

    Args:
        plan: The table.
        roots: Folders to search, with all below them; the plan's own `out` is searched as well.
        which: Which evaluation of a run counts, of `gcahng.tables.spec.WHICH`; None: as the table says.
    """
    which = which or plan.table.which
    runs, unreadable = find_runs([*roots, plan.choice.out])
    cells = tuple(_result(cell, runs, which) for cell in plan.cells)
    return Collected(plan, which, cells, tuple(unreadable))


def _result(cell: Cell, runs: Sequence[FoundRun], which: str) -> CellResult:
    if cell.config is None:
        return CellResult(cell)
    expected = compared_settings(cell.config)
    same = [run for run in runs if run.settings == expected]
    notes = []
    by_seed: dict[int, list[SeedResult]] = {}
    for run in same:
        if not run.trained_on(cell.config.data.dir):
            notes.append(f"{run.folder}: trained on other data than {cell.config.data.dir} (by manifest or folder)")
            continue
        try:
            epoch, columns = read_evaluation(run, which)
        except NoResult as reason:
            notes.append(f"{run.folder}: {reason}")
            continue
        columns |= measured_seconds(run)
        values = {name: columns[name] for name in cell.metrics if name in columns}
        lacking = [name for name in cell.metrics if name not in columns]
        if lacking:
            notes.append(f"{run.folder}: has no {', '.join(lacking)}")
        by_seed.setdefault(run.config.seed, []).append(SeedResult(run.config.seed, run.folder, epoch, values))
    results = []
    for planned in cell.planned:
        found = by_seed.pop(planned.seed, [])
        # Of several, the one in the folder that the plan names, else the first.
        found.sort(key=lambda result: result.folder.resolve() != planned.folder.resolve())
        results += found[:1]
        notes += [f"{other.folder}: seed {other.seed} again; {found[0].folder} is counted" for other in found[1:]]
    extra = sorted(by_seed)
    if extra:
        listed = ", ".join(map(str, extra))
        notes.append(f"seeds {listed} are finished too, and not among those of the table (--seeds counts them)")
    return CellResult(cell, tuple(results), tuple(notes))
