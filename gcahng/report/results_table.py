"""The results of runs beside the published numbers for their data set, backbone and loss."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from gcahng.report.facts import (
    DATA_SETS,
    DataFacts,
    Evaluated,
    best_test_evaluation,
    data_facts,
    last_evaluation,
    loss_name,
    method_name,
)
from gcahng.report.run_data import RunData
from gcahng.report.section import Section, Table
from gcahng.report.templates import table_markup
from gcahng.training.config import Config, resolved_yaml

PAPER_RESULTS = Path(__file__).with_name("paper_results.yaml")
NOTHING = "\u2013"
# What may differ between the runs that one row stands for.
_OF_ONE_RUN = (("seed",), ("run", "dir"), ("train", "resume"))


@cache
def paper_results() -> dict[str, Any]:
    """The published numbers; see the head of the file."""
    found: dict[str, Any] = yaml.safe_load(PAPER_RESULTS.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Setting:
    """What decides which published numbers a run is set beside.

    Attributes:
        data: Its data set.
        architecture: A key of `architectures` in the file; None where the papers have no such model.
        losses: The losses of the tables that are this run's; empty where none is.
        title: For people.
    """

    data: DataFacts
    architecture: str | None
    losses: tuple[str, ...]
    title: str

    @staticmethod
    def of(config: Config, data: DataFacts) -> "Setting":
        """The setting of a run."""
        title = ", ".join(
            [
                config.data.dir if data.source is None else DATA_SETS.get(data.source, data.source),
                f"{config.model.backbone} ({config.model.pooling} pooling)",
                f"D\u00a0=\u00a0{config.model.embedding_dim}",
                loss_name(config),
            ]
        )
        return Setting(data, architecture(config), losses(config), title)


def architecture(config: Config) -> str | None:
    """Which architecture of the papers a configuration has, None where it has another."""
    model = config.model
    for name, wanted in paper_results()["architectures"].items():
        # "resnet50" stands for all its weights; a name with a tag for those alone.
        names = {model.backbone, model.backbone.partition(".")[0]}
        if (
            names & set(wanted["backbones"])
            and model.pooling in wanted["pooling"]
            and model.embedding_dim == wanted["embedding_dim"]
        ):
            return str(name)
    return None


def losses(config: Config) -> tuple[str, ...]:
    """The names that the tables give a configuration's metric loss."""
    found = list(paper_results()["losses"].get(config.loss.metric, []))
    if config.loss.metric == "n_pair_plus" and config.batch.num_samples == 2:
        found.append("NP")
    return tuple(found)


@dataclass(frozen=True)
class Published:
    """A published row.

    Attributes:
        method: As published.
        loss: Name of the metric loss in the tables.
        values: Percent as printed, by metric.
        paper: Key of the paper in the file.
        source: Paper and table, to print.
    """

    method: str
    loss: str
    values: Mapping[str, str]
    paper: str
    source: str


def published(setting: Setting) -> list[Published]:
    """The rows for a data set, an architecture and a loss, in the papers' order."""
    found = []
    for table in paper_results()["tables"]:
        if table["data_set"] != setting.data.source:
            continue
        paper = table["source"]
        name = paper_results()["sources"][paper]["name"]
        where = "result table" if table["table"] == "results" else f"Table {table['table']}"
        for method, model, loss, *values in table["rows"]:
            if model == setting.architecture and loss in setting.losses:
                shown = {column: _printed(value) for column, value in zip(table["columns"], values, strict=True)}
                found.append(Published(method, loss, shown, paper, f"{name} paper, {where}"))
    return found


def _printed(value: Any) -> str:
    if value is None:
        return NOTHING
    return f"{value:.1f}" if isinstance(value, float) else str(value).replace("±", " ± ")


def group_runs(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Runs that differ in seed and folder alone stand together."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        tree = yaml.safe_load(resolved_yaml(run.config))
        for *sections, name in _OF_ONE_RUN:
            part = tree
            for section in sections:
                part = part[section]
            del part[name]
        groups.setdefault(yaml.safe_dump(tree), []).append(run)
    return list(groups.values())


def mean_and_spread(values: Sequence[float]) -> str:
    """ "70.31 ± 0.25": mean and sample standard deviation; one value alone has no spread."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


@dataclass(frozen=True)
class _Row:
    method: str
    values: Mapping[str, str]
    source: str


def own_rows(runs: Sequence[RunData]) -> list[_Row]:
    """The last and the best epochs of runs that differ in their seed alone."""
    method = method_name(runs[0].config)
    chosen = {
        "last": [(run, last_evaluation(run)) for run in runs],
        "best by test R@1": [(run, best_test_evaluation(run)) for run in runs],
    }
    rows: list[_Row] = []
    for what, pairs in chosen.items():
        found = [(run, evaluated) for run, evaluated in pairs if evaluated is not None]
        if not found:
            return [_Row(method, {}, f"{_names(runs)}: not evaluated yet")]
        metrics = [evaluated.metrics for _, evaluated in found]
        values = {
            name: mean_and_spread([row[name] for row in metrics])
            for name in metrics[0]
            if all(name in row for row in metrics)
        }
        who, when = _names([run for run, _ in found]), _epochs(found)
        missing = [run for run, evaluated in pairs if evaluated is None]
        when += f"; not evaluated yet: {_names(missing)}" if missing else ""
        rows.append(_Row(method, values, f"{who}: {what}, {when}"))
        if len(rows) == 2 and chosen["last"] == chosen["best by test R@1"]:
            rows = [_Row(method, values, f"{who}: last and best by test R@1, {when}")]
    return rows


def _names(runs: Sequence[RunData]) -> str:
    names = ", ".join(run.name for run in runs)
    return names if len(runs) == 1 else f"{len(runs)} runs ({names})"


def _epochs(found: Sequence[tuple[RunData, Evaluated]]) -> str:
    """ "epoch 12", "epochs 8, 12", and of how many where a run has not come to its end."""
    epochs = [evaluated.epoch for _, evaluated in found]
    one = len(set(epochs)) == 1
    text = f"epoch {epochs[0]}" if one else f"epochs {', '.join(map(str, epochs))}"
    if all(run.results is not None for run, _ in found):
        return text
    return f"{text} of {found[0][0].config.train.epochs}, unfinished"


def _columns(rows: Sequence[_Row]) -> list[str]:
    """All metrics: R@k by k, then the rest in order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    recalls = [name for name in names if name.startswith("R@") and name[2:].isdigit()]
    return sorted(recalls, key=lambda name: int(name[2:])) + [name for name in names if name not in recalls]


def _caption(setting: Setting, runs: Sequence[RunData], rows: Sequence[Published]) -> str:
    if not rows:
        return f"{setting.title}. {_why_alone(setting)}"
    text = f"{setting.title}. Ours first; below, as published: GCA-HNG's are those of its best epoch by test R@1."
    if any(not run.config.model.pretrained and run.config.model.weights is None for run in runs):
        text += " The papers start from weights trained on ImageNet; a run here did not."
    return text


def _why_alone(setting: Setting) -> str:
    if setting.data.source is None:
        return "No published numbers beside it: the data set cannot be read, so it is not known which it is."
    if setting.data.source not in DATA_SETS:
        return f"No published numbers beside it: the papers do not use the data set {setting.data.source}."
    missing = "this loss with this model"
    if setting.architecture is None:
        missing = "this backbone, pooling and embedding size"
    return f"No published numbers beside it: the papers have none of {missing} on this data set."


def results_section(runs: Sequence[RunData]) -> Section:
    """A table for each data set, architecture and loss among the runs.

    Args:
        runs: At least one.
    """
    settings: dict[tuple[str | None, str], tuple[Setting, list[list[RunData]]]] = {}
    facts: dict[str, DataFacts] = {}
    for group in group_runs(runs):
        config = group[0].config
        data = facts.setdefault(config.data.dir, data_facts(group[0]))
        setting = Setting.of(config, data)
        settings.setdefault((setting.architecture, setting.title), (setting, []))[1].append(group)
    parts: list[Markup] = []
    papers: dict[str, None] = {}
    for setting, groups in settings.values():
        ours = [row for group in groups for row in own_rows(group)]
        beside = published(setting)
        papers |= dict.fromkeys(row.paper for row in beside)
        theirs = [_Row(f"{row.method} ({row.loss})", row.values, row.source) for row in beside]
        metrics = _columns([*ours, *theirs])
        rows = [
            [row.method, *(row.values.get(name, NOTHING) for name in metrics), row.source] for row in [*ours, *theirs]
        ]
        members = [run for group in groups for run in group]
        table = Table(["Method", *metrics, "Where from"], rows, _caption(setting, members, beside))
        parts.append(table_markup(table, range(len(ours))))
    for paper in papers:
        source = paper_results()["sources"][paper]
        parts.append(Markup('<p class="intro">{}: {}. {}</p>').format(source["name"], source["title"], source["url"]))
    return Section("results", "Results", _intro(runs), parts)


def _intro(runs: Sequence[RunData]) -> str:
    text = (
        "Retrieval on classes never seen in training, in percent. R@k: queries with an image of their class among the "
        "k nearest. RP: share of the class among the R nearest, R being its number of other images. MAP@R: mean of the "
        "precisions at the hits among them, divided by R. "
    )
    if len(group_runs(runs)) < len(runs):
        text += "Runs that differ in their seed alone are one row: mean ± sample standard deviation. "
    return text + "An epoch that is best by test R@1 was chosen on the test classes, as the papers choose theirs."
