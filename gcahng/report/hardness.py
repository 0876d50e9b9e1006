"""How hard the negatives were over training: pictures of the rows of `hardness.jsonl` (`gcahng.training.hardness`).

matplotlib (extra `report`) is imported on the first call.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcahng.report.chart import (
    COLOURS,
    CSS_WIDTH,
    GRID,
    LEFT,
    RIGHT,
    WIDTH,
    area_key,
    chart_png,
    chart_style,
    line_key,
    new_chart,
    round_ticks,
    run_line,
)
from gcahng.report.curves import Curve, Panel, draw
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section
from gcahng.training.canvas import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = NDArray[np.float64]

# Inches: heights of plots, and room for the steps beside ridges.
PLOT, MAP_PLOT, RIDGE = 1.85, 1.22, 0.44
RIDGE_LEFT = 0.82
RIDGES = 6
BEFORE, AFTER, POSITIVE = "#78848c", COLOURS[0], COLOURS[1]
MAP_DARK = "#08306b"
# Shares of all values that may lie outside of a picture, on either side.
OUTSIDE = 0.01
SPREAD_LINES = ("min", "q25", "median", "q75", "max")


@dataclass(frozen=True)
class Recorded:
    """The records of one run.

    Attributes:
        run: Its name.
        index: Its place among the runs, which decides its colour.
        rows: At least one, in the order of steps, all with the same edges of bins.
    """

    run: str
    index: int
    rows: list[dict[str, Any]]

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]

    def has(self, name: str) -> bool:
        """Whether all rows have it."""
        return all(row.get(name) is not None for row in self.rows)

    def densities(self, name: str) -> Values:
        """(rows, bins) shares of a histogram."""
        counts = np.array([row[name] for row in self.rows], dtype=np.float64)
        return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def hardness_section(runs: Sequence[RunData]) -> Section | None:
    """Distributions of distances and coefficients over training, and what became of the synthetic negatives.

    Args:
        runs: Those that recorded nothing are left out.
    Returns:
        None if no run recorded anything.
    """
    found = [recorded for index, run in enumerate(runs) if (recorded := _recorded(run, index)) is not None]
    if not found:
        return None
    figures: list[Figure] = []
    with chart_style():
        window = _distance_window(found)
        figures += [_ridges(each, window) for each in found]
        over_time = [each for each in found if len(each.rows) > 1]
        figures += [_distance_maps(each, window) for each in over_time if each.has("d_synthetic")]
        figures += [_coefficient_map(each) for each in over_time if each.has("coefficients")]
        if spread := [each for each in found if each.has("coefficient_channel_std")]:
            figures.append(_spreads(spread))
    figures += [draw(panel) for panel in _panels(found)]
    return Section("hardness", "Hardness of the negatives", _intro(runs, found), figures)


def _intro(runs: Sequence[RunData], found: Sequence[Recorded]) -> str:
    text = (
        "Batches of training, at the steps that were recorded. A negative is hard if it is as near to its anchor as "
        "the positive; distances are those in which the interpolation is computed. "
    )
    if any(each.has("d_synthetic") for each in found):
        text += (
            "Interpolation pulls each negative towards its anchor, channel by channel, but no nearer than the positive "
            "is; a coefficient of 1 pulls the least, 0 the most. "
        )
    missing = [printable(run.name) for run in runs if run.name not in {each.run for each in found}]
    return text + (f"Nothing was recorded in: {', '.join(missing)}." if missing else "")


def _recorded(run: RunData, index: int) -> Recorded | None:
    """The rows that can be drawn together: those with the newest row's edges."""
    needed = ("distance_edges", "d_positive", "d_negative")
    rows = [row for row in run.hardness if all(row.get(name) for name in needed)]
    edges = ("distance_edges", "coefficient_edges")
    rows = [row for row in rows if all(row.get(name) == rows[-1].get(name) for name in edges)]
    return Recorded(run.name, index, sorted(rows, key=lambda row: row["step"])) if rows else None


def _panels(found: Sequence[Recorded]) -> Iterator[Panel]:
    """Quantities of one number per record."""
    yield from _panel(
        "pulled",
        "Distance left after interpolation, %",
        found,
        lambda row: 100 * row["mean_d_synthetic"] / row["mean_d_negative"] if "mean_d_synthetic" in row else None,
    )
    yield from _panel(
        "synthetic-own-class-share",
        "Synthetic negatives classified as their class, %",
        found,
        lambda row: None if row.get("synthetic_own_class_share") is None else 100 * row["synthetic_own_class_share"],
    )


def _panel(name: str, title: str, found: Sequence[Recorded], value: Any) -> Iterator[Panel]:
    curves, indices = [], []
    for each in found:
        points = [(row["step"], float(y)) for row in each.rows if (y := value(row)) is not None and math.isfinite(y)]
        if points:
            curves.append(Curve(each.run, [step for step, _ in points], [y for _, y in points]))
            indices.append(each.index)
    if curves:
        yield Panel(f"hardness-{name}", title, "step", curves, indices)


def _distance_window(found: Sequence[Recorded]) -> tuple[float, float]:
    """Least and largest distance to show, the same for all runs so that they can be compared."""
    low, high = [], []
    for each in found:
        edges = np.array(each.rows[0]["distance_edges"])
        names = [name for name in ("d_positive", "d_negative", "d_synthetic") if each.has(name)]
        for name in names:
            reached = np.cumsum(each.densities(name), axis=1)
            low.append(float(edges[:-1][(reached <= OUTSIDE).sum(1).clip(max=len(edges) - 2)].min()))
            high.append(float(edges[1:][(reached < 1 - OUTSIDE).sum(1).clip(max=len(edges) - 2)].max()))
    return min(low) / 1.05, max(high) * 1.05


def _ridges(recorded: Recorded, window: tuple[float, float]) -> Figure:
    """Distances of negatives at a few steps, one above the other, training downwards."""
    rows = [recorded.rows[i] for i in _spaced(len(recorded.rows), RIDGES)]
    pulled = recorded.has("d_synthetic")
    kinds = [("d_negative", BEFORE)] + ([("d_synthetic", AFTER)] if pulled else [])
    keys = [area_key("before" if pulled else "negatives", BEFORE)]
    keys += [area_key("interpolated", AFTER)] if pulled else []
    keys += [line_key("mean positive", {"color": POSITIVE})]
    plot = RIDGE * len(rows) + 0.34
    title = "Distance from anchor to negative"
    figure, axes = new_chart(title, plot, keys, subtitle=recorded.run, left=RIDGE_LEFT)
    axes.grid(False)
    edges = np.array(rows[0]["distance_edges"])
    shapes = {
        (place, name): _smooth(np.array(row[name]) / max(sum(row[name]), 1))
        for place, row in enumerate(rows)
        for name, _ in kinds
    }
    peak = max(float(shape.max()) for shape in shapes.values())
    for place, row in enumerate(rows):
        axes.axhline(-place, color=GRID, linewidth=0.8, zorder=1)
        for name, colour in kinds:
            shape = shapes[place, name]
            top = -place + 1.4 * shape / max(peak, 1e-9)
            centres = np.sqrt(edges[1:] * edges[:-1])
            axes.fill_between(centres, -place, top, color=colour, alpha=0.3, linewidth=0, zorder=3 + place)
            line = np.where(shape > 0.002, top, np.nan)
            axes.plot(centres, line, color=colour, linewidth=1.3, zorder=3.5 + place)
        mean = row["mean_d_positive"]
        axes.plot([mean, mean], [-place, -place + 0.66], color=POSITIVE, linewidth=2.2, zorder=4 + place)
        _row_label(axes, -place, f"step {row['step']}")
    axes.set(xscale="log", xlim=window, ylim=(-len(rows) + 0.95, 1.4), yticks=[], xlabel="distance, logarithmic")
    _distance_ticks(axes.xaxis, window)
    return Figure(
        f"hardness-distances-{recorded.index}",
        chart_png(figure),
        f"{recorded.run}: distributions of the distances from anchors to negatives at {len(rows)} steps. At the last "
        f"one the mean of positives is {_digits(rows[-1], 'mean_d_positive')}, of negatives "
        f"{_digits(rows[-1], 'mean_d_negative')}"
        + (f", after interpolation {_digits(rows[-1], 'mean_d_synthetic')}." if pulled else "."),
        "Each row is the batch of one step. "
        + ("A blue hill left of its grey one: interpolation has made the negatives harder." if pulled else ""),
        css_width=CSS_WIDTH,
    )


def _distance_maps(recorded: Recorded, window: tuple[float, float]) -> Figure:
    """Distances of negatives over all recorded steps, before interpolation above, after it below."""
    keys = [line_key("mean positive", {"color": POSITIVE}), area_key("negatives (dark: many)", MAP_DARK)]
    title = "Distance to negatives over training"
    figure, upper = new_chart(title, 2 * MAP_PLOT + 0.3, keys, subtitle=recorded.run)
    bottom, height = upper.get_position().y0, figure.get_figheight()
    width = 1 - (LEFT + RIGHT) / WIDTH
    lower = figure.add_axes((LEFT / WIDTH, bottom, width, MAP_PLOT / height))
    upper.set_position((LEFT / WIDTH, bottom + (MAP_PLOT + 0.2) / height, width, MAP_PLOT / height))
    shares = {name: np.apply_along_axis(_smooth, 1, recorded.densities(name)) for name in ("d_negative", "d_synthetic")}
    darkest = max(float(np.quantile(share[share > 0], 0.98)) for share in shares.values())
    means = [row["mean_d_positive"] for row in recorded.rows]
    for axes, name, text in ((upper, "d_negative", "before"), (lower, "d_synthetic", "interpolated")):
        _heat(axes, recorded.steps, np.array(recorded.rows[0]["distance_edges"]), shares[name], darkest)
        axes.plot(recorded.steps, means, color=POSITIVE, linewidth=1.7)
        axes.set(yscale="log", ylim=window)
        _distance_ticks(axes.yaxis, window)
        _inside(axes, text)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("step")
    return Figure(
        f"hardness-distance-map-{recorded.index}",
        chart_png(figure),
        f"{recorded.run}: distances from anchors to negatives over the steps of training, before and after "
        f"interpolation, with the mean distance of positives. Mean after interpolation: "
        f"{_digits(recorded.rows[0], 'mean_d_synthetic')} at first, {_digits(recorded.rows[-1], 'mean_d_synthetic')} "
        "at last.",
        "The same over all recorded steps.",
        css_width=CSS_WIDTH,
    )


def _coefficient_map(recorded: Recorded) -> Figure:
    """Coefficients of all edges and channels over the recorded steps, with their median."""
    edges = np.array(recorded.rows[0]["coefficient_edges"])
    shares = recorded.densities("coefficients")
    keys = [line_key("median", {"color": POSITIVE}), area_key("coefficients (dark: many)", MAP_DARK)]
    figure, axes = new_chart("Pull coefficients over training", PLOT, keys, subtitle=recorded.run)
    _heat(axes, recorded.steps, edges, shares, float(np.quantile(shares[shares > 0], 0.98)))
    medians = [_quantile(edges, share, 0.5) for share in shares]
    axes.plot(recorded.steps, medians, color=POSITIVE, linewidth=1.7)
    axes.set(ylim=(0, 1), xlabel="step", yticks=[0, 0.25, 0.5, 0.75, 1])
    return Figure(
        f"hardness-coefficients-{recorded.index}",
        chart_png(figure),
        f"{recorded.run}: distribution of the pull coefficients of all edges and channels over the steps of training. "
        f"The median is {medians[0]:.2f} at first, {medians[-1]:.2f} at last.",
        "Of all edges and channels of a batch. 0 pulls the negative's channel as near as it may come; 1 leaves it to "
        "the common pull factor.",
        css_width=CSS_WIDTH,
    )


def _spreads(found: Sequence[Recorded]) -> Figure:
    """How far the coefficients of an edge differ between channels: median and quartiles of all edges."""
    keys = [line_key(each.run, run_line(each.index)) for each in found]
    figure, axes = new_chart("Spread of coefficients over channels", PLOT, keys)
    for each in found:
        line = run_line(each.index)
        colour = line["color"]
        values = {name: [row["coefficient_channel_std"][name] for row in each.rows] for name in SPREAD_LINES}
        axes.fill_between(each.steps, values["q25"], values["q75"], color=colour, alpha=0.25, linewidth=0)
        for name in ("min", "max"):
            axes.plot(each.steps, values[name], color=colour, linewidth=0.9, linestyle=":")
        marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(each.steps) <= 12 else {}
        axes.plot(each.steps, values["median"], linewidth=1.7, **line, **marker)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.set_xlabel("step")
    round_ticks(axes.xaxis, whole=True)
    round_ticks(axes.yaxis)
    medians = ", ".join(f"{each.run} {_digits(each.rows[-1]['coefficient_channel_std'], 'median')}" for each in found)
    return Figure(
        "hardness-channel-spread",
        chart_png(figure),
        f"Standard deviation of an edge's coefficients over the channels. Last medians: {medians}.",
        "Standard deviation of an edge's coefficients over the channels: median (line), quartiles (band), least and "
        "largest (dotted) of all edges of a batch.",
        css_width=CSS_WIDTH,
    )


def _heat(axes: "Axes", steps: Sequence[int], edges: Values, shares: Values, darkest: float) -> None:
    """Shares (rows, bins) as columns of colour from white to dark, each as wide as its time."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#c6dbef", "#6baed6", COLOURS[0], MAP_DARK])
    times = np.asarray(steps, dtype=np.float64)
    between = (times[1:] + times[:-1]) / 2
    sides = np.concatenate([[2 * times[0] - between[0]], between, [2 * times[-1] - between[-1]]])
    axes.pcolormesh(sides, edges, shares.T, cmap=colours, vmin=0, vmax=darkest, rasterized=True)
    axes.set_xlim(times[0], times[-1])
    axes.grid(False)
    round_ticks(axes.xaxis, whole=True)


def _inside(axes: "Axes", text: str) -> None:
    """A word in the lower right corner of a plot, where distances are short and rare."""
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axes.text(0.985, 0.05, text, transform=axes.transAxes, ha="right", va="bottom", weight="bold", bbox=box)


def _row_label(axes: "Axes", y: float, text: str) -> None:
    axes.text(-0.02, y + 0.04, text, transform=axes.get_yaxis_transform(), ha="right", va="bottom")


def _distance_ticks(axis: Any, window: tuple[float, float]) -> None:
    """Ticks at 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = window
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _spaced(count: int, most: int) -> list[int]:
    """Up to `most` numbers below `count`, evenly spaced, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _smooth(shares: Values) -> Values:
    """Means over neighbouring bins: a batch has too few anchors for single ones."""
    weights = np.array([1, 3, 4, 3, 1]) / 12
    return np.convolve(shares, weights, mode="same")


def _quantile(edges: Values, shares: Values, share: float) -> float:
    """Where the running sum of a histogram reaches `share`."""
    reached = np.concatenate([[0.0], np.cumsum(shares)])
    return float(np.interp(share * reached[-1], reached, edges))


def _digits(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3g}"
