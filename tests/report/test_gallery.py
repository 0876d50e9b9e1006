"""The gallery: which queries, in which order, and that each neighbour stands with its own image, mark and score."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import ImageChops

from gcahng.report import gallery
from gcahng.report.embedded import EmbeddedRuns
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section


@pytest.fixture(scope="module")
def section(report_runs, embedded_runs, undrawn) -> Section:
    with undrawn():
        made = gallery.gallery_section(report_runs, embedded_runs)
    assert made is not None
    return made


def shown(section: Section, reason: str) -> list[int]:
    """Queries that are shown for a reason."""
    names = [figure.name.split("-") for figure in section.parts]
    return [int(query) for _, word, query in names if word == reason]


def test_worst_come_first_then_what_changed_then_typical_ones(section, embedded_runs) -> None:
    words = [figure.name.split("-")[1] for figure in section.parts]
    assert words == sorted(words, key=["worst", "better", "worse", "typical"].index)
    queries = [figure.name.split("-")[2] for figure in section.parts]
    assert len(set(queries)) == len(queries)
    before, after = (run.result.query_map_at_r for run in embedded_runs.values())
    worst, better, worse = (shown(section, word) for word in ("worst", "better", "worse"))
    assert len(worst) == 4
    assert after[worst].tolist() == sorted(after[worst].tolist())
    assert float(after[worst[0]]) == float(after.min())
    assert better and all(after[q] >= before[q] for q in better)
    assert worse and all(after[q] <= before[q] for q in worse)
    gains = (after - before)[better].tolist()
    assert gains == sorted(gains, reverse=True)


def test_of_a_class_one_query_for_each_reason(section, embedded_runs) -> None:
    labels = next(iter(embedded_runs.values())).labels
    for reason in ("worst", "better", "worse", "typical"):
        classes = labels[shown(section, reason)].tolist()
        assert len(set(classes)) == len(classes)


def test_of_equal_queries_the_worst_is_the_one_whose_first_right_image_is_farthest(embedded_runs) -> None:
    run = embedded_runs["baseline"]
    result = replace(
        run.result,
        query_map_at_r=torch.zeros(48, dtype=torch.float64),
        first_hit_rank=torch.arange(1, 49),
    )
    choices = gallery._choices(None, replace(run, result=result))
    assert [c.query for c in choices if c.name == "worst"] == [47, 41, 35, 29]  # the last of each class


def test_queries_without_reference_are_not_shown(embedded_runs) -> None:
    first, second = embedded_runs.values()
    values = second.result.query_map_at_r.clone()
    values[2:] = torch.nan
    lacking = replace(second, result=replace(second.result, query_map_at_r=values))
    choices = gallery._choices(first, lacking)
    assert choices and all(choice.query < 2 for choice in choices)


def test_most_takes_the_largest_gains_only() -> None:
    values = torch.tensor([0.5, torch.nan, 0.0, -1.0, 0.7, 0.5])
    assert gallery.most(values, 2) == [4, 0]
    assert gallery.most(values, 9) == [4, 0, 5]


def test_each_neighbour_has_its_own_image_mark_and_score(report_runs, embedded_runs, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(gallery, "comparison_png", lambda query, found: drawn.append((query, found)) or b"")
    section = gallery.gallery_section(report_runs, embedded_runs)
    assert len(drawn) == len(section.parts)
    for figure, (query, found) in zip(section.parts, drawn, strict=True):
        position = int(figure.name.split("-")[2])
        for model, run in zip(found, embedded_runs.values(), strict=True):
            value = 100 * float(run.result.query_map_at_r[position])
            assert (model.name, model.remark) == (run.run.name, f"MAP@R {value:.0f} %")
            assert f"{int(run.result.first_hit_rank[position])} with {run.run.name}" in figure.caption
            assert len(model.neighbours) == 4
            assert ImageChops.difference(query.image, run.image(position)).getbbox() is None
            for item, place in zip(model.neighbours, run.neighbours[position].tolist(), strict=False):
                assert ImageChops.difference(item.image, run.image(place)).getbbox() is None
                assert item.is_right == (run.labels[place] == run.labels[position])
                assert item.is_right == (item.name == query.name)
                assert item.score == pytest.approx(run.similarity(position, place))
        assert query.name in figure.alt and query.name in figure.caption


def test_one_run_alone_shows_eight_neighbours(report_runs, embedded_runs, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(gallery, "comparison_png", lambda query, found: drawn.append(found) or b"")
    alone = EmbeddedRuns({"baseline": embedded_runs["baseline"]})
    section = gallery.gallery_section(report_runs, alone)
    assert {len(model.neighbours) for found in drawn for model in found} == {8}
    assert not shown(section, "better") and len(shown(section, "typical")) == 2
    assert gallery.gallery_section(report_runs, EmbeddedRuns({})) is None


def test_runs_that_are_not_shown_are_named(report_runs, embedded_runs, monkeypatch) -> None:
    monkeypatch.setattr(gallery, "comparison_png", lambda *_: b"")
    third = replace(embedded_runs["baseline"], run=replace(report_runs[0], name="third"))
    everyone = EmbeddedRuns({**embedded_runs, "third": third})
    section = gallery.gallery_section([*report_runs, third.run], everyone)
    assert section.intro.endswith("Not shown here: third.")


def test_number_of_queries_is_kept(report_runs: Sequence[RunData], embedded_runs: EmbeddedRuns, undrawn) -> None:
    with undrawn():
        made = {n: gallery.gallery_section(report_runs, embedded_runs, num_queries=n) for n in (1, 2)}
    for count, section in made.items():
        assert section is not None
        kinds = [part.name.split("-")[1] for part in section.parts if isinstance(part, Figure)]
        assert kinds.count("worst") == count and kinds.count("typical") == (count + 1) // 2
        assert 1 <= kinds.count("better") <= count and kinds.count("worse") <= count
