"""Pictures of how hard the negatives were: from the rows of real runs, and where their marks stand."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gcahng.report.chart import RIGHT, WIDTH
from gcahng.report.curves import _shown
from gcahng.report.hardness import BEFORE, POSITIVE, RIDGE_LEFT, _recorded, hardness_section
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section


def pictures(section: Section | None) -> dict[str, Figure]:
    assert section is not None
    assert all(isinstance(part, Figure) for part in section.parts)
    return {part.name: part for part in section.parts if isinstance(part, Figure)}


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure.png)).convert("RGB")).astype(int)


def columns_of_marks(figure: Figure, colour: str = POSITIVE) -> np.ndarray:
    """Columns below the key in which pixels have a colour, by default that of positives."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    image = pixels(figure)
    found: np.ndarray = np.unique(np.nonzero((np.abs(image - wanted) <= 2).all(2)[160:])[1])
    return found


def test_every_run_shows_what_it_recorded(report_runs: Sequence[RunData]) -> None:
    section = hardness_section(report_runs)
    found = pictures(section)
    assert list(found) == [
        "hardness-distances-0",
        "hardness-distances-1",
        "hardness-distance-map-1",  # the baseline has no synthetic negatives
        "hardness-coefficients-1",
        "hardness-channel-spread",
        "hardness-pulled",
        "hardness-synthetic-own-class-share",
    ]
    for figure in found.values():
        image = Image.open(io.BytesIO(figure.png))
        assert image.width == 2 * figure.css_width == 760 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    last = report_runs[1].hardness[-1]
    for name in ("mean_d_positive", "mean_d_negative", "mean_d_synthetic"):
        assert f"{last[name]:.3g}" in found["hardness-distances-1"].alt
    baseline, hostile = (run.name for run in report_runs)
    left = 100 * last["mean_d_synthetic"] / last["mean_d_negative"]
    share = 100 * last["synthetic_own_class_share"]
    for name, value in (("hardness-pulled", left), ("hardness-synthetic-own-class-share", share)):
        assert found[name].alt.endswith(f"Last values: {hostile} {_shown(value)}.")
        assert baseline not in found[name].alt
    assert section is not None and "Nothing was recorded" not in section.intro


@pytest.fixture
def no_pictures(undrawn: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    with undrawn():
        yield


@pytest.mark.usefixtures("no_pictures")
def test_runs_without_records_are_named_or_leave_nothing(report_runs: Sequence[RunData]) -> None:
    silent = replace(report_runs[0], name="silent", hardness=[])
    assert hardness_section([silent]) is None
    section = hardness_section([silent, report_runs[1]])
    assert section is not None and "Nothing was recorded in: silent." in section.intro
    # The place among all runs decides name and colour.
    assert "hardness-distances-1" in pictures(section) and "hardness-distances-0" not in pictures(section)


@pytest.mark.usefixtures("no_pictures")
def test_one_record_is_drawn_without_time(report_runs: Sequence[RunData]) -> None:
    run = report_runs[1]
    names = pictures(hardness_section([replace(run, hardness=run.hardness[:1])]))
    assert "hardness-distances-0" in names and "hardness-pulled" in names
    assert not any("map" in name or name.startswith("hardness-coefficients") for name in names)


def test_rows_that_do_not_fit_the_newest_are_left_out(report_runs: Sequence[RunData]) -> None:
    run = report_runs[1]
    other = run.hardness[0] | {"distance_edges": [1.0, 2.0, 3.0], "d_positive": [1, 1], "step": 0}
    cut = {"step": 2, "epoch": 0}
    recorded = _recorded(replace(run, hardness=[other, cut, *run.hardness[::-1]]), 3)
    assert recorded is not None and recorded.rows == run.hardness


@pytest.mark.usefixtures("no_pictures")
def test_a_mean_that_is_not_known_is_no_point(report_runs: Sequence[RunData]) -> None:
    run = report_runs[1]
    rows = [run.hardness[-1] | {"synthetic_own_class_share": None}]
    assert "hardness-synthetic-own-class-share" not in pictures(hardness_section([replace(run, hardness=rows)]))


def drawn(mean: float, counts: dict[int, int], positive: dict[int, int] | None = None) -> Figure:
    edges = [2.0**k for k in range(-6, 7)]
    histogram = [counts.get(k, 0) for k in range(12)]
    row = {
        "step": 1,
        "epoch": 0,
        "distance_edges": edges,
        "d_positive": histogram if positive is None else [positive.get(k, 0) for k in range(12)],
        "d_negative": histogram,
        "mean_d_positive": mean,
        "mean_d_negative": mean,
    }
    run = RunData.__new__(RunData)
    object.__setattr__(run, "name", "made up")
    object.__setattr__(run, "hardness", [row])
    return pictures(hardness_section([run]))["hardness-distances-0"]


@pytest.mark.parametrize("mean", [0.5, 1.0, 3.0])
def test_the_mark_of_positives_stands_at_their_mean(mean: float) -> None:
    # Bins 4 ... 9: distances of 1/4 to 16, each with more than what may be left out.
    figure = drawn(mean, dict.fromkeys(range(4, 10), 100))
    low, high = np.log(0.25 / 1.05), np.log(16 * 1.05)
    left, width = 2 * 96 * RIDGE_LEFT, 2 * 96 * (WIDTH - RIDGE_LEFT - RIGHT)
    want = left + width * (np.log(mean) - low) / (high - low)
    marks = columns_of_marks(figure)
    assert abs(marks.mean() - want) < 2 and len(marks) < 10


def test_what_is_rare_does_not_widen_the_picture() -> None:
    narrow = drawn(1.0, {6: 1000, 5: 1000})
    wide = drawn(1.0, {6: 1000, 5: 1000, 0: 1})
    assert abs(columns_of_marks(narrow).mean() - columns_of_marks(wide).mean()) < 0.5


def test_the_hill_is_that_of_the_negatives() -> None:
    near, far = drawn(1.0, {4: 1000}, {9: 1000}), drawn(1.0, {9: 1000}, {4: 1000})
    # Both reach from 1/4 to 16; the hill is four fifths of that apart.
    apart = columns_of_marks(far, BEFORE).mean() - columns_of_marks(near, BEFORE).mean()
    width = 2 * 96 * (WIDTH - RIDGE_LEFT - RIGHT)
    assert 0.5 * width < apart < 0.9 * width
