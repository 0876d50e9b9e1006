"""Learning curves: which quantities are drawn, of which runs, with which values."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gcahng.report import curves
from gcahng.report.chart import COLOURS, CSS_WIDTH
from gcahng.report.curves import Curve, Panel, curves_section, draw, running_mean
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Panel]:
    """Panels by name, in place of their pictures; drawn they are in the whole report."""
    seen: dict[str, Panel] = {}

    def record(panel: Panel) -> Figure:
        seen[panel.name] = panel
        return Figure(panel.name, b"", panel.title)

    monkeypatch.setattr(curves, "draw", record)
    return seen


def by_run(panel: Panel) -> dict[str, Curve]:
    return {curve.run: curve for curve in panel.curves}


def test_curves_are_the_log(report_runs: Sequence[RunData], drawn: dict[str, Panel]) -> None:
    section = curves_section(report_runs)
    assert section is not None
    assert [part.name for part in section.parts if isinstance(part, Figure)] == list(drawn)
    for run in report_runs:
        steps, evaluations = run.of_kind("step"), run.of_kind("evaluation")
        assert len(steps) == 10 and len(evaluations) == 2
        recall = by_run(drawn["curve-test-r-1"])[run.name]
        assert recall.xs == [1, 2]
        assert recall.ys == pytest.approx([100 * row["recall_at_1"] for row in evaluations], rel=1e-12)
        loss = by_run(drawn["curve-metric-loss"])[run.name]
        assert loss.xs == [row["step"] for row in steps] and loss.ys == [row["metric_loss"] for row in steps]
        wait = by_run(drawn["curve-data-seconds"])[run.name]
        assert wait.ys == pytest.approx([1000 * row["data_seconds"] for row in steps], rel=1e-12)
        ratio = by_run(drawn["curve-hard-negative-ratio"])[run.name]
        assert ratio.ys == pytest.approx([100 * row["hard_negative_ratio"] for row in steps], rel=1e-12)


def test_every_logged_loss_rate_and_metric_has_a_picture(
    report_runs: Sequence[RunData], drawn: dict[str, Panel]
) -> None:
    curves_section(report_runs)
    keys = {key for run in report_runs for row in run.of_kind("step") for key in row}
    wanted = {key for key in keys if key.endswith("_loss") or key.startswith("lr_")}
    wanted |= {"hard_negative_ratio", "synthetic_weight", "pull_factor", "step_seconds", "data_seconds"}
    assert {f"curve-{key.replace('_', '-')}" for key in wanted} <= set(drawn)
    assert {"curve-test-map-r", "curve-test-rp", "curve-test-r-4"} <= set(drawn)
    # What one run has not logged, it has no curve of; colours stay those of the runs.
    node = drawn["curve-node-loss"]
    assert node.indices == [1] and [curve.run for curve in node.curves] == [report_runs[1].name]


def test_nothing_logged_is_no_section(report_runs: Sequence[RunData]) -> None:
    assert curves_section([replace(report_runs[0], rows=[])]) is None


def run_of(rows: list[dict[str, Any]], template: RunData) -> RunData:
    return replace(template, folder=Path("none"), name="r", rows=rows, results=None)


def test_numbers_that_are_not_finite_are_gaps(report_runs: Sequence[RunData], drawn: dict[str, Panel]) -> None:
    values = [1.0, "nan", 3.0, "inf"]
    rows = [{"kind": "step", "step": i, "metric_loss": value} for i, value in enumerate(values)]
    curves_section([run_of(rows, report_runs[0])])
    panel = drawn["curve-metric-loss"]
    ys = by_run(panel)["r"].ys
    assert ys[0] == 1 and math.isnan(ys[1]) and ys[2] == 3 and math.isinf(ys[3])
    assert draw(panel).alt == "Metric loss over steps. Last values: r 3."
    rows = [{"kind": "step", "step": i, "metric_loss": "nan"} for i in range(3)]
    assert curves_section([run_of(rows, report_runs[0])]) is None


def test_validation_has_pictures_of_its_own(report_runs: Sequence[RunData], drawn: dict[str, Panel]) -> None:
    row = {"kind": "evaluation", "step": 5, "epoch": 1, "r_precision": 0.2}
    rows = [row | {"split": s, "map_at_r": v} for s, v in (("test", 0.25), ("validation", 0.5))]
    curves_section([run_of(rows, report_runs[0])])
    assert drawn["curve-test-map-r"].title == "MAP@R, test"
    assert by_run(drawn["curve-test-map-r"])["r"].ys == [25.0]
    assert by_run(drawn["curve-validation-map-r"])["r"].ys == [50.0]


def test_every_metric_of_an_evaluation_has_a_picture(report_runs: Sequence[RunData], drawn: dict[str, Panel]) -> None:
    row = {"kind": "evaluation", "step": 5, "epoch": 1, "split": "test", "r_precision": 0.2, "map_at_r": 0.1}
    row |= {"precision_at_10": 0.3, "mrr": 0.4, "coarse_recall_at_3": 0.5}
    run = report_runs[0]
    config = replace(run.config, eval=replace(run.config.eval, coarse_label="chain_name"))
    curves_section([replace(run_of([row], run), config=config)])
    assert {panel.title: panel.curves[0].ys for panel in drawn.values()} == {
        "MAP@R": [10.0],
        "RP": [20.0],
        "P@10": [30.0],
        "MRR": [40.0],
        "chain_name@3": [50.0],
    }


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)


def share_of(colour: str, png: bytes) -> float:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(pixels(png).astype(int) - wanted).max(1) < 8).mean())


def test_pictures_are_two_pixels_per_css_pixel_and_every_run_is_seen() -> None:
    xs = [float(x) for x in range(50)]
    panel = Panel(
        "p", "Title", "step", [Curve("a", xs, xs), Curve("b", xs, [50 - x for x in xs]), Curve("c", xs, xs)], [0, 1, 2]
    )
    figure = draw(panel)
    with Image.open(io.BytesIO(figure.png)) as image:
        assert image.width == 2 * CSS_WIDTH == 2 * figure.css_width
    # The third lies upon the first: dashed, so that both are seen.
    shares = [share_of(COLOURS[i], figure.png) for i in range(3)]
    assert min(shares) > 0.001
    alone = draw(replace(panel, curves=panel.curves[:1], indices=[0]))
    legend = share_of(COLOURS[0], draw(replace(panel, curves=[Curve("a", [0.0], [1.0])], indices=[0])).png)
    assert share_of(COLOURS[0], alone.png) > shares[0] > legend
    assert draw(panel).png == figure.png


def test_lines_that_lie_upon_one_another_are_all_seen() -> None:
    xs = [float(x) for x in range(100)]
    figure = draw(Panel("p", "t", "step", [Curve(name, xs, xs) for name in "abcd"], [0, 1, 2, 3]))
    image = np.asarray(Image.open(io.BytesIO(figure.png)).convert("RGB")).astype(int)[240:]  # below the key
    for index in range(4):
        wanted = np.array([int(COLOURS[index][i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(image - wanted).max(2) < 8).sum() > 300, index


@pytest.mark.parametrize("name", ["$\\frac{1}{0}$", "<b>&", "_hidden", "line\nbreak\u202e", "x" * 300, "\u6f22\u5b57"])
def test_any_name_can_be_drawn(name: str) -> None:
    """Formulas are not read, signs without a font are no warning."""
    figure = draw(Panel("p", name, "step", [Curve(name, [1.0, 2.0], [0.0, 1e-9])], [20]))
    assert name in figure.alt and Image.open(io.BytesIO(figure.png)).width == 2 * CSS_WIDTH


def test_constant_and_tiny_rates_have_labels_that_fit() -> None:
    for ys in ([1e-3] * 4, [1e-3, 1e-5, 1e-7, 0.0], [-1.0] * 4, [0.0] * 4):
        image = Image.open(
            io.BytesIO(draw(Panel("p", "t", "step", [Curve("r", [1, 2, 3, 4], ys)], [0], ys[0] > 0)).png)
        )
        # The outermost pixels stay white: no label is cut.
        border = np.asarray(image.convert("L"))
        assert border[:, :3].min() == 255 and border[:, -3:].min() == 255 and border[-3:].min() == 255


def test_running_mean_is_the_loop() -> None:
    values = np.random.default_rng(0).normal(size=40)
    values[[3, 4, 20, 39]] = np.nan
    for window in (0, 1, 5, 100):
        got = running_mean(values, window)
        for i, value in enumerate(values):
            near = values[max(0, i - window) : i + window + 1]
            want = np.nan if np.isnan(value) else near[~np.isnan(near)].mean()
            np.testing.assert_allclose(got[i], want, rtol=1e-12)
