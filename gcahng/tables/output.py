"""Collected tables as text, Markdown and JSON: our numbers beside the published ones, and what is missing."""

from collections.abc import Mapping, Sequence
from typing import Any

from gcahng.report.facts import DATA_SETS
from gcahng.tables.collect import CellResult, Collected
from gcahng.tables.paired import Difference
from gcahng.tables.published import as_number

NOTHING = "-"
NOT_RUN = "not run"
HOW = {
    "best_test": "the epoch with the best test R@1 (then MAP@R), chosen on the test classes",
    "last": "the last epoch",
    "best": "the epoch that is best on the validation classes (MAP@R), measured on the test classes",
}
# The evaluations that the papers print: the released training of GCA-HNG keeps the epoch with the best R@1 on the test
# classes, the result notebooks of SCT's code take the last evaluation.
_PRINTED = {"gca_hng": "best_test", "sct": "last"}
_PRINTED_TEXT = {"best_test": "the best epoch by test R@1", "last": "the last epoch"}

Differences = Mapping[str, Mapping[str, Difference]]


def as_text(collected: Collected, differences: Differences | None = None, against: str = "") -> str:
    """The table for a terminal."""
    blocks = [collected.plan.table.title, *_head(collected)]
    for title, header, rows in _grids(collected, differences, against):
        blocks += ["", title, *_aligned([header, *rows])]
    notes = _notes(collected)
    return "\n".join([*blocks, *([""] if notes else []), *notes])


def as_markdown(collected: Collected, differences: Differences | None = None, against: str = "") -> str:
    """The table as a section of a Markdown document."""
    lines = [f"## {collected.plan.table.title}", "", *(f"- {line}" for line in _head(collected))]
    for title, header, rows in _grids(collected, differences, against):
        lines += ["", f"**{title}**", "", _piped(header), _piped(["---"] * len(header)), *map(_piped, rows)]
    notes = _notes(collected)
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def as_json(collected: Collected, differences: Differences | None = None, against: str = "") -> dict[str, Any]:
    """Everything that was found, as JSON values."""
    plan = collected.plan
    cells = []
    for found in collected.cells:
        cell = found.cell
        entry: dict[str, Any] = {
            "row": cell.row.name,
            "model": cell.row.model or None,
            "loss": cell.row.loss or None,
            "data_set": cell.data_set,
            "configuration": None if cell.file is None else str(cell.file),
            "overrides": list(cell.overrides),
            "is_run_here": cell.row.runs,
            "missing_seeds": found.missing,
            "runs": [
                {"seed": r.seed, "folder": str(r.folder), "epoch": r.epoch, "values": dict(r.values)}
                for r in found.results
            ],
            "metrics": {name: _json_metric(found, name, text) for name, text in _published(found)},
            "published_in": cell.where or None,
            "not_comparable": list(cell.incomparable),
            "notes": list(found.notes),
        }
        if differences is not None and cell.title in differences:
            entry["difference"] = {
                name: {"seeds": list(d.seeds), "mean": d.mean, "half_width_95": d.half_width}
                for name, d in differences[cell.title].items()
            }
        cells.append(entry)
    return {
        "table": plan.table.name,
        "title": plan.table.title,
        "which": collected.which,
        "how": HOW[collected.which],
        "set": list(plan.choice.settings),
        "data": dict(plan.choice.data),
        "against": against or None,
        "cells": cells,
        "unreadable": list(collected.unreadable),
    }


def _json_metric(found: CellResult, name: str, text: str | None) -> dict[str, Any]:
    number = as_number(text)
    return {
        "mean": found.mean(name),
        "deviation": found.deviation(name),
        "seeds": len(found.values(name)),
        "published": text,
        "published_mean": None if number is None else number[0],
        "published_deviation": None if number is None else number[1],
    }


def _published(found: CellResult) -> list[tuple[str, str | None]]:
    return list(zip(found.cell.metrics, found.cell.published, strict=True))


def _head(collected: Collected) -> list[str]:
    """How to read the numbers, and what was changed."""
    plan = collected.plan
    metrics = {name for found in collected.cells for name in found.cell.metrics}
    seconds = {name for name in metrics if name.endswith("_seconds")}
    lines = ["Ours: mean ± sample standard deviation over seeds."]
    if seconds < metrics:
        lines[0] = f"{lines[0][:-1]}; of each run {HOW[collected.which]}."
        printed = _PRINTED.get(plan.table.paper or "")
        if printed is not None and any(found.cell.where for found in collected.cells):
            text = f"Published numbers are those of {_PRINTED_TEXT[printed]}"
            lines.append(f"{text}." if collected.which == printed else f"{text}; ours are not.")
    if seconds:
        lines.append("Seconds are those of the machines that ran; training's are the median of the logged means.")
    if plan.choice.settings:
        lines.append(f"Set for all runs: {' '.join(plan.choice.settings)}.")
    if plan.choice.data:
        lines.append(f"Data: {', '.join(f'{name} from {place}' for name, place in plan.choice.data.items())}.")
    if any(found.cell.incomparable for found in collected.cells):
        lines.append("Published numbers in brackets are NOT comparable with ours; why stands below.")
    return lines


def _grids(
    collected: Collected, differences: Differences | None, against: str
) -> list[tuple[str, list[str], list[list[str]]]]:
    """For each data set a title, a header and rows, all as text; after it the differences, if wanted."""
    grids = []
    for data_set in collected.plan.table.data_sets:
        cells = collected.of_data_set(data_set)
        if not cells:
            continue
        title = DATA_SETS.get(data_set, data_set)
        has_published = any(found.cell.where for found in cells)
        header = ["row", "seeds"]
        for name in cells[0].cell.metrics:
            header += [f"{name} ours", "published"] if has_published else [name]
        grids.append((title, header, [_row(found, has_published) for found in cells]))
        rows = [
            [found.cell.row.label, *_difference_texts(found, differences[found.cell.title])]
            for found in cells
            if differences is not None and found.cell.title in differences
        ]
        if rows:
            reading = f"{title}: row minus {against}, over the seeds of both, with its 95 % interval"
            grids.append((reading, ["row", "seeds", *cells[0].cell.metrics], rows))
    return grids


def _row(found: CellResult, has_published: bool) -> list[str]:
    texts = [found.cell.row.label, _seeds(found)]
    for name, published in _published(found):
        texts.append(_ours(found, name))
        if has_published:
            texts.append(_as_printed(published, bool(found.cell.incomparable)))
    return texts


def _seeds(found: CellResult) -> str:
    planned, done = len(found.cell.planned), len(found.results)
    if not found.cell.row.runs:
        return NOTHING
    if not done:
        return NOT_RUN
    return f"{done}" if done == planned else f"{done} of {planned}"


def _ours(found: CellResult, name: str) -> str:
    mean, deviation = found.mean(name), found.deviation(name)
    if not found.cell.row.runs:
        return NOTHING
    if mean is None:
        return "not measured" if found.results else NOT_RUN
    digits = _digits(name)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _digits(name: str) -> int:
    return 3 if name.endswith("_seconds") else 2


def _as_printed(text: str | None, incomparable: bool) -> str:
    if text is None:
        return NOTHING
    shown = text.replace("±", " ± ")
    return f"[{shown}]" if incomparable else shown


def _difference_texts(found: CellResult, by_metric: Mapping[str, Difference]) -> list[str]:
    if not by_metric:
        return ["0", *(NOTHING for _ in found.cell.metrics)]
    counts = sorted({len(difference.seeds) for difference in by_metric.values()})
    texts = ["/".join(map(str, counts))]
    for name in found.cell.metrics:
        difference = by_metric.get(name)
        if difference is None:
            texts.append(NOTHING)
        elif difference.half_width is None:
            texts.append(f"{difference.mean:+.{_digits(name)}f} (one seed)")
        else:
            texts.append(f"{difference.mean:+.{_digits(name)}f} ± {difference.half_width:.{_digits(name)}f}")
    return texts


def _notes(collected: Collected) -> list[str]:
    """What is not comparable and what is not counted."""
    notes: dict[str, None] = {}
    for found in collected.cells:
        for reason in found.cell.incomparable:
            notes[f"Not comparable: {reason} ({found.cell.data_set})."] = None
    for found in collected.cells:
        for note in found.notes:
            notes[f"{found.cell.title}: {note}."] = None
    for line in collected.unreadable:
        notes[f"Not looked at: {line}"] = None
    return list(notes)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (
            text.ljust(width) if number == 0 else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return lines


def _piped(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
