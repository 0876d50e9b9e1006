"""Charts narrow enough for a telephone: 380 CSS pixels wide at two pixels each, with text of 9 points or more."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gcahng.training.canvas import fitted, fonts, png_bytes, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CSS_WIDTH = 380
CSS_INCH = 96
DOTS_PER_INCH = 2 * CSS_INCH
POINTS = 9
INK = "#212121"
FAINT = "#90a4ae"
# Told apart by most colour-blind readers (Okabe and Ito), and never by colour alone.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b4b9a", "#7a7a00", "#8c2d04", "#3d3d3d")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", "*", ">")
LINES = ("-", "--", "-.", ":")

_STYLE: dict[Any, Any] = {
    "font.size": POINTS,
    "axes.titlesize": POINTS + 1,
    "axes.labelsize": POINTS,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS,
    "legend.fontsize": POINTS,
    "text.parse_math": False,
}


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


def new_chart(title: str, css_height: float) -> "tuple[Figure, Axes]":
    """An empty chart as wide as the page's figures; to be made and drawn in `chart_style`."""
    from matplotlib.figure import Figure

    figure = Figure((CSS_WIDTH / CSS_INCH, css_height / CSS_INCH), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    room = CSS_WIDTH / CSS_INCH - 0.6
    title = fitted(figure, title, room, 1, fontsize=POINTS + 1, fontweight="bold")
    axes.set_title(title, loc="left", fontsize=POINTS + 1, fontweight="bold", color=INK, parse_math=False)
    return figure, axes


def legend_below(figure: "Figure", handles: Sequence[Any], names: Sequence[str], columns: int = 2) -> None:
    """A legend under the chart; names are shortened to fit, and drawn as they are, whatever signs they have."""
    room = CSS_WIDTH / CSS_INCH / columns - 0.42  # inches: beside the marks
    # matplotlib leaves out labels that begin with "_": they are put in afterwards.
    legend = figure.legend(
        handles,
        ["x"] * len(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handletextpad=0.4,
        columnspacing=1.2,
        borderaxespad=0.1,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(fitted(figure, name, room, 1, fontsize=POINTS))


def chart_png(figure: "Figure") -> bytes:
    """The PNG file of a chart."""
    return png_bytes(figure)
