"""What a run is in a few words: its data set, its method, its evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.reader import load_manifest
from gcahng.errors import InputError
from gcahng.report.run_data import RunData
from gcahng.training.config import Config
from gcahng.training.data_setup import data_store
from gcahng.training.results import evaluation_columns, metric_columns

DATA_SETS = {
    "cub": "CUB-200-2011",
    "cars": "Cars-196",
    "sop": "Stanford Online Products",
    "inshop": "In-Shop",
    "hotel50k": "Hotel-50K",
}
LOSSES = {"n_pair": "N-pair", "n_pair_plus": "N-pair+", "proxy_anchor": "Proxy-Anchor"}


@dataclass(frozen=True)
class DataFacts:
    """The data set of a run.

    Attributes:
        source: Name of the converted source ("cub"); None where the data cannot be read.
        text: Classes and images of the splits, or why they are not known.
    """

    source: str | None
    text: str


def data_facts(run: RunData) -> DataFacts:
    """Read the manifest of a run's data; data that is gone is no error."""
    try:
        manifest: Manifest = load_manifest(data_store(run.config.data))
    except InputError as error:
        return DataFacts(None, str(error))
    splits = ", ".join(
        f"{name} {counts['images']:,} images of {counts['classes']:,} classes"
        for name, counts in manifest.splits.items()
    )
    return DataFacts(manifest.source, splits)


def data_name(run: RunData) -> str:
    """What its data set is called: as papers do, or by its source; by its folder where it cannot be read."""
    source = data_facts(run).source
    return run.config.data.dir if source is None else DATA_SETS.get(source, source)


def loss_name(config: Config) -> str:
    """The metric loss as papers call it; the last word of a dotted path."""
    return LOSSES.get(config.loss.metric, config.loss.metric.rpartition(".")[2].rpartition(":")[2])


def method_name(config: Config) -> str:
    """What was trained: the metric loss alone, GCA-HNG, or one of its ablations."""
    graph, generation = config.graph, config.generation
    if not generation.enabled:
        return "Metric loss and graph network" if graph.enabled else "Metric loss alone"
    if generation.method == "generator":
        return "Generator-based negatives" + (" and graph network" if graph.enabled else "")
    if not graph.enabled or generation.coefficients == "single":
        return "Single coefficient interpolation"
    parts = (
        ("global correlations", graph.node_propagation),
        ("edge to node", graph.edge_to_node),
        ("random weighting", generation.fusion == "mix"),
        ("classification loss", generation.weights.classification),
        ("similarity loss", generation.weights.similarity),
        ("diversity loss", generation.weights.diversity),
    )
    without = [name for name, present in parts if not present]
    return "GCA-HNG" + (f" without {' and '.join(without)}" if without else "")


def evaluations(run: RunData, split: str = "test") -> list[dict[str, Any]]:
    """All evaluations of a split in order of steps, numbers as numbers (a NaN stands in the file as text)."""
    rows = [row for row in run.of_kind("evaluation") if row.get("split", "test") == split]
    return [{name: number(value) for name, value in row.items()} for row in rows]


def number(value: Any) -> Any:
    """A logged value: "nan" and "inf" as the numbers that they stand for."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def all_columns(run: RunData, row: Mapping[str, Any]) -> dict[str, float]:
    """Every metric of an evaluation, in percent, by the name to print; rows of earlier releases have fewer."""
    return evaluation_columns(row, coarse_label=run.config.eval.coarse_label) if "mrr" in row else metric_columns(row)


@dataclass(frozen=True)
class Evaluated:
    """One evaluation, in percent.

    Attributes:
        epoch: After which it was made.
        metrics: By the name to print: R@k, RP, MAP@R, ...
    """

    epoch: int
    metrics: Mapping[str, float]

    @staticmethod
    def of(row: Mapping[str, Any]) -> "Evaluated":
        """From a row of `metrics.jsonl` or `results.json`."""
        return Evaluated(row["epoch"], metric_columns(row))


def last_evaluation(run: RunData) -> Evaluated | None:
    """Of the test split; None where none was made yet."""
    rows = evaluations(run)
    return Evaluated.of(rows[-1]) if rows else None


def best_test_evaluation(run: RunData) -> Evaluated | None:
    """Of the epoch with the highest test R@1 (then MAP@R, then the earliest), as the papers choose."""
    if run.results is not None and run.results.get("best_test"):
        return Evaluated.of({name: number(value) for name, value in run.results["best_test"].items()})
    rows = evaluations(run)
    if not rows:
        return None
    return Evaluated.of(max(rows, key=lambda row: (row.get("recall_at_1", 0.0), row["map_at_r"])))


def num_steps(run: RunData) -> int:
    """Steps that the run has logged."""
    return max((row["step"] for row in run.rows), default=0)
