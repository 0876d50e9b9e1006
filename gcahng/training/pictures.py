"""A picture of queries with their nearest neighbours, right and wrong ones marked.

matplotlib (extra `pictures`) is imported on the first call, so training does not need it.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from gcahng.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dark on white, and told apart by most colour-blind readers; marks and line styles say the same
# without colour.
RIGHT_COLOUR = "#0b7a3b"
WRONG_COLOUR = "#c62828"
QUERY_COLOUR = "#37474f"
# Together they hold every script of the embedded data set; both come with matplotlib.
FONTS = ["DejaVu Sans", "STIXGeneral"]

# Lengths in inches.
IMAGE = 0.92
CELL_WIDTH = 1.16
CELL_HEIGHT = 1.58
QUERY_GAP = 0.22
MARGIN = 0.22
HEADER = 0.92
DOTS_PER_INCH = 140
LABEL_CHARACTERS = 17
LABEL_LINES = 2


class Query(NamedTuple):
    """One query image; `note` is a short remark such as "worst", drawn above it."""

    image: Image.Image
    name: str
    note: str = ""


class Neighbour(NamedTuple):
    """One ranked gallery image; `score` is its cosine similarity with the query."""

    image: Image.Image
    name: str
    is_right: bool
    score: float


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
    neighbours: Sequence[Sequence[Neighbour | tuple[Image.Image, str, bool, float]]],
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
    with warnings.catch_warnings():
        # A class name in a script without a font is drawn as boxes; the picture is still of use.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")
        figure = _draw(rows, ranked, title)
        _write(figure, path)
    return path


def _draw(rows: list[Query], ranked: list[list[Neighbour]], title: str) -> "Figure":
    """Draw the whole picture on one axes whose unit is an inch, y downwards."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "pictures need matplotlib, which is not installed. Install it with: pip install 'gcahng[pictures]'"
        ) from error

    num_columns = max(len(row) for row in ranked)
    width = max(2 * MARGIN + CELL_WIDTH + QUERY_GAP + num_columns * CELL_WIDTH, 6.0)
    height = HEADER + len(rows) * CELL_HEIGHT + MARGIN / 2
    # Without the global pyplot state: no window system, nothing to close.
    with rc_context({"font.family": FONTS}):
        figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        _draw_header(axes, title)
        for index, (query, row) in enumerate(zip(rows, ranked, strict=True)):
            top = HEADER + index * CELL_HEIGHT
            _draw_query(axes, query, MARGIN, top)
            for column, item in enumerate(row):
                left = MARGIN + CELL_WIDTH * (column + 1) + QUERY_GAP
                _draw_neighbour(axes, item, left, top)
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def _text(axes: "Axes", x: float, y: float, text: str, **style: object) -> None:
    """Write text as it is: a "$" in a class name is no formula."""
    # Fonts are looked up when drawn, after the context of `_draw` is left: name them here.
    axes.text(x, y, text, parse_math=False, fontfamily=FONTS, **style)  # type: ignore[arg-type]


def _draw_header(axes: "Axes", title: str) -> None:
    _text(axes, MARGIN, 0.14, title, fontsize=11.5, fontweight="bold", va="top")
    legend = [
        (0.0, "\u2713 same class", RIGHT_COLOUR),
        (1.15, "\u2717 other class", WRONG_COLOUR),
        (2.35, "number: cosine similarity", QUERY_COLOUR),
    ]
    for offset, text, colour in legend:
        _text(axes, MARGIN + offset, 0.43, text, fontsize=8.5, color=colour, va="top")


def _draw_query(axes: "Axes", query: Query, left: float, top: float) -> None:
    centre = left + IMAGE / 2
    _draw_image(axes, query.image, left, top, QUERY_COLOUR, "solid", 2.4)
    heading = f"query, {query.note}" if query.note else "query"
    _text(axes, centre, top - 0.05, heading, fontsize=7, color=QUERY_COLOUR, ha="center", va="bottom")
    _text(
        axes,
        centre,
        top + IMAGE + 0.07,
        shorten(query.name, width=LABEL_CHARACTERS - 2),  # bold is wider
        fontsize=7.5,
        fontweight="bold",
        ha="center",
        va="top",
    )
    divider = left + (CELL_WIDTH + IMAGE + QUERY_GAP) / 2  # between this image and the next
    axes.plot([divider, divider], [top, top + IMAGE], color="#b0bec5", linewidth=0.8)


def _draw_neighbour(axes: "Axes", item: Neighbour, left: float, top: float) -> None:
    colour = RIGHT_COLOUR if item.is_right else WRONG_COLOUR
    _draw_image(axes, item.image, left, top, colour, "solid" if item.is_right else "dashed", 2.4)
    _text(
        axes,
        left + 0.085,
        top + 0.085,
        "\u2713" if item.is_right else "\u2717",
        fontsize=8.5,
        fontweight="bold",
        color="white",
        ha="center",
        va="center",
        bbox={"boxstyle": "circle,pad=0.16", "facecolor": colour, "edgecolor": "white"},
    )
    label = f"{item.score:.2f}\n{shorten(item.name)}"
    _text(
        axes,
        left + IMAGE / 2,
        top + IMAGE + 0.07,
        label,
        fontsize=7.5,
        ha="center",
        va="top",
        color="#212121",
    )


def _draw_image(
    axes: "Axes",
    image: Image.Image,
    left: float,
    top: float,
    colour: str,
    linestyle: str,
    linewidth: float,
) -> None:
    """Fit the image into its square, uncropped, and frame the square."""
    from matplotlib.patches import Rectangle

    scale = IMAGE / max(image.size)
    width, height = (side * scale for side in image.size)
    x, y = left + (IMAGE - width) / 2, top + (IMAGE - height) / 2
    axes.imshow(image.convert("RGB"), extent=(x, x + width, y + height, y), zorder=1)
    axes.add_patch(
        Rectangle(
            (left, top),
            IMAGE,
            IMAGE,
            fill=False,
            edgecolor=colour,
            linestyle=linestyle,
            linewidth=linewidth,
            zorder=2,
        )
    )


def shorten(name: str, width: int = LABEL_CHARACTERS, num_lines: int = LABEL_LINES) -> str:
    """Break a class name into a few short lines, at spaces, "_" or "/" where possible.

    What does not fit ends in an ellipsis.
    """
    lines: list[str] = []
    rest = " ".join(name.split())
    while len(rest) > width and len(lines) < num_lines - 1:
        cut = max(rest.rfind(mark, 0, width) for mark in " _/") + 1
        cut = cut if cut > 1 else width
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    lines.append(rest if len(rest) <= width else rest[: width - 1] + "\u2026")
    return "\n".join(lines)


def _write(figure: "Figure", path: Path) -> None:
    """Write under another name first: a reader never finds half a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    partial = path.with_name(f".{path.name}.partial")
    try:
        # No software version inside: equal pictures are equal files.
        FigureCanvasAgg(figure).print_png(partial, metadata={"Software": None})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
