"""Published numbers: those of `gcahng/report/paper_results.yaml`, and those that a table's spec holds itself."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gcahng.errors import ConfigError
from gcahng.tables.spec import Row, Table

PAPER_RESULTS = Path(__file__).parents[1] / "report" / "paper_results.yaml"


@cache
def paper_results() -> dict[str, Any]:
    """The published numbers; see the head of the file."""
    found: dict[str, Any] = yaml.safe_load(PAPER_RESULTS.read_text(encoding="utf-8"))
    return found


def published_values(table: Table, row: Row, data_set: str) -> tuple[tuple[str | None, ...], str]:
    """What a paper says of a row on a data set.

    Returns:
        A text for each metric of the table, None where the paper has nothing; and the name of the paper's table, ""
        where the row is not published.
    Raises:
        ConfigError: The row is to be looked up and is not there.
    """
    metrics = table.metrics[data_set]
    if data_set in row.values:
        return row.values[data_set], _where(table.paper, table.table)
    if row.method is None:
        return (None,) * len(metrics), ""
    paper = table.paper
    if paper not in paper_results()["sources"]:
        raise ConfigError(f"`paper: {paper}` is none of {', '.join(paper_results()['sources'])}.")
    tables = [entry for entry in paper_results()["tables"] if (entry["source"], entry["data_set"]) == (paper, data_set)]
    for entry in tables:  # no row stands in two of them
        for method, model, loss, *values in entry["rows"]:
            if (method, model, loss) == (row.method, row.model, row.loss):
                found = dict(zip(entry["columns"], values, strict=True))
                texts = tuple(None if found.get(name) is None else str(found[name]) for name in metrics)
                return texts, _where(paper, entry["table"])
    raise ConfigError(
        f"no table of {paper} has a row `{row.method}` ({row.model}, {row.loss}) on {data_set}. Correct `published`, "
        "or say `published: none`."
    )


def _where(paper: str | None, table: str | None) -> str:
    if paper is None:
        return "published"
    name = paper_results()["sources"][paper]["name"] if paper in paper_results()["sources"] else paper
    return f"{name}, result table" if table in (None, "results") else f"{name}, Table {table}"


def as_number(text: str | None) -> tuple[float, float | None] | None:
    """Mean and deviation of "70.3±0.3"; None for what is no number ("collapse")."""
    if text is None:
        return None
    mean, _, deviation = text.partition("±")
    try:
        return float(mean), float(deviation) if deviation else None
    except ValueError:
        return None
