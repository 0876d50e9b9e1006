"""From a table to its runs: configuration, overrides, seeds and folders."""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gcahng.errors import ConfigError
from gcahng.tables.published import published_values
from gcahng.tables.settings import differing, experiment_digest, local_manifest
from gcahng.tables.spec import Part, Row, Table
from gcahng.training.config import Config, load_config

DEFAULT_OUT = Path("runs/tables")


@dataclass(frozen=True)
class Choice:
    """What of a table is wanted, and how its runs differ from what the spec says.

    Attributes:
        rows: Names or parts of labels; empty: all.
        data_sets: Empty: all.
        seeds: None: those of the spec.
        data: Folders of data sets by name.
        settings: `section.key=value` for all runs, after everything else.
        out: Where new runs go.
    """

    rows: Sequence[str] = ()
    data_sets: Sequence[str] = ()
    seeds: Sequence[int] | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[str] = ()
    out: Path = DEFAULT_OUT


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Attributes:
        seed: Its seed.
        folder: Where it goes if it is run.
        arguments: Of launch/train.py.
    """

    seed: int
    folder: Path
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A row on one data set: runs that differ in their seed alone.

    Attributes:
        row: The row.
        data_set: Its name in the table.
        metrics: Columns.
        published: A text for each metric, None where the paper has nothing.
        where: The table that the published numbers stand in; "" where there are none.
        incomparable: Why runs of this cell cannot be set beside the published numbers; empty: they can.
        file: Configuration; None for rows that are never run.
        overrides: For it, those of the user included.
        config: The result, but for seed and folder.
        planned: Its runs.
    """

    row: Row
    data_set: str
    metrics: tuple[str, ...]
    published: tuple[str | None, ...]
    where: str
    incomparable: tuple[str, ...] = ()
    file: Path | None = None
    overrides: tuple[str, ...] = ()
    config: Config | None = None
    planned: tuple[PlannedRun, ...] = ()

    @property
    def title(self) -> str:
        """Row and data set."""
        return f"{self.row.label} on {self.data_set}"


@dataclass(frozen=True)
class Plan:
    """A table, as far as it is wanted.

    Attributes:
        table: The table.
        cells: Row by row.
        choice: What was asked for.
    """

    table: Table
    cells: tuple[Cell, ...]
    choice: Choice

    def of_data_set(self, name: str) -> list[Cell]:
        """The cells of one data set, in order of the rows."""
        return [cell for cell in self.cells if cell.data_set == name]


def make_plan(table: Table, choice: Choice) -> Plan:
    """Expand a table.

    Raises:
        ConfigError: Rows, data sets or settings that are asked for do not exist; a configuration cannot be used or
            does not report a metric of the table; or a row's published numbers are not there.
    """
    rows = _chosen_rows(table, choice.rows)
    for kind, names in (("--data-sets", choice.data_sets), ("--data", list(choice.data))):
        unknown = [name for name in names if name not in table.data_sets]
        if unknown:
            raise ConfigError(
                f"{kind} names {', '.join(unknown)}, which table {table.name} has not: expected some of "
                f"{', '.join(table.data_sets)}."
            )
    wanted = [name for name in table.data_sets if not choice.data_sets or name in choice.data_sets]
    seeds = choice.seeds
    if seeds is not None and (len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0):
        raise ConfigError(f"--seeds must be different numbers from 0 on: got {' '.join(map(str, seeds))}.")
    cells: list[Cell] = []
    faults: dict[str, list[str]] = {}  # one fault is often that of many cells
    for row in rows:
        for data_set in wanted:
            if data_set in row.data_sets:
                try:
                    cells.append(_cell(table, row, data_set, choice))
                except ConfigError as error:
                    faults.setdefault(str(error), []).append(f"{row.label} on {data_set}")
    if faults:
        count = sum(map(len, faults.values()))
        listed = "\n".join(f"{_few(titles)}: {text}" for text, titles in faults.items())
        raise ConfigError(f"Table `{table.path}`, {count} of its cells cannot be planned:\n{listed}")
    return Plan(table, tuple(cells), choice)


def _few(titles: Sequence[str]) -> str:
    return titles[0] if len(titles) == 1 else f"{titles[0]} and {len(titles) - 1} more"


def _chosen_rows(table: Table, names: Sequence[str]) -> list[Row]:
    """Rows by name or label; where none is called so, those whose label holds the text, case aside."""
    if not names:
        return list(table.rows)
    chosen: set[str] = set()
    for name in names:
        exact = [row.label for row in table.rows if name in (row.name, row.label)]
        found = exact or [row.label for row in table.rows if name.casefold() in row.label.casefold()]
        if not found:
            listed = "; ".join(row.label for row in table.rows)
            raise ConfigError(f"No row of table {table.name} is called `{name}`. It has: {listed}.")
        chosen.update(found)
    return [row for row in table.rows if row.label in chosen]


def _cell(table: Table, row: Row, data_set: str, choice: Choice) -> Cell:
    metrics = table.metrics[data_set]
    published, where = published_values(table, row, data_set)
    if not row.runs:
        return Cell(row, data_set, metrics, published, where)
    parts = (table.part, table.models.get(row.model, Part()), table.losses.get(row.loss, Part()), row.part)
    name = next(part.config for part in (row.part, *parts[::-1]) if part.config)
    file = _shown(table.path.parent / name.replace("{data_set}", data_set))
    overrides = _scaled(file, _overrides(parts, data_set), parts)
    as_written = _load(file, tuple(overrides))
    if data_set in choice.data:
        overrides.append(f"data.dir={json.dumps(choice.data[data_set], ensure_ascii=False)}")
    overrides += choice.settings
    config = _load(file, tuple(overrides))
    _check_metrics(metrics, config)
    seeds = row.seeds if choice.seeds is None else tuple(choice.seeds)
    folder = choice.out / f"{file.stem}-{experiment_digest(config)}"
    incomparable = tuple(_incomparable(as_written, config, data_set, where))
    planned = tuple(_planned(file, overrides, seed, folder / f"seed-{seed}") for seed in seeds)
    return Cell(row, data_set, metrics, published, where, incomparable, file, tuple(overrides), config, planned)


@functools.cache  # rows and tables name the same ones again and again
def _load(file: Path, overrides: tuple[str, ...]) -> Config:
    return load_config(file, overrides)


def _overrides(parts: Sequence[Part], data_set: str) -> list[str]:
    return [text for part in parts for text in (*part.overrides, *part.for_data_set.get(data_set, ()))]


def _shown(file: Path) -> Path:
    """Without `..`, and relative where it lies below the current folder."""
    file = Path(os.path.normpath(file.absolute()))
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def _scaled(file: Path, overrides: list[str], parts: Sequence[Part]) -> list[str]:
    """The overrides, and one more for each setting that a part scales."""
    factors: dict[str, float] = {}
    for part in parts:
        for key, factor in part.scale.items():
            factors[key] = factors.get(key, 1.0) * factor
    if not factors:
        return overrides
    config = _load(file, tuple(overrides))
    scaled = list(overrides)
    for key, factor in factors.items():
        try:
            value: Any = functools.reduce(getattr, key.split("."), config)
        except AttributeError:
            raise ConfigError(f"`scale` names `{key}`, which is no setting.") from None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"`scale` names `{key}`, which is no number: {value!r}.")
        # 60 / 3 is 20, not 19.999999999999996.
        scaled.append(f"{key}={float(f'{value * factor:.12g}')!r}")
    return scaled


def _check_metrics(metrics: Sequence[str], config: Config) -> None:
    for letter, key, ks in (("R", "eval.ks", config.eval.ks), ("P", "eval.precision_ks", config.eval.precision_ks)):
        wanted = [int(found[1]) for name in metrics if (found := re.fullmatch(rf"{letter}@(\d+)", name))]
        missing = sorted(set(wanted) - set(ks))
        if missing:
            raise ConfigError(
                f"`{key}` lacks {missing}, which the table shows: got {list(ks)}. Add it to the overrides of the table."
            )


def _incomparable(as_written: Config, config: Config, data_set: str, where: str) -> Iterator[str]:
    """Why a run of this configuration is not what the spec's published numbers are about."""
    if not where:
        return
    changed = differing(as_written, config)
    if changed:
        yield f"{', '.join(changed)} not as in the table"
    manifest = local_manifest(config.data.dir)
    if manifest is not None and manifest[0] != data_set:
        yield f"{config.data.dir} holds {manifest[0]}, not {data_set}"


def _planned(file: Path, overrides: Sequence[str], seed: int, folder: Path) -> PlannedRun:
    # An interrupted run goes on; where there is none, a new one begins.
    own: dict[str, Any] = {"seed": seed, "run.dir": str(folder), "train.resume": "auto"}
    texts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items()]
    return PlannedRun(seed, folder, ("--config", str(file), "--quiet", *overrides, *texts))
