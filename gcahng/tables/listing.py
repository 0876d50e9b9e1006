"""The runs of a table as a list: what is run how, where, and whether it has been."""

import shlex
from collections.abc import Sequence

from gcahng.tables.collect import CellResult, Collected
from gcahng.tables.spec import Table
from gcahng.training.checkpoint import newest_checkpoint


def list_text(tables: Sequence[Table]) -> str:
    """A line for each table."""
    lines = []
    width = max(len(table.name) for table in tables)
    for table in tables:
        cells = [(row, data_set) for row in table.rows for data_set in row.data_sets if row.runs]
        runs = sum(len(row.seeds) for row, _ in cells)
        lines.append(f"{table.name:{width}}  {runs:4} runs  {table.title}")
    return "\n".join(lines)


def plan_text(collected: Collected) -> str:
    """Every cell with its configuration and overrides, and every run of it."""
    runs = [run for found in collected.cells for run in found.cell.planned]
    missing = sum(len(found.missing) for found in collected.cells)
    lines = [collected.plan.table.title, f"{len(runs)} runs, {missing} missing"]
    for found in collected.cells:
        lines += ["", *_cell_lines(found)]
    return "\n".join(lines)


def _cell_lines(found: CellResult) -> list[str]:
    cell = found.cell
    if cell.file is None:
        return [f"{cell.title}: as published, never run"]
    lines = [f"{cell.title}: {' '.join([str(cell.file), *map(shlex.quote, cell.overrides)])}"]
    done = {result.seed: result.folder for result in found.results}
    for run in cell.planned:
        state = "done" if run.seed in done else "begun" if newest_checkpoint(run.folder) else "missing"
        lines.append(f"  {state:7}  seed {run.seed}  {done.get(run.seed, run.folder)}")
    return [*lines, *(f"  not counted: {note}" for note in found.notes)]
