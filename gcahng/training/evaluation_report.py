"""An evaluation in full: for people, as JSON, and class by class as CSV."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gcahng.metrics import RetrievalResult
from gcahng.metrics.per_class import PerClass, per_class, worst_queries
from gcahng.training.evaluation import as_row
from gcahng.training.output_files import whole_file
from gcahng.training.protocols import Evaluation
from gcahng.training.results import evaluation_columns


def full_report(evaluation: Evaluation, *, num_worst: int) -> dict[str, Any]:
    """All that JSON says: the row of `as_row`, and below it each class, the worst queries, those without a reference.

    Args:
        evaluation: Of any rank.
        num_worst: Worst queries to list.
    Returns:
        With several galleries also `galleries`: the same three lists of each by name.
    """
    details = {name: _details(evaluation, result, num_worst) for name, result in evaluation.results.items()}
    first = next(iter(details.values()))
    several = {"galleries": details} if len(details) > 1 else {}
    return as_row(evaluation) | first | several


def worst_lines(evaluation: Evaluation, count: int) -> Iterator[str]:
    """A table of the worst queries of the first gallery."""
    rows = _worst(evaluation, evaluation.result, count)
    yield f"{'MAP@R':>6}  {'first hit':>9}  {'references':>10}  key, class, shard"
    for row in rows:
        yield (
            f"{100 * row['map_at_r']:6.2f}  {row['first_hit_rank']:9d}  {row['num_references']:10d}  "
            f"{', '.join(map(_printable, (row['key'], row['class_name'], row['shard'])))}"
        )


def summary_lines(evaluation: Evaluation, *, coarse_label: str | None = None) -> Iterator[str]:
    """The means in percent and the counts; of several galleries a line each."""
    row = as_row(evaluation)
    several = len(evaluation.results) > 1
    for name in evaluation.results:
        of_gallery = {key.removeprefix(f"{name}/"): value for key, value in row.items() if key.startswith(f"{name}/")}
        columns = evaluation_columns(of_gallery if several else row, coarse_label=coarse_label)
        values = "  ".join(f"{column} {value:.2f}" for column, value in columns.items())
        yield f"{name}: {values}" if several else values
    for name, result in evaluation.results.items():
        front = f"{name}: " if several else ""
        line = f"{front}{result.num_queries} queries, {result.num_without_reference} without a reference"
        if name in evaluation.coarse and evaluation.coarse[name].num_queries < result.num_queries:
            line += f", {evaluation.coarse[name].num_queries} with a {coarse_label or 'coarser label'} to find"
        yield line


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values; the file appears when it is whole.

    Raises:
        ConfigError: It cannot be written.
    """
    _write("--json", path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def write_per_class(path: Path, evaluation: Evaluation) -> None:
    """One line per gallery and class, see `gcahng.metrics.per_class`; empty fields where nothing could be found.

    Raises:
        ConfigError: It cannot be written.
    """
    lines = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for name, result in evaluation.results.items():
        for row in _class_rows(evaluation, per_class(result)):
            if writer is None:
                writer = csv.DictWriter(lines, ["gallery", *row], lineterminator="\n")
                writer.writeheader()
            writer.writerow({"gallery": name} | row)
    _write("--per-class", path, lines.getvalue())


def _details(evaluation: Evaluation, result: RetrievalResult, num_worst: int) -> dict[str, Any]:
    return {
        "per_class": list(_class_rows(evaluation, per_class(result))),
        "worst_queries": _worst(evaluation, result, num_worst),
        "without_reference": [_query(evaluation, result, place) for place in result.without_reference.tolist()],
    }


def _class_rows(evaluation: Evaluation, table: PerClass) -> Iterator[dict[str, Any]]:
    for row in table.rows():
        yield {"class_id": row["class_id"], "class_name": evaluation.class_name(row["class_id"])} | row


def _worst(evaluation: Evaluation, result: RetrievalResult, count: int) -> list[dict[str, Any]]:
    return [
        _query(evaluation, result, place)
        | {
            "map_at_r": float(result.query_map_at_r[place]),
            "r_precision": float(result.query_r_precision[place]),
            "first_hit_rank": int(result.first_hit_rank[place]),
            "num_references": int(result.num_references[place]),
        }
        for place in worst_queries(result, count).tolist()
    ]


def _query(evaluation: Evaluation, result: RetrievalResult, place: int) -> dict[str, Any]:
    """What names a query."""
    return {
        "index": place,
        "key": evaluation.query.key(place),
        "shard": evaluation.query.shard(place),
        "class_name": evaluation.class_name(int(result.query_labels[place])),
    }


def _printable(text: str) -> str:
    """Names come from data sets: what a terminal would obey is shown as an escape."""
    return text if text.isprintable() else ascii(text)


def _write(option: str, path: Path, text: str) -> None:
    with whole_file(option, path) as file:
        file.write(text.encode())
