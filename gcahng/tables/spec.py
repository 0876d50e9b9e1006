"""What a table consists of, as its YAML file says (docs/tables.md): rows, data sets, metrics, seeds."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from gcahng.errors import ConfigError
from gcahng.training.config_types import show
from gcahng.training.config_yaml import read_yaml

WHICH = ("best_test", "last", "best")
METRIC = re.compile(r"R@[1-9]\d*|P@[1-9]\d*|RP|MAP@R|MRR|train_seconds|inference_seconds")
DEFAULT_SEEDS = (0, 1, 2)
PLANNED = ("seed", "run.dir", "train.resume")
"""Settings that the plan of a table gives each run itself."""
_TABLE_KEYS = (
    "title", "paper", "table", "config", "overrides", "data_sets", "metrics", "seeds", "which", "models", "losses",
    "rows",
)  # fmt: skip
_PART_KEYS = ("title", "config", "overrides", "for_data_set", "scale")
_ROW_KEYS = (
    "name", "model", "loss", "config", "overrides", "for_data_set", "scale", "data_sets", "seeds", "run", "published",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Settings that rows share.

    Attributes:
        title: What a model is called in the printed table; None: by its key.
        config: Configuration file, relative to the spec, with `{data_set}` for the data set's name.
        overrides: `section.key=value`, in order.
        for_data_set: More of them by data set.
        scale: Factors on settings, by their dotted keys.
    """

    title: str | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()
    for_data_set: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: As published.
        model, loss: Labels, and keys of the table's `models` and `losses`; "" where there is none.
        part: The row's own settings.
        data_sets: Where the row has numbers.
        seeds: Of its runs.
        runs: False for rows that are shown as published and never run.
        method: What the row is called in the file of published numbers; None: nothing is looked up.
        values: Published numbers that stand in the spec, by data set, in the order of the metrics.
        model_title: What the model is called in the printed table; None: by its label.
    """

    name: str
    model: str
    loss: str
    part: Part
    data_sets: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: bool
    method: str | None
    values: Mapping[str, tuple[str | None, ...]]
    model_title: str | None = None

    @property
    def label(self) -> str:
        """Name with model and loss: different for all rows of a table."""
        labels = ", ".join(text for text in (self.model_title or self.model, self.loss) if text)
        return f"{self.name} ({labels})" if labels else self.name


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Of the spec's file.
        path: The spec.
        title: One line.
        paper: Where published numbers are looked up, see `gcahng.tables.published`; None: nowhere.
        table: The paper's table that the numbers in the spec stand in.
        part: Settings of all rows.
        data_sets: In the order of the table.
        metrics: By data set.
        which: Which evaluation of a run counts, of `WHICH`.
        models, losses: Settings by label.
        rows: In the order of the table.
    """

    name: str
    path: Path
    title: str
    paper: str | None
    table: str | None
    part: Part
    data_sets: tuple[str, ...]
    metrics: Mapping[str, tuple[str, ...]]
    which: str
    models: Mapping[str, Part]
    losses: Mapping[str, Part]
    rows: tuple[Row, ...]


def read_table(path: Path) -> Table:
    """Read and check a spec; the configurations that it names are not opened.

    Raises:
        ConfigError: The file cannot be read; or it has faults, which the message lists, each with its place.
    """
    tree, repeated = read_yaml(path)
    reader = _Reader(list(repeated))
    table = reader.table(tree, path)
    if reader.faults:
        listing = "\n".join(f"  {fault}" for fault in reader.faults)
        count = len(reader.faults)
        raise ConfigError(f"Table `{path}` has {count} fault{'s' * (count > 1)}:\n{listing}\nSee docs/tables.md.")
    return table


class _Reader:
    """Turns YAML into a table and gathers what is wrong with it; where something is, a stand-in goes on."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        self.data_sets: tuple[str, ...] = ()

    def table(self, tree: Mapping[str, Any], path: Path) -> Table:
        self._keys(tree, _TABLE_KEYS, "")
        data_sets = self.data_sets = self._texts(tree, "data_sets", "")
        for key in ("title", "rows", "data_sets", "metrics"):
            if not tree.get(key):
                self._fault(key, "required and missing")
        which = tree.get("which", WHICH[0])
        if which not in WHICH:
            self._fault("which", f"must be one of {', '.join(WHICH)}: got {show(which)}")
        found = Table(
            name=path.stem,
            path=path,
            title=self._text(tree, "title", "") or path.stem,
            paper=self._text(tree, "paper", ""),
            table=self._text(tree, "table", ""),
            part=Part(config=self._text(tree, "config", ""), overrides=self._overrides(tree, "")),
            data_sets=data_sets,
            metrics=self._metrics(tree.get("metrics"), data_sets),
            which=which,
            models=self._parts(tree, "models"),
            losses=self._parts(tree, "losses"),
            rows=(),
        )
        seeds = self._seeds(tree, "", DEFAULT_SEEDS)
        listed = tree.get("rows") or []
        if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
            self._fault("rows", f"must be a list of mappings: got {show(listed)}")
            listed = []
        rows = tuple(self._row(entry, number, found, seeds) for number, entry in enumerate(listed, 1))
        labels = [row.label for row in rows]
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            self._fault("rows", f"`{label}` stands {labels.count(label)} times; name, model and loss tell rows apart")
        return Table(**(vars(found) | {"rows": rows}))

    def _row(self, tree: Mapping[str, Any], number: int, table: Table, seeds: tuple[int, ...]) -> Row:
        where = f"rows[{number}]"
        self._keys(tree, _ROW_KEYS, where)
        name = self._text(tree, "name", where) or ""
        if not name:
            self._fault(f"{where}.name", "required and missing")
        runs = tree.get("run", True)
        if not isinstance(runs, bool):
            self._fault(f"{where}.run", f"must be true or false: got {show(runs)}")
        data_sets = self._texts(tree, "data_sets", where) or table.data_sets
        for unknown in sorted(set(data_sets) - set(table.data_sets)):
            self._fault(f"{where}.data_sets", f"`{unknown}` is none of the table's: {', '.join(table.data_sets)}")
        part = self._part(tree, where)
        labels = {}
        for key, parts in (("model", table.models), ("loss", table.losses)):
            labels[key] = self._text(tree, key, where) or ""
            if labels[key] and parts and labels[key] not in parts:
                known = ", ".join(parts)
                self._fault(f"{where}.{key}", f"`{labels[key]}` is none of the table's {key}s: {known}")
        configs = (part, table.models.get(labels["model"], Part()), table.losses.get(labels["loss"], Part()))
        if runs and not any(entry.config for entry in (*configs, table.part)):
            self._fault(f"{where}.config", "required and missing: neither the row nor its model nor the table has one")
        method, values = self._published(tree, where, name, table, data_sets)
        model = table.models.get(labels["model"], Part())
        return Row(
            name=name,
            model=labels["model"],
            loss=labels["loss"],
            part=part,
            data_sets=data_sets,
            seeds=self._seeds(tree, where, seeds),
            runs=bool(runs),
            method=method,
            values=values,
            model_title=model.title,
        )

    def _published(
        self, tree: Mapping[str, Any], where: str, name: str, table: Table, data_sets: Sequence[str]
    ) -> tuple[str | None, dict[str, tuple[str | None, ...]]]:
        """The name to look up, and numbers given here."""
        entry = tree.get("published")
        key = f"{where}.published"
        default = name if table.paper else None
        if entry is None:
            return default, {}
        if isinstance(entry, str):
            if entry != "none" and not table.paper:
                self._fault(key, "names a published row, but the table has no `paper`")
            return (None if entry == "none" else entry), {}
        values: dict[str, tuple[str | None, ...]] = {}
        for data_set, numbers in entry.items() if isinstance(entry, Mapping) else [("", None)]:
            metrics = table.metrics.get(data_set, ())
            if data_set not in data_sets or not isinstance(numbers, list) or len(numbers) != len(metrics):
                wanted = "`none`, a row's name, or by data set of the row a list with one entry per metric"
                self._fault(key, f"must be {wanted}: got {show(entry)}")
                break
            values[data_set] = tuple(None if number is None else str(number) for number in numbers)
        return default, values

    def _metrics(self, entry: Any, data_sets: Sequence[str]) -> dict[str, tuple[str, ...]]:
        by_set = entry if isinstance(entry, Mapping) else dict.fromkeys(data_sets, entry)
        for data_set in sorted(set(data_sets) ^ set(by_set)):
            self._fault(f"metrics.{data_set}", f"must be given for the data sets {', '.join(data_sets)}")
        found = {}
        for data_set in data_sets:
            names = by_set.get(data_set) or []
            if not isinstance(names, list) or not all(isinstance(n, str) and METRIC.fullmatch(n) for n in names):
                wanted = "R@k, P@k, RP, MAP@R, MRR, train_seconds, inference_seconds"
                self._fault("metrics", f"must be a list of {wanted}: got {show(names)}")
                names = []
            found[data_set] = tuple(names)
        return found

    def _parts(self, tree: Mapping[str, Any], key: str) -> dict[str, Part]:
        entry = tree.get(key) or {}
        if not isinstance(entry, Mapping):
            self._fault(key, f"must be a mapping of names to settings: got {show(entry)}")
            return {}
        found = {}
        for name, settings in entry.items():
            where = f"{key}.{name}"
            if not isinstance(settings or {}, Mapping):
                self._fault(where, f"must be a mapping: got {show(settings)}")
                continue
            self._keys(settings or {}, _PART_KEYS, where)
            found[str(name)] = self._part(settings or {}, where)
        return found

    def _part(self, tree: Mapping[str, Any], where: str) -> Part:
        return Part(
            self._text(tree, "title", where),
            self._text(tree, "config", where),
            self._overrides(tree, where),
            self._for_data_set(tree, where),
            self._scale(tree, where),
        )

    def _overrides(self, tree: Mapping[str, Any], where: str) -> tuple[str, ...]:
        entry = tree.get("overrides") or []
        key = _joined(where, "overrides")
        if isinstance(entry, Mapping):
            entry = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in entry.items()]
        if not isinstance(entry, list) or not all(isinstance(text, str) and "=" in text for text in entry):
            self._fault(key, f"must be a list of section.key=value, or a mapping: got {show(entry)}")
            return ()
        for text in entry:
            if text.partition("=")[0].strip() in PLANNED:
                self._fault(key, f"{', '.join(PLANNED)} are given to each run by the plan: got {text}")
        return tuple(entry)

    def _for_data_set(self, tree: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
        entry = tree.get("for_data_set") or {}
        key = _joined(where, "for_data_set")
        if not isinstance(entry, Mapping):
            self._fault(key, f"must be a mapping of data sets to overrides: got {show(entry)}")
            return {}
        for unknown in sorted(set(entry) - set(self.data_sets)):
            self._fault(key, f"`{unknown}` is none of the table's data sets: {', '.join(self.data_sets)}")
        return {name: self._overrides({"overrides": texts}, f"{key}.{name}") for name, texts in entry.items()}

    def _scale(self, tree: Mapping[str, Any], where: str) -> dict[str, float]:
        entry = tree.get("scale") or {}
        try:
            found = {str(name): float(Fraction(str(factor))) for name, factor in entry.items()}
        except (AttributeError, ValueError, ZeroDivisionError):
            wanted = "must be a mapping of settings to factors such as 10, 0.1 or 1/3"
            self._fault(_joined(where, "scale"), f"{wanted}: got {show(entry)}")
            return {}
        return found

    def _seeds(self, tree: Mapping[str, Any], where: str, default: tuple[int, ...]) -> tuple[int, ...]:
        entry = tree.get("seeds")
        if entry is None:
            return default
        if (
            not isinstance(entry, list)
            or not entry
            or len(set(entry)) < len(entry)
            or not all(type(seed) is int and seed >= 0 for seed in entry)
        ):
            self._fault(_joined(where, "seeds"), f"must be a list of different numbers from 0 on: got {show(entry)}")
            return default
        return tuple(entry)

    def _texts(self, tree: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
        entry = tree.get(key) or []
        fits = isinstance(entry, list) and all(isinstance(text, str) and text for text in entry)
        if not fits or len(set(entry)) < len(entry):
            self._fault(_joined(where, key), f"must be a list of different names: got {show(entry)}")
            return ()
        return tuple(entry)

    def _text(self, tree: Mapping[str, Any], key: str, where: str) -> str | None:
        entry = tree.get(key)
        if entry is None or isinstance(entry, str):
            return entry
        if type(entry) in (int, float):  # `table: 3`
            return str(entry)
        self._fault(_joined(where, key), f"must be a text: got {show(entry)}")
        return None

    def _keys(self, tree: Mapping[str, Any], known: Sequence[str], where: str) -> None:
        for key in tree:
            if key not in known:
                self._fault(_joined(where, str(key)), f"unknown key; known here: {', '.join(known)}")

    def _fault(self, key: str, text: str) -> None:
        self.faults.append(f"{key}: {text}.")


def _joined(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def find_table(name: str, folder: Path) -> Path:
    """The spec of a table: a file, or a name in a folder ("3" stands for "table3").

    Args:
        name: Path of a spec, or its name without `.yaml`.
        folder: Where the specs with names lie.
    Raises:
        ConfigError: There is none.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    for stem in (name, f"table{name}"):
        if (folder / f"{stem}.yaml").is_file():
            return folder / f"{stem}.yaml"
    known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise ConfigError(f"There is no table `{name}`: expected one of {known}, or the path of a YAML file.")
