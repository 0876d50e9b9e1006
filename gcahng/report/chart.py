"""Charts narrow enough for a telephone: 380 CSS pixels wide at two pixels each, with text of 9 points or more.

All of them have one plan: a title, perhaps whose it is, a key, and the plot below. Lengths are in inches.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gcahng.training.canvas import fonts, measured, png_bytes, printable, require_matplotlib, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CSS_WIDTH = 380
CSS_INCH = 96
DOTS_PER_INCH = 2 * CSS_INCH
POINTS = 9
INK = "#212121"
FAINT = "#90a4ae"
GRID = "#dfe3e8"
# Told apart by most colour-blind readers (Okabe and Ito), and never by colour alone.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b4b9a", "#7a7a00", "#8c2d04", "#3d3d3d")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", "*", ">")
LINES = ("-", "--", "-.", ":")
DASH = 2  # times the width of a line

WIDTH = CSS_WIDTH / CSS_INCH
MARGIN, TITLE, LINE = 0.1, 0.34, 0.2
# Around the plot; on the left there is room for numbers, below it for numbers and a name.
LEFT, RIGHT, BOTTOM, GAP = 0.58, 0.14, 0.47, 0.1
MARK, MARK_GAP, COLUMN_GAP, MOST_COLUMNS = 0.26, 0.08, 0.16, 3

_STYLE: dict[Any, Any] = {
    "font.size": POINTS,
    "text.color": INK,
    "axes.labelsize": POINTS,
    "axes.labelcolor": INK,
    "axes.labelpad": 2,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "xtick.labelsize": POINTS,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.color": INK,
    "ytick.labelsize": POINTS,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Key:
    """A line of a chart's key.

    Attributes:
        text: Shortened where it does not fit.
        mark: The look of matplotlib's `Line2D`.
        value: Behind the text, never shortened.
    """

    text: str
    mark: Mapping[str, Any]
    value: str = ""


def line_key(text: str, look: Mapping[str, Any], value: str = "") -> Key:
    """The key of a line, with the look that it has in the plot."""
    return Key(text, {"linewidth": 2.2} | dict(look), value)


def area_key(text: str, colour: str) -> Key:
    """The key of a coloured area."""
    return Key(text, {"color": colour, "linewidth": 7, "solid_capstyle": "butt"})


def point_key(text: str, colour: str, marker: str, area: float, **look: Any) -> Key:
    """The key of points of a scatter plot; `area` in square points as there."""
    return Key(text, {"color": colour, "marker": marker, "markersize": area**0.5, "linestyle": "none"} | look)


def run_line(index: int, *, below: int = 0, above: int = 0) -> dict[str, Any]:
    """How a run is drawn in every chart, by its place in the report: its colour, dashed where the palette repeats.

    Args:
        index: Its place.
        below, above: So many other lines lie under it and upon it; all of them are to be seen.
    """
    times_round = index // len(COLOURS)
    dashes = (0, (DASH * (above + 1), DASH * below)) if below else LINES[times_round % len(LINES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}


@contextmanager
def chart_style() -> Iterator[None]:
    """Within it, figures are made and drawn in the report's style.

    Raises:
        InputError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import rc_context

    with rc_context(_STYLE | {"font.family": list(fonts())}):
        yield


def new_chart(
    title: str,
    plot: float,
    keys: Sequence[Key] = (),
    *,
    subtitle: str = "",
    left: float = LEFT,
    right: float = RIGHT,
    bottom: float = BOTTOM,
) -> "tuple[Figure, Axes]":
    """An empty chart as wide as the page's figures, of any texts; to be made and drawn in `chart_style`.

    Args:
        title: Above it.
        plot: Height of the plot; the chart grows by its title and key.
        keys: As many side by side as fit.
        subtitle: Below the title.
        left, right, bottom: Around the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, 1), dpi=DOTS_PER_INCH)  # its height follows
    places, rows = _key_places(figure, keys)
    height = bottom + plot + TITLE + LINE * (rows + bool(subtitle))
    figure.set_figheight(height)
    bold = {"weight": "bold", "fontsize": POINTS + 1}
    room = WIDTH - 2 * MARGIN
    _write(figure, MARGIN, height - MARGIN, shorten(title, room, 1, measured(figure, **bold)), **bold)
    top = height - TITLE
    if subtitle:
        _write(figure, MARGIN, top, shorten(subtitle, room, 1, measured(figure, fontsize=POINTS)))
        top -= LINE
    for key, (row, x, key_room) in zip(keys, places, strict=True):
        _draw_key(figure, key, x, top - LINE * row, key_room)
    box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, (plot - GAP) / height)
    return figure, figure.add_axes(box)


def _key_places(figure: "Figure", keys: Sequence[Key]) -> tuple[list[tuple[int, float, float]], int]:
    """Row, place and width of each: all in one row, or in as many columns as the widest allows. And the rows."""
    measure = measured(figure, fontsize=POINTS)
    widths = [MARK + MARK_GAP + measure(_with_value(printable(key.text), key)) + COLUMN_GAP for key in keys]
    room = WIDTH - 2 * MARGIN + COLUMN_GAP
    if sum(widths) <= room:
        lefts = [MARGIN + sum(widths[:number]) for number in range(len(keys))]
        return [(0, x, width) for x, width in zip(lefts, widths, strict=True)], min(1, len(keys))
    columns = max(1, min(int(room / max(widths)), MOST_COLUMNS))
    width = room / columns
    places = [(number // columns, MARGIN + number % columns * width, width - COLUMN_GAP) for number in range(len(keys))]
    return places, -(-len(keys) // columns)


def _with_value(text: str, key: Key) -> str:
    return f"{text}  {key.value}" if key.value else text


def _draw_key(figure: "Figure", key: Key, x: float, y: float, room: float) -> None:
    """A mark and its text, which starts at height `y` and takes no more than `room` with it."""
    from matplotlib.lines import Line2D

    height, measure = figure.get_figheight(), measured(figure, fontsize=POINTS)
    level = (y - 0.072) / height
    ends = [x + MARK / 2] if key.mark.get("linestyle") == "none" else [x, x + MARK]
    figure.add_artist(Line2D([end / WIDTH for end in ends], [level] * len(ends), **key.mark))
    text = shorten(key.text, room - MARK - MARK_GAP - measure(_with_value("", key)), 1, measure)
    _write(figure, x + MARK + MARK_GAP, y, _with_value(text, key))


def _write(figure: "Figure", x: float, y: float, text: str, **look: Any) -> None:
    """Write on the figure, `y` being the top of the text."""
    figure.text(x / WIDTH, y / figure.get_figheight(), text, va="top", **look)


def round_ticks(axis: Any, *, whole: bool = False) -> None:
    """About five ticks of an axis at round numbers, `whole` ones where only those mean something."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole))


def chart_png(figure: "Figure") -> bytes:
    """The PNG file of a chart."""
    return png_bytes(figure)
