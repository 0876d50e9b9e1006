"""Pictures of queries with their nearest neighbours, right and wrong ones marked."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from gcahng.errors import InputError
from gcahng.training.canvas import (
    QUERY_COLOUR,
    RIGHT_COLOUR,
    RIGHT_MARK,
    WRONG_COLOUR,
    WRONG_MARK,
    Canvas,
    shorten,
    write_whole,
)

# Lengths in inches; of `neighbour_picture`, which is as wide as it must be.
IMAGE = 0.92
CELL_WIDTH = 1.16
CELL_HEIGHT = 1.58
QUERY_GAP = 0.22
MARGIN = 0.22
HEADER = 0.92
DOTS_PER_INCH = 140
LABEL_CHARACTERS = 17

# Of `comparison_png`: 380 CSS pixels wide at two pixels each, so that 9 points are 12 CSS pixels.
PAGE_WIDTH = 380 / 96
PAGE_DOTS_PER_INCH = 192
COLUMNS = 4
PAGE_MARGIN = 0.05
PAGE_GAP = 0.14  # between the query and what it found
PAGE_CELL = (PAGE_WIDTH - 2 * PAGE_MARGIN - PAGE_GAP) / (COLUMNS + 1)
PAGE_IMAGE = PAGE_CELL - 0.09
POINTS = 9
LINE = 0.155
REMARK_WIDTH = 1.15


class Query(NamedTuple):
    """One query image; `note` is a short remark such as "worst", drawn above it."""

    image: Image.Image
    name: str
    note: str = ""


class Neighbour(NamedTuple):
    """One ranked gallery image; `score` is its cosine similarity with the query.

    `is_right` is None where nobody knows the query's class: a plain frame, no mark.
    """

    image: Image.Image
    name: str
    is_right: bool | None
    score: float


class Pair(NamedTuple):
    """A query image and the image of another class that it is taken for."""

    query: Query
    neighbour: Neighbour


class Found(NamedTuple):
    """What one model finds for a query, nearest first; its name, and a short remark, are drawn above it."""

    name: str
    neighbours: Sequence[Neighbour]
    remark: str = ""


def choose_queries(average_precision: Tensor, num_worst: int, num_typical: int) -> list[tuple[int, str]]:
    """Pick the queries with the lowest values and those nearest to the median.

    Args:
        average_precision: (Q,) one value per query, for instance
            `RetrievalResult.query_map_at_r`; queries at NaN (no reference) are never picked.
        num_worst: Queries from the bottom.
        num_typical: Queries from around the median, the worst ones excluded.

    Returns:
        (query index, "worst" or "typical") pairs: worst first, then typical by ascending value;
        equal values by index. Fewer where there are fewer queries.
    """
    values = average_precision.to(torch.float64)
    ascending = [i for i in values.argsort(stable=True).tolist() if not values[i].isnan()]
    worst = ascending[:num_worst]
    rest = ascending[num_worst:]
    # The middle of all, not of the rest, so that showing more worst ones moves no typical one.
    start = len(ascending) // 2 - num_typical // 2 - len(worst)
    start = max(0, min(start, len(rest) - num_typical))
    typical = rest[start : start + num_typical]
    return [(i, "worst") for i in worst] + [(i, "typical") for i in typical]


def neighbour_picture(
    path: Path | str,
    queries: Sequence[Query | tuple[Image.Image, str]],
    neighbours: Sequence[Sequence[Neighbour | tuple[Image.Image, str, bool | None, float]]],
    title: str,
) -> Path:
    """Write a PNG: one row per query, then its neighbours, nearest first.

    Same-class neighbours have a solid frame with a check mark, the others a dashed frame with a
    cross; under each image its class name and its score. Rows may differ in length.

    Args:
        path: The file to write; its folder must exist.
        queries: One per row.
        neighbours: One list per query.
        title: Drawn on top as it is.

    Returns:
        `path`.

    Raises:
        InputError: matplotlib is missing, there is no query, the counts differ, or the folder does
            not exist.
    """
    path = Path(path)
    rows = [Query(*query) for query in queries]
    ranked = [[Neighbour(*item) for item in row] for row in neighbours]
    if not rows:
        raise InputError("`queries` must hold at least one query: got 0. Raise the number of queries to show.")
    if len(rows) != len(ranked):
        raise InputError(
            f"`neighbours` must have one list per query: expected {len(rows)}, got {len(ranked)}. "
            "Pass an empty list for a query without neighbours."
        )
    if not path.parent.is_dir():
        raise InputError(f"`path` must lie in an existing folder: got '{path}'. Create '{path.parent}' first.")
    write_whole(path, _table(rows, ranked, title).png())
    return path


def _table(rows: list[Query], ranked: list[list[Neighbour]], title: str) -> Canvas:
    num_columns = max(len(row) for row in ranked)
    width = max(2 * MARGIN + CELL_WIDTH + QUERY_GAP + num_columns * CELL_WIDTH, 6.0)
    canvas = Canvas(width, HEADER + len(rows) * CELL_HEIGHT + MARGIN / 2, DOTS_PER_INCH)
    _draw_header(canvas, title, marks=any(item.is_right is not None for row in ranked for item in row))
    for index, (query, row) in enumerate(zip(rows, ranked, strict=True)):
        top = HEADER + index * CELL_HEIGHT
        _draw_query(canvas, query, MARGIN, top)
        for column, item in enumerate(row):
            left = MARGIN + CELL_WIDTH * (column + 1) + QUERY_GAP
            _draw_neighbour(canvas, item, left, top)
    return canvas


def _draw_header(canvas: Canvas, title: str, *, marks: bool) -> None:
    canvas.text(MARGIN, 0.14, title, fontsize=11.5, fontweight="bold", va="top")
    legend = [
        (0.0, f"{RIGHT_MARK} same class", RIGHT_COLOUR),
        (1.15, f"{WRONG_MARK} other class", WRONG_COLOUR),
        (2.35, "number: cosine similarity", QUERY_COLOUR),
    ]
    if not marks:
        legend = [(0.0, legend[2][1], QUERY_COLOUR)]
    for offset, text, colour in legend:
        canvas.text(MARGIN + offset, 0.43, text, fontsize=8.5, color=colour, va="top")


def _draw_query(canvas: Canvas, query: Query, left: float, top: float) -> None:
    centre = left + IMAGE / 2
    canvas.image(query.image, left, top, IMAGE)
    canvas.frame(left, top, IMAGE, QUERY_COLOUR, "solid")
    heading = f"query, {query.note}" if query.note else "query"
    canvas.text(centre, top - 0.05, heading, fontsize=7, color=QUERY_COLOUR, ha="center", va="bottom")
    name = shorten(query.name, LABEL_CHARACTERS - 2)  # bold is wider
    canvas.text(centre, top + IMAGE + 0.07, name, fontsize=7.5, fontweight="bold", ha="center", va="top")
    divider = left + (CELL_WIDTH + IMAGE + QUERY_GAP) / 2  # between this image and the next
    canvas.line((divider, divider), (top, top + IMAGE), "#b0bec5")


def _draw_neighbour(canvas: Canvas, item: Neighbour, left: float, top: float) -> None:
    colour, mark = _marked(canvas, item, left, top, IMAGE)
    if mark:
        canvas.text(
            left + 0.085,
            top + 0.085,
            mark,
            fontsize=8.5,
            fontweight="bold",
            color="white",
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.16", "facecolor": colour, "edgecolor": "white"},
        )
    label = f"{item.score:.2f}\n{shorten(item.name, LABEL_CHARACTERS)}"
    canvas.text(left + IMAGE / 2, top + IMAGE + 0.07, label, fontsize=7.5, ha="center", va="top")


def _marked(canvas: Canvas, item: Neighbour, left: float, top: float, side: float) -> tuple[str, str]:
    """Draw an image in the frame of right or wrong ones; their colour and mark ("" where nobody knows)."""
    canvas.image(item.image, left, top, side)
    if item.is_right is None:
        canvas.frame(left, top, side, QUERY_COLOUR, "solid")
        return QUERY_COLOUR, ""
    if item.is_right:
        canvas.frame(left, top, side, RIGHT_COLOUR, "solid")
        return RIGHT_COLOUR, RIGHT_MARK
    canvas.frame(left, top, side, WRONG_COLOUR, "dashed")
    return WRONG_COLOUR, WRONG_MARK


def comparison_png(query: Query, found: Sequence[Found]) -> bytes:
    """The PNG of one query with what one or several models find for it, narrow enough for a telephone.

    The query stands at the left, beside it the models one below the other, four images in a line. Frames and marks as
    in `neighbour_picture`; the class is written under wrong neighbours, since right ones have the query's.

    Args:
        query: With its class; the note is not drawn.
        found: At least one.
    Raises:
        InputError: matplotlib is missing, or there is no model.
    """
    if not found:
        raise InputError("`found` must hold what at least one model finds: got nothing.")
    # Every image of a line stands as high as its neighbours, so names are laid out before anything is drawn.
    measuring = Canvas(PAGE_WIDTH, 1, PAGE_DOTS_PER_INCH)
    name = measuring.wrapped(query.name, PAGE_CELL, 6, fontsize=POINTS)
    blocks = [(_heading(measuring, model), _lines(measuring, model.neighbours)) for model in found]
    height = sum(LINE + 0.09 + sum(_line_height(line) for line in lines) for _, lines in blocks)
    query_height = 2 * LINE + PAGE_IMAGE + LINE * (name.count("\n") + 1)
    canvas = Canvas(PAGE_WIDTH, max(height, query_height) + PAGE_MARGIN, PAGE_DOTS_PER_INCH)
    left, top = PAGE_MARGIN + 0.03, PAGE_MARGIN + LINE + 0.05
    canvas.text(left, PAGE_MARGIN, "query", fontsize=POINTS, color=QUERY_COLOUR, va="top")
    canvas.image(query.image, left, top, PAGE_IMAGE)
    canvas.frame(left, top, PAGE_IMAGE, QUERY_COLOUR, "solid")
    canvas.text(left, top + PAGE_IMAGE + 0.06, name, fontsize=POINTS, va="top")
    divider = PAGE_MARGIN + PAGE_CELL + PAGE_GAP / 2
    canvas.line((divider, divider), (PAGE_MARGIN, height - PAGE_MARGIN), "#b0bec5")
    start, top = PAGE_MARGIN + PAGE_CELL + PAGE_GAP, PAGE_MARGIN
    for heading, lines in blocks:
        canvas.text(start, top, heading, fontsize=POINTS, fontweight="bold", color=QUERY_COLOUR, va="top")
        top += LINE + 0.05
        for line in lines:
            for column, (item, label) in enumerate(line):
                _draw_found(canvas, item, label, start + column * PAGE_CELL, top)
            top += _line_height(line)
        top += 0.04
    return canvas.png()


def pairs_png(pairs: Sequence[Pair]) -> bytes:
    """The PNG of queries, each above a wrong neighbour, as narrow as `comparison_png`.

    Args:
        pairs: One to four, all of the same two classes.
    Raises:
        InputError: matplotlib is missing, or there are other numbers of pairs.
    """
    if not 1 <= len(pairs) <= COLUMNS:
        raise InputError(f"`pairs` must hold 1 to {COLUMNS} pairs: got {len(pairs)}.")
    cell = (PAGE_WIDTH - 2 * PAGE_MARGIN) / COLUMNS
    side = cell - 0.09
    row = LINE + 0.05 + side
    canvas = Canvas(PAGE_WIDTH, 2 * row + LINE + 0.26, PAGE_DOTS_PER_INCH)
    room = PAGE_WIDTH - 2 * PAGE_MARGIN - 0.06
    second_top = PAGE_MARGIN + row + 0.1
    for top, text, colour in (
        (PAGE_MARGIN, f"query: {pairs[0].query.name}", QUERY_COLOUR),
        (second_top, f"{WRONG_MARK} finds: {pairs[0].neighbour.name}", WRONG_COLOUR),
    ):
        heading = canvas.wrapped(text, room, 1, fontsize=POINTS)
        canvas.text(PAGE_MARGIN + 0.03, top, heading, fontsize=POINTS, color=colour, va="top")
    for column, pair in enumerate(pairs):
        left = PAGE_MARGIN + 0.03 + column * cell
        canvas.image(pair.query.image, left, PAGE_MARGIN + LINE + 0.05, side)
        canvas.frame(left, PAGE_MARGIN + LINE + 0.05, side, QUERY_COLOUR, "solid")
        top = second_top + LINE + 0.05
        colour, mark = _marked(canvas, pair.neighbour, left, top, side)
        score = f"{mark} {pair.neighbour.score:.2f}"
        canvas.text(left, top + side + 0.05, score, fontsize=POINTS, fontweight="bold", color=colour, va="top")
    return canvas.png()


Line = list[tuple[Neighbour, str]]


def _heading(canvas: Canvas, model: Found) -> str:
    """A model's name, cut where it leaves no room for the remark."""
    room = COLUMNS * PAGE_CELL - (REMARK_WIDTH if model.remark else 0)
    name = canvas.wrapped(model.name, room, 1, fontsize=POINTS, fontweight="bold")
    return f"{name}: {model.remark}" if model.remark else name


def _lines(canvas: Canvas, neighbours: Sequence[Neighbour]) -> list[Line]:
    """The neighbours with their labels, line by line."""
    names = {item.name for item in neighbours if not item.is_right}
    labels = {name: canvas.wrapped(name, PAGE_CELL - 0.06, 3, fontsize=POINTS) for name in names}
    labelled = [(item, "" if item.is_right else labels[item.name]) for item in neighbours]
    return [labelled[start : start + COLUMNS] for start in range(0, len(labelled), COLUMNS)]


def _line_height(line: Line) -> float:
    num_lines = max(label.count("\n") + 1 if label else 0 for _, label in line)
    return PAGE_IMAGE + (1 + num_lines) * LINE + 0.12


def _draw_found(canvas: Canvas, item: Neighbour, label: str, left: float, top: float) -> None:
    colour, mark = _marked(canvas, item, left, top, PAGE_IMAGE)
    score = f"{mark} {item.score:.2f}"
    canvas.text(left, top + PAGE_IMAGE + 0.05, score, fontsize=POINTS, fontweight="bold", color=colour, va="top")
    canvas.text(left, top + PAGE_IMAGE + 0.05 + LINE, label, fontsize=POINTS, va="top")
