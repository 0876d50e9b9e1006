"""Accuracy of classes and their confusion, against loops over single queries."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from gcahng.report import confusion
from gcahng.report.embedded import EmbeddedRun, EmbeddedRuns
from gcahng.report.section import Figure, Section, Table


@pytest.fixture(scope="module")
def section(report_runs, embedded_runs, undrawn) -> Section:
    with undrawn():
        made = confusion.confusion_section(report_runs, embedded_runs)
    assert made is not None
    return made


def counted_by_loop(run: EmbeddedRun) -> tuple[Counter, Counter]:
    """Neighbours by (class, class), and all of a class."""
    pairs, totals = Counter(), Counter()
    for query, references in enumerate(run.result.num_references.tolist()):
        for neighbour in run.neighbours[query].tolist()[:references]:
            mine, other = int(run.labels[query]), int(run.gallery.labels[neighbour])
            pairs[mine, other] += 1
            totals[mine] += 1
    return pairs, totals


def long_tailed(run: EmbeddedRun) -> EmbeddedRun:
    """The same neighbours, where some queries have few references and some none."""
    references = torch.arange(len(run.labels)) % 10
    return replace(run, result=replace(run.result, num_references=references))


def test_counts_are_those_of_a_loop(embedded_runs) -> None:
    for run in (*embedded_runs.values(), long_tailed(embedded_runs["baseline"])):
        pairs, counts, totals = confusion.confusion_counts(run)
        want, want_totals = counted_by_loop(run)
        found = {tuple(ids): count for ids, count in zip(pairs.tolist(), counts.tolist(), strict=True)}
        assert found == dict(want)
        assert totals.tolist() == [want_totals[mine] for mine, _ in pairs.tolist()]


def test_a_query_counts_as_many_neighbours_as_it_has_references(embedded_runs) -> None:
    """A perfect ranking confuses nothing, although the eighth neighbour must be of another class."""
    run = embedded_runs["baseline"]
    places = torch.arange(48)
    perfect = torch.stack([torch.cat([places[i // 6 * 6 : i // 6 * 6 + 6], places]) for i in range(48)])
    perfect = torch.stack([row[row != i][:8] for i, row in enumerate(perfect)])
    labels = torch.arange(48) // 6
    images = replace(run.query, labels=labels)
    faultless = replace(run, query=images, gallery=images, result=replace(run.result, neighbours=perfect))
    assert confusion.most_confused(faultless, 8) == []
    section = confusion.confusion_section([run.run], EmbeddedRuns({"baseline": faultless}))
    assert section.intro.endswith("baseline confuses no classes.")
    assert [type(part) for part in section.parts] == [Figure, Figure, Table]


def test_most_confused_are_the_pairs_with_the_largest_shares(embedded_runs) -> None:
    run = embedded_runs["baseline"]
    pairs, totals = counted_by_loop(run)
    classes = sorted(totals)
    want = []
    for i in classes:
        for j in classes:
            if i < j and (pairs[i, j] or pairs[j, i]):
                there, back = pairs[i, j] / totals[i], pairs[j, i] / totals[j]
                want.append((there + back, i, j) if there >= back else (there + back, j, i))
    want.sort(key=lambda item: (-item[0], item[1], item[2]))
    found = confusion.most_confused(run, 5)
    assert [(c.first, c.second) for c in found] == [(first, second) for _, first, second in want[:5]]
    for pair in found:
        assert pair.there == pairs[pair.first, pair.second] / totals[pair.first] >= pair.back
        assert pair.back == pairs[pair.second, pair.first] / totals[pair.second]


def test_the_tables_values(section, report_runs, embedded_runs) -> None:
    classes, pairs = (part for part in section.parts if isinstance(part, Table))
    names = [run.name for run in report_runs]
    assert list(classes.columns) == ["class", "queries"] + [f"{n} {m}" for n in names for m in ("R@1", "MAP@R")]
    assert len(classes.rows) == 8  # all of them: six worst, two best
    last = embedded_runs[names[1]]
    ids = {last.class_name(i): i for i in last.labels.unique().tolist()}
    for name, queries, *values in classes.rows:
        assert queries == "6"
        want = []
        for run in embedded_runs.values():
            mine = run.labels == ids[name]
            want.append(100 * float((run.result.first_hit_rank[mine] == 1).double().mean()))
            want.append(100 * float(run.result.query_map_at_r[mine].mean()))
        assert [float(value) for value in values] == pytest.approx(want, abs=0.051)
    last_column = [float(row[-1]) for row in classes.rows]
    assert last_column == sorted(last_column)
    counts, totals = counted_by_loop(last)
    for both, *values in pairs.rows:
        first, second = both.split(" \u2192 ")
        there = 100 * counts[ids[first], ids[second]] / totals[ids[first]]
        back = 100 * counts[ids[second], ids[first]] / totals[ids[second]]
        assert [float(value) for value in values[2:]] == pytest.approx([there, back], abs=0.051)


def test_captions_have_the_means_over_classes(section, embedded_runs) -> None:
    recall = next(part for part in section.parts if isinstance(part, Figure) and part.name == "classes-recall")
    for run in embedded_runs.values():
        hit = (run.result.first_hit_rank == 1).double()
        means = [float(hit[run.labels == i].mean()) for i in run.labels.unique()]
        full = sum(mean == 1 for mean in means)
        assert f"{run.run.name} {100 * sum(means) / 8:.1f} % ({full} of 8 classes at 100 %)" in recall.caption


def test_a_run_has_the_look_of_its_place_in_the_report(report_runs, embedded_runs, monkeypatch) -> None:
    """Also where an earlier one could not be embedded."""
    drawn = []
    monkeypatch.setattr(confusion, "_histogram", lambda title, values, runs: drawn.append(runs) or b"")
    name = report_runs[1].name
    confusion._distributions(report_runs, EmbeddedRuns({name: embedded_runs[name]}))
    assert drawn == [[(1, name)]] * 2


def test_examples_are_wrong_neighbours_of_the_pair(report_runs, embedded_runs, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(confusion, "pairs_png", lambda pairs: drawn.append(pairs) or b"")
    run = embedded_runs[report_runs[1].name]
    section = confusion.confusion_section(report_runs, embedded_runs)
    pairs = confusion.most_confused(run, confusion.NUM_PAIRS)
    figures = [part for part in section.parts if isinstance(part, Figure) and part.name.startswith("confused-")]
    assert len(figures) == len(pairs) == len(drawn) > 0
    images = {run.image(i).tobytes(): i for i in range(48)}
    for pair, shown, figure in zip(pairs, drawn, figures, strict=True):
        assert run.class_name(pair.first) in figure.caption and run.class_name(pair.second) in figure.alt
        assert 1 <= len(shown) <= 4
        scores = [example.neighbour.score for example in shown]
        assert scores == sorted(scores, reverse=True)
        for example in shown:
            query, neighbour = images[example.query.image.tobytes()], images[example.neighbour.image.tobytes()]
            assert (int(run.labels[query]), int(run.labels[neighbour])) == (pair.first, pair.second)
            assert neighbour in run.neighbours[query, :5].tolist()
            assert example.neighbour.score == pytest.approx(run.similarity(query, neighbour))


def test_the_matrix_has_the_shares(report_runs, embedded_runs, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(confusion, "_draw_matrix", lambda title, shares, names: drawn.append((shares, names)) or b"")
    run = embedded_runs["baseline"]
    confusion._matrix(confusion.most_confused(run, 8), run)
    shares, names = drawn[0]
    counts, totals = counted_by_loop(run)
    ids = {run.class_name(i): i for i in totals}
    assert 2 <= len(names) <= 8
    for row, mine in enumerate(names):
        for column, other in enumerate(names):
            assert shares[row, column] == pytest.approx(100 * counts[ids[mine], ids[other]] / totals[ids[mine]])


def test_pictures_of_all_classes_come_first(section) -> None:
    figures = [part for part in section.parts[:3] if isinstance(part, Figure)]
    assert [figure.name for figure in figures] == ["classes-recall", "classes-map", "confusion-matrix"]


def test_nothing_embedded_has_no_section(report_runs) -> None:
    assert confusion.confusion_section(report_runs, EmbeddedRuns({})) is None
