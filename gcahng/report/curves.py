"""Learning curves: one small picture per quantity, all runs in each.

matplotlib (extra `report`) is imported on the first call.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from gcahng.report.chart import (
    CSS_WIDTH,
    chart_png,
    chart_style,
    line_key,
    new_chart,
    round_ticks,
    run_line,
)
from gcahng.report.facts import all_columns, evaluations, number
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = 1.85  # inches
# Curves of more points than this are drawn as a running mean over a faint line.
MANY_POINTS = 120

LOSS_TITLES = {
    "total_loss": "Metric pass, all losses",
    "metric_loss": "Metric loss",
    "synthetic_loss": "Loss on synthetic negatives",
    "node_loss": "Node classification loss",
    "classifier_loss": "Classifier loss",
    "generation_loss": "Generation pass, all losses",
    "classification_loss": "Synthetic negatives: classification loss",
    "similarity_loss": "Synthetic negatives: similarity loss",
    "diversity_loss": "Synthetic negatives: diversity loss",
}
HARDNESS_TITLES = {
    "synthetic_weight": "Weight of the loss on synthetic negatives",
    "pull_factor": "Pull factor exp(-\u03b1 / mean metric loss)",
}


@dataclass(frozen=True)
class Curve:
    """One quantity of one run: values over steps or epochs, NaN where it was not finite."""

    run: str
    xs: list[float]
    ys: list[float]


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        name: Of the file.
        title: Above it.
        x_label: What the curves run over.
        curves: One per run that has the quantity; `indices` are the runs' places, which decide colours.
        log_scale: Values are positive and span orders of magnitude.
    """

    name: str
    title: str
    x_label: str
    curves: list[Curve]
    indices: list[int]
    log_scale: bool = False


def curves_section(runs: Sequence[RunData]) -> Section | None:
    """Metrics, losses, hard negatives, learning rates and times of all runs; None before anything was logged."""
    parts: list[Figure | Table | Markup] = []
    long_curves = False
    for heading, panels in (
        ("Metrics", _metric_panels(runs)),
        ("Losses", _loss_panels(runs)),
        ("Hard negatives", _hardness_panels(runs)),
        ("Learning rates and time", _rate_panels(runs)),
    ):
        found = list(panels)
        long_curves |= any(len(curve.xs) > MANY_POINTS for panel in found for curve in panel.curves)
        if found:
            parts += [Markup("<h3>{}</h3>").format(heading), *map(draw, found)]
    if not parts:
        return None
    intro = "Each picture shows one quantity of all runs that have it; the number beside a name is its last value. "
    if long_curves:
        intro += "Long curves are drawn as a running mean over the single values, which are faint. "
    return Section("curves", "Learning curves", intro + "Metrics are in percent, on unseen classes.", parts)


def _metric_panels(runs: Sequence[RunData]) -> Iterator[Panel]:
    splits = dict.fromkeys(row.get("split", "test") for run in runs for row in run.of_kind("evaluation"))
    for split in splits:
        tables = [[(row["epoch"], all_columns(run, row)) for row in evaluations(run, split)] for run in runs]
        names = list(dict.fromkeys(name for table in tables for _, columns in table for name in columns))
        # The two that are compared most stand first.
        names.sort(key=lambda name: ("R@1", "MAP@R", "RP", name).index(name))
        for name in names:
            found = [
                (index, Curve(run.name, [e for e, c in table if name in c], [c[name] for _, c in table if name in c]))
                for index, (run, table) in enumerate(zip(runs, tables, strict=True))
            ]
            title = name if len(splits) == 1 else f"{name}, {split}"
            yield from _panel(f"curve-{_slug(split)}-{_slug(name)}", title, "epoch", found)


def _logged(runs: Sequence[RunData]) -> list[str]:
    """Names of what any run has logged of its steps."""
    return list(dict.fromkeys(key for run in runs for row in run.of_kind("step") for key in row))


def _loss_panels(runs: Sequence[RunData]) -> Iterator[Panel]:
    losses = [key for key in _logged(runs) if key.endswith("_loss")]
    for key in [key for key in LOSS_TITLES if key in losses] + [key for key in losses if key not in LOSS_TITLES]:
        yield from _step_panel(runs, key, LOSS_TITLES.get(key, _words(key)))


def _hardness_panels(runs: Sequence[RunData]) -> Iterator[Panel]:
    yield from _step_panel(runs, "hard_negative_ratio", "Hard-negative ratio, %", 100)
    for key, title in HARDNESS_TITLES.items():
        yield from _step_panel(runs, key, title)


def _rate_panels(runs: Sequence[RunData]) -> Iterator[Panel]:
    for key in _logged(runs):
        if key.startswith("lr_"):
            yield from _step_panel(runs, key, f"Learning rate: {_words(key[3:]).lower()}", log_scale=True)
    yield from _step_panel(runs, "step_seconds", "Time per step, ms", 1000)
    yield from _step_panel(runs, "data_seconds", "Waiting for data in each step, ms", 1000)


def _step_panel(
    runs: Sequence[RunData],
    key: str,
    title: str,
    factor: float = 1,
    *,
    log_scale: bool = False,
) -> Iterator[Panel]:
    found = []
    for index, run in enumerate(runs):
        rows = [(row["step"], number(row[key])) for row in run.of_kind("step") if key in row]
        points = [(step, factor * value) for step, value in rows if isinstance(value, int | float)]
        found.append((index, Curve(run.name, [step for step, _ in points], [value for _, value in points])))
    yield from _panel(f"curve-{_slug(key)}", title, "step", found, log_scale=log_scale)


def _panel(
    name: str, title: str, x_label: str, found: Sequence[tuple[int, Curve]], *, log_scale: bool = False
) -> Iterator[Panel]:
    """The panel, unless no run has a finite value of the quantity."""
    kept = [(index, curve) for index, curve in found if any(map(math.isfinite, curve.ys))]
    values = [y for _, curve in kept for y in curve.ys if math.isfinite(y)]
    if values:
        # A rate that a schedule brings to 0 has no logarithm; its zeros are left out of the picture.
        positive = [y for y in values if y > 0]
        log_scale = log_scale and bool(positive) and max(positive) > 3 * min(positive)
        yield Panel(name, title, x_label, [c for _, c in kept], [i for i, _ in kept], log_scale)


def _words(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _slug(text: str) -> str:
    """Lower-case letters, digits and "-"; a run of anything else is one "-"."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()) or "other"


def draw(panel: Panel) -> Figure:
    """A panel as a PNG.

    Raises:
        InputError: matplotlib is missing.
    """
    with chart_style():
        lines = _lines(panel)
        keys = [
            line_key(curve.run, line, _shown(_last(curve))) for curve, line in zip(panel.curves, lines, strict=True)
        ]
        figure, axes = new_chart(panel.title, PLOT, keys)
        for curve, line in zip(panel.curves, lines, strict=True):
            _draw_curve(axes, curve, line, panel.log_scale)
        _style(axes, panel)
        png = chart_png(figure)
    last = "; ".join(f"{curve.run} {_shown(_last(curve))}" for curve in panel.curves)
    return Figure(panel.name, png, f"{panel.title} over {panel.x_label}s. Last values: {last}.", css_width=CSS_WIDTH)


def _lines(panel: Panel) -> list[dict[str, Any]]:
    """How each curve is drawn; those that lie upon one another share the way."""
    lines = []
    for place, (index, curve) in enumerate(zip(panel.indices, panel.curves, strict=True)):
        same = [number for number, other in enumerate(panel.curves) if number != place and _coincide(curve, other)]
        below = sum(number < place for number in same)
        lines.append(run_line(index, below=below, above=len(same) - below))
    return lines


def _coincide(one: Curve, other: Curve) -> bool:
    if one.xs != other.xs:
        return False
    spread = max(other.ys) - min(other.ys)
    return np.allclose(one.ys, other.ys, rtol=1e-3, atol=1e-3 * spread, equal_nan=True)


def _draw_curve(axes: "Axes", curve: Curve, line: dict[str, Any], log_scale: bool) -> None:
    xs, ys = np.asarray(curve.xs, dtype=float), np.asarray(curve.ys, dtype=float)
    ys = np.where(np.isfinite(ys) & ((ys > 0) | (not log_scale)), ys, np.nan)
    if len(xs) > MANY_POINTS:
        axes.plot(xs, ys, linewidth=0.7, alpha=0.25, color=line["color"])
        ys = running_mean(ys, len(xs) // 40)
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(xs) <= 12 else {}
    axes.plot(xs, ys, linewidth=1.7, **line, **marker)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the `window` before and after each, itself included; NaN stays NaN.

    Args:
        values: (n,) float64.
        window: At least 0.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    start = np.maximum(np.arange(len(values)) - window, 0)
    end = np.minimum(np.arange(len(values)) + window + 1, len(values))
    means = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
    return np.where(finite, means, np.nan)


def _last(curve: Curve) -> float:
    """The last finite value."""
    return next(value for value in reversed(curve.ys) if math.isfinite(value))


def _shown(value: float) -> str:
    """Four digits or so."""
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.1e}"


def _style(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(yscale="log" if panel.log_scale else "linear", xlabel=panel.x_label)
    axes.margins(x=0.02)
    round_ticks(axes.xaxis, whole=True)
    if not panel.log_scale:
        round_ticks(axes.yaxis)
        values = [y for curve in panel.curves for y in curve.ys if math.isfinite(y)]
        if min(values) == max(values) > 0:  # matplotlib would magnify nothing at all
            axes.set_ylim(0, 1.5 * values[0])
    # The labels of matplotlib's own logarithmic axis are formulas, and formulas are off.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    """At most five letters or so: 0.25, 5e-4, 2.5e+6."""
    if value == 0 or 0.01 <= abs(value) < 100_000:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent):+d}"
