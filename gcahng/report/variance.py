"""How much the features of a backbone vary with its pooling: the question of the paper's figure 8.

matplotlib (extra `report`) is imported on the first call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gcahng.report.chart import (
    COLOURS,
    CSS_WIDTH,
    GAP,
    MARGIN,
    POINTS,
    WIDTH,
    area_key,
    chart_png,
    chart_style,
    new_chart,
    round_ticks,
)
from gcahng.report.embedded import EmbeddedRun
from gcahng.report.features import ChannelMoments
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section, Table
from gcahng.training.canvas import fitted

WORDS = {"avg": "average", "max": "maximum", "avg+max": "avg + max", "cls": "class token"}
# Inches; on the right there is room for a number.
LEFT, RIGHT = 0.98, 0.62
BAR, GROUP_HEAD = 0.24, 0.3
OVER_IMAGES, BETWEEN_CHANNELS = COLOURS[0], "#9ecae1"
INTRO = (
    "Variance of the backbone's features of the evaluated images, after each way of pooling and before any "
    "normalisation. The paper (its figure 8) finds that generators trained to reproduce features gain the less the "
    "larger their variance is. How it computes a variance it does not say: the numbers here are to be compared with "
    "each other alone. Over images: how far a channel's values differ from image to image, the mean of all "
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


def _picture(groups: Sequence[tuple[RunData, Sequence[Bar]]]) -> Figure:
    plot = GAP + sum(GROUP_HEAD + BAR * len(bars) for _, bars in groups)
    keys = [area_key("over images", OVER_IMAGES), area_key("between channels", BETWEEN_CHANNELS)]
    with chart_style():
        figure, axes = new_chart("Variance of features", plot, keys, left=LEFT, right=RIGHT)
        axes.grid(False, axis="y")
        top = 0.0
        for run, bars in groups:
            axes.text(
                (MARGIN - LEFT) / (WIDTH - LEFT - RIGHT),
                top + GROUP_HEAD * 0.62,
                fitted(figure, f"{run.name}: {run.config.model.backbone}", WIDTH - 2 * MARGIN, 1, fontsize=POINTS),
                transform=axes.get_yaxis_transform(),
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
            top += GROUP_HEAD
            for bar in bars:
                middle, over = top + BAR / 2, bar.moments.over_images
                weight = "bold" if bar.used else "normal"
                axes.barh(middle, over, 0.7 * BAR, color=OVER_IMAGES)
                axes.barh(middle, bar.moments.between_channels, 0.7 * BAR, left=over, color=BETWEEN_CHANNELS)
                values: dict[str, Any] = {"va": "center_baseline", "weight": weight}
                axes.annotate(
                    _digits(bar.moments.total),
                    (bar.moments.total, middle),
                    (4, 0),
                    textcoords="offset points",
                    **values,
                )
                axes.text(-0.02, middle, WORDS[bar.pooling], transform=axes.get_yaxis_transform(), ha="right", **values)
                top += BAR
        axes.set(ylim=(plot - GAP, 0), yticks=[], xlabel="variance (bold: the pooling of the run)")
        axes.set_xlim(left=0)
        axes.spines["left"].set_visible(True)
        axes.spines["bottom"].set_visible(False)
        round_ticks(axes.xaxis)
        png = chart_png(figure)
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
