"""How much the features of a backbone vary with its pooling (the paper's figure 8).

matplotlib (extra `report`) is imported on the first call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gcahng.report.chart import COLOURS, CSS_INCH, CSS_WIDTH, DOTS_PER_INCH, FAINT, INK, POINTS, chart_png, chart_style
from gcahng.report.embedded import EmbeddedRun
from gcahng.report.features import ChannelMoments
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section, Table
from gcahng.training.canvas import printable

WORDS = {"avg": "average", "max": "maximum", "avg+max": "avg + max", "cls": "class token"}
# Inches.
WIDTH = CSS_WIDTH / CSS_INCH
LEFT, RIGHT, TITLE, LINE, BOTTOM = 0.98, 0.62, 0.36, 0.2, 0.47
BAR, GROUP_HEAD = 0.24, 0.3
NAME_CHARACTERS = 48
OVER_IMAGES, BETWEEN_CHANNELS = COLOURS[0], "#9ecae1"
INTRO = (
    "Variance of the backbone's features of the evaluated images, after each way of pooling and before any "
    "normalisation. Generators that are trained to reproduce features have the more trouble the larger it is; "
    "interpolation has none. Over images: how far a channel's values differ from image to image, the mean of all "
    "channels; between channels: how far the channels' means differ. Their sum is the variance of all values."
)


@dataclass(frozen=True)
class Bar:
    """One backbone with one pooling."""

    pooling: str
    used: bool
    moments: ChannelMoments


def variance_section(runs: Sequence[RunData], embedded: Mapping[str, EmbeddedRun]) -> Section | None:
    """A picture and a table of feature variances.

    Args:
        runs: In the order to show.
        embedded: By name; runs that are not in it are left out.
    Returns:
        None if no run is in it.
    """
    groups = [
        (
            run,
            [
                Bar(name, name == run.config.model.pooling, moments)
                for name, moments in embedded[run.name].features.items()
            ],
        )
        for run in runs
        if run.name in embedded and embedded[run.name].features
    ]
    if not groups:
        return None
    return Section("variance", "Feature variance", INTRO, [_picture(groups), _table(groups)])


def _heading(run: RunData) -> str:
    text = printable(f"{run.name}: {run.config.model.backbone}")
    return text if len(text) <= NAME_CHARACTERS else text[: NAME_CHARACTERS - 1] + "\u2026"


def _picture(groups: Sequence[tuple[RunData, Sequence[Bar]]]) -> Figure:
    plot = sum(GROUP_HEAD + BAR * len(bars) for _, bars in groups)
    height = TITLE + LINE + plot + BOTTOM
    with chart_style():
        from matplotlib.figure import Figure as Canvas
        from matplotlib.patches import Rectangle

        canvas = Canvas((WIDTH, height), dpi=DOTS_PER_INCH)
        canvas.text(0.1 / WIDTH, 1 - 0.1 / height, "Variance of features", va="top", weight="bold", size=POINTS + 1)
        level = height - TITLE
        for x, text, colour in ((0.1, "over images", OVER_IMAGES), (1.3, "between channels", BETWEEN_CHANNELS)):
            swatch = (x / WIDTH, (level - 0.125) / height)
            canvas.add_artist(Rectangle(swatch, 0.17 / WIDTH, 0.1 / height, color=colour, linewidth=0))
            canvas.text((x + 0.24) / WIDTH, level / height, text, va="top", color=INK)
        axes = canvas.add_axes((LEFT / WIDTH, BOTTOM / height, 1 - (LEFT + RIGHT) / WIDTH, plot / height))
        top = 0.0
        for run, bars in groups:
            axes.text(
                (0.1 - LEFT) / (WIDTH - LEFT - RIGHT),
                top + GROUP_HEAD * 0.62,
                _heading(run),
                transform=axes.get_yaxis_transform(),
                va="center",
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
            top += GROUP_HEAD
            for bar in bars:
                middle, over = top + BAR / 2, bar.moments.over_images
                weight = "bold" if bar.used else "normal"
                axes.barh(middle, over, 0.7 * BAR, color=OVER_IMAGES)
                axes.barh(middle, bar.moments.between_channels, 0.7 * BAR, left=over, color=BETWEEN_CHANNELS)
                values: dict[str, Any] = {"va": "center_baseline", "color": INK, "weight": weight}
                axes.annotate(
                    _digits(bar.moments.total),
                    (bar.moments.total, middle),
                    (4, 0),
                    textcoords="offset points",
                    **values,
                )
                axes.text(-0.02, middle, WORDS[bar.pooling], transform=axes.get_yaxis_transform(), ha="right", **values)
                top += BAR
        axes.set(ylim=(plot, 0), yticks=[], xlabel="variance (bold: the pooling of the run)")
        axes.set_xlim(left=0)
        axes.xaxis.label.set_color(INK)
        axes.grid(True, axis="x", color="#dfe3e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(FAINT)
        axes.tick_params(length=0, colors=INK, labelsize=POINTS)
        axes.locator_params(axis="x", nbins=4)
        png = chart_png(canvas)
    spoken = "; ".join(
        f"{run.name} " + ", ".join(f"{WORDS[bar.pooling]} {_digits(bar.moments.total)}" for bar in bars)
        for run, bars in groups
    )
    return Figure("feature-variance", png, f"Variance of features by pooling: {spoken}.", css_width=CSS_WIDTH)


def _table(groups: Sequence[tuple[RunData, Sequence[Bar]]]) -> Table:
    rows = [
        [
            run.name,
            run.config.model.backbone,
            WORDS[bar.pooling] + (" (used)" if bar.used else ""),
            f"{bar.moments.count:,}",
            _digits(float(bar.moments.mean.mean())),
            _digits(bar.moments.total),
            _digits(bar.moments.over_images),
            _digits(bar.moments.between_channels),
        ]
        for run, bars in groups
        for bar in bars
    ]
    columns = ("Run", "Backbone", "Pooling", "Images", "Mean", "Variance", "Over images", "Between channels")
    return Table(columns, rows, "Features as they come from the backbone, of all evaluated images.")


def _digits(value: float) -> str:
    """Three digits, zeros at their end among them."""
    return f"{value:#.3g}".removesuffix(".")
