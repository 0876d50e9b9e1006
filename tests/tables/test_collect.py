"""Runs are found by what they are; what is unfinished or damaged is told and never counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from table_cases import Tiny, train

from gcahng.errors import ConfigError
from gcahng.tables.collect import CellResult, Collected, collect
from gcahng.tables.listing import plan_text
from gcahng.tables.output import as_json, as_markdown, as_text
from gcahng.tables.paired import differences
from gcahng.tables.plan import Choice, make_plan
from gcahng.tables.spec import read_table


def found(tiny: Tiny, **choice: Any) -> Collected:
    which = choice.pop("which", None)
    return collect(tiny.plan(**choice), [tiny.runs], which)


def row(collected: Collected, name: str) -> CellResult:
    return next(entry for entry in collected.cells if entry.cell.row.name == name)


def results(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return read


def test_finished_runs_are_found_wherever_they_lie(trained: Tiny) -> None:
    collected = found(trained)
    baseline = row(collected, "Baseline")
    assert [(r.seed, r.folder.name) for r in baseline.results] == [(0, "seed-0"), (1, "elsewhere")]
    for result in baseline.results:
        last = results(result.folder)["last"]
        assert result.epoch == 2
        assert result.values["R@1"] == 100 * last["recall_at_1"]
        assert result.values["MAP@R"] == 100 * last["map_at_r"]
        assert result.values["train_seconds"] > 0
    assert baseline.missing == [] and baseline.notes == ()
    values = [r.values["R@1"] for r in baseline.results]
    assert baseline.mean("R@1") == pytest.approx(sum(values) / 2)
    assert baseline.deviation("R@1") == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert row(collected, "Baseline + GNN").missing == [1]
    assert row(collected, "Other people").results == ()


def test_text_shows_mean_spread_published_and_what_is_missing(trained: Tiny) -> None:
    collected = found(trained)
    lines = as_text(collected).splitlines()
    baseline = row(collected, "Baseline")
    cells = {line.split("  ")[0]: line.split() for line in lines}
    mean, deviation = baseline.mean("R@1"), baseline.deviation("R@1")
    assert cells["Baseline"][1:8] == ["2", f"{mean:.2f}", "±", f"{deviation:.2f}", "50.0", "±", "1.5"]
    assert cells["Baseline + GNN"][3:6] == ["1", "of", "2"] and "±" not in cells["Baseline + GNN"]
    assert cells["Other people"][2:] == ["-", "-", "99.9", "-", "-", "-", "-"]
    assert lines[1] == "Ours: mean ± sample standard deviation over seeds; of each run the last epoch."
    nothing = as_text(collect(trained.plan(out=trained.folder / "none"), [], None))
    assert nothing.count("not run") == 2 * 4


def test_markdown_and_json_hold_the_same(trained: Tiny) -> None:
    collected = found(trained)
    markdown = as_markdown(collected)
    assert "| Baseline + GNN | 1 of 2 | " in markdown and markdown.startswith("## Tiny\n")
    tree = json.loads(json.dumps(as_json(collected)))
    first, second, third = tree["cells"]
    assert first["metrics"]["R@1"] == {
        "mean": row(collected, "Baseline").mean("R@1"),
        "deviation": row(collected, "Baseline").deviation("R@1"),
        "seeds": 2,
        "published": "50.0±1.5",
        "published_mean": 50.0,
        "published_deviation": 1.5,
    }
    assert second["missing_seeds"] == [1] and len(second["runs"]) == 1
    assert second["metrics"]["R@1"]["deviation"] is None and second["metrics"]["R@1"]["published"] is None
    assert not third["is_run_here"] and third["runs"] == []


def test_show_lists_done_begun_and_missing(tiny: Tiny) -> None:
    begun = tiny.planned("Baseline + GNN", 0).folder
    (begun / "results.json").unlink()
    lines = plan_text(found(tiny)).splitlines()
    assert lines[1] == "4 runs, 2 missing"
    assert [line.split()[0] for line in lines if " seed " in line] == ["done", "done", "begun", "missing"]
    assert any(
        "not counted" in line and "unfinished: no results.json, last logged in epoch 2 of 2" in line for line in lines
    )


def _cut(folder: Path) -> None:
    (folder / "results.json").write_text('{"last": {"epo')


def _longer(folder: Path) -> None:
    """Finished, and then begun again with more epochs."""
    text = (folder / "results.json").read_text().replace('"epoch": 2', '"epoch": 1')
    (folder / "results.json").write_text(text)


def _lacking(folder: Path) -> None:
    tree = results(folder)
    del tree["last"]["map_at_r"]
    (folder / "results.json").write_text(json.dumps(tree))


def _not_finite(folder: Path) -> None:
    tree = results(folder)
    tree["last"]["recall_at_1"] = float("nan")
    (folder / "results.json").write_text(json.dumps(tree))


def _other_data(folder: Path) -> None:
    state = folder / "last" / "state.json"
    tree = json.loads(state.read_text())
    tree["data"]["manifest"] = "0" * 64
    state.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, "damaged: results.json cannot be used (JSONDecodeError"),
        (_longer, "unfinished: results.json is of epoch 1, the configuration says 2"),
        (_lacking, "damaged: an evaluation in results.json lacks 'map_at_r'"),
        (_not_finite, "not to be counted: R@1 is nan"),
        (_other_data, "trained on other data than "),
    ],
)
def test_what_cannot_be_counted_is_told(tiny: Tiny, damage: Any, words: str) -> None:
    folder = tiny.planned("Baseline", 0).folder
    damage(folder)
    baseline = row(found(tiny), "Baseline")
    assert [r.seed for r in baseline.results] == [1] and baseline.missing == [0]
    (note,) = baseline.notes
    assert note.startswith(f"{folder}: ") and words in note
    assert words in as_text(found(tiny))


def test_a_folder_that_cannot_be_read_may_be_anything(tiny: Tiny) -> None:
    config = tiny.runs / "elsewhere" / "config.yaml"
    config.write_text(config.read_text() + "surprise: 1\n")
    collected = found(tiny)
    assert row(collected, "Baseline").missing == [1]
    assert len(collected.unreadable) == 1 and "elsewhere: its configuration cannot be used" in as_text(collected)


def test_another_setting_is_another_experiment(tiny: Tiny) -> None:
    config = tiny.runs / "elsewhere" / "config.yaml"
    config.write_text(config.read_text().replace("embedding_dim: 8", "embedding_dim: 16"))
    baseline = row(found(tiny), "Baseline")
    assert baseline.missing == [1] and baseline.notes == ()


def test_settings_of_absent_parts_do_not_matter(tiny: Tiny) -> None:
    config = tiny.runs / "elsewhere" / "config.yaml"
    text = config.read_text().replace("num_layers: 1", "num_layers: 2").replace("alpha: 5.0", "alpha: 1.0")
    proxies = text.index("  proxies:")
    config.write_text(text[:proxies] + text[proxies:].replace("lr: 0.01", "lr: 0.5", 1))
    assert row(found(tiny), "Baseline").missing == []


def test_a_second_run_of_a_seed_is_not_counted_twice(tiny: Tiny) -> None:
    shutil.copytree(tiny.planned("Baseline", 0).folder, tiny.runs / "again", symlinks=True)
    baseline = row(found(tiny), "Baseline")
    assert [r.folder.name for r in baseline.results] == ["seed-0", "elsewhere"], "the planned folder comes first"
    assert [note.split(": ")[1] for note in baseline.notes] == [
        "seed 0 again; " + str(baseline.results[0].folder) + " is counted"
    ]


def test_links_to_folders_are_followed_once(tiny: Tiny) -> None:
    (tiny.runs / "elsewhere").rename(tiny.folder / "disk")
    (tiny.runs / "elsewhere").symlink_to(tiny.folder / "disk")
    (tiny.runs / "circle").symlink_to(tiny.runs)
    baseline = row(found(tiny), "Baseline")
    assert [r.seed for r in baseline.results] == [0, 1] and baseline.notes == ()


@pytest.mark.parametrize("name", ["best", "last", "tensorboard"])
def test_a_run_may_be_called_like_a_checkpoint(tiny: Tiny, name: str) -> None:
    (tiny.runs / "elsewhere").rename(tiny.runs / name)
    assert [r.folder.name for r in row(found(tiny), "Baseline").results] == ["seed-0", name]
    (tiny.runs / name / "results.json").unlink()  # its checkpoints are no runs
    assert len(row(found(tiny), "Baseline").notes) == 1


def test_seeds_are_different_numbers(tiny: Tiny) -> None:
    for seeds in ([1, 1], [-1]):
        with pytest.raises(ConfigError, match="--seeds must be different numbers from 0 on: got"):
            tiny.plan(seeds=seeds)


def test_a_fault_of_many_cells_is_told_once(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="2 of its cells cannot be planned") as error:
        tiny.plan(settings=["train.epoch=5"])
    assert str(error.value).count("did you mean `train.epochs`?") == 1
    assert "\nBaseline on folder and 1 more: Configuration " in str(error.value)


def test_what_is_printed_of_sct_is_its_last_epoch(tiny: Tiny) -> None:
    for paper, evaluation, own in (
        ("sct", "the last epoch", "last"),
        ("gca_hng", "the best epoch by test R@1", "best_test"),
    ):
        text = tiny.spec.read_text().replace("title: Tiny", f"title: Tiny\npaper: {paper}")
        tiny.spec.with_name("paper.yaml").write_text(
            text.replace("overrides: [generation", "published: none, overrides: [generation")
        )
        table = read_table(tiny.spec.with_name("paper.yaml"))
        for which in ("last", "best_test"):
            lines = as_text(collect(make_plan(table, Choice(out=tiny.runs)), [], which)).splitlines()
            ending = "." if which == own else "; ours are not."
            assert lines[2] == f"Published numbers are those of {evaluation}{ending}"


def test_other_seeds_are_named_and_counted_on_request(tiny: Tiny) -> None:
    fewer = row(found(tiny, seeds=[0]), "Baseline")
    assert len(fewer.results) == 1 and "seeds 1 are finished too" in fewer.notes[0]


def test_the_evaluation_that_counts(tiny: Tiny) -> None:
    folder = tiny.planned("Baseline", 0).folder
    tree = results(folder)
    tree["best_test"] |= {"epoch": 1, "recall_at_1": 0.75}
    (folder / "results.json").write_text(json.dumps(tree))
    best = found(tiny, which="best_test")
    first = row(best, "Baseline").results[0]
    assert (first.epoch, first.values["R@1"]) == (1, 75.0)
    assert "the epoch with the best test R@1 (then MAP@R), chosen on the test classes" in as_text(best)
    by_validation = row(found(tiny, which="best"), "Baseline")
    assert by_validation.results == () and "has no validation classes" in by_validation.notes[0]


def test_the_best_epoch_by_validation_is_measured_on_the_test_classes(tiny: Tiny) -> None:
    tiny.spec.write_text(
        tiny.spec.read_text().replace("overrides: [train", "overrides: [data.validation=0.4, train", 1)
    )
    folder = train(tiny.planned("Baseline", 0))
    found_row = row(found(tiny, which="best"), "Baseline")
    epoch = results(folder)["best_validation"]["epoch"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (want,) = [r for r in rows if r["kind"] == "evaluation" and r["split"] == "test" and r["epoch"] == epoch]
    assert found_row.results[0].epoch == epoch
    assert found_row.results[0].values["MAP@R"] == 100 * want["map_at_r"]


def test_a_changed_run_never_passes_as_the_papers(tiny: Tiny) -> None:
    changed = found(tiny, settings=["train.epochs=1"])
    text = as_text(changed)
    assert "Set for all runs: train.epochs=1." in text and "[50.0 ± 1.5]" in text and "NOT comparable" in text
    assert "Not comparable: train.epochs not as in the table (folder)." in text
    assert row(changed, "Baseline").results == ()
    harmless = found(tiny, settings=["data.num_workers=3"])
    assert row(harmless, "Baseline").cell.incomparable == () and not row(harmless, "Baseline").missing


def test_other_data_is_another_experiment_and_not_comparable(tiny: Tiny, trained: Tiny) -> None:
    copy = tiny.folder / "copy"
    shutil.copytree(trained.folder / "shards", copy)
    same = row(found(tiny, data={"folder": str(copy)}), "Baseline")
    assert len(same.results) == 2, "the manifest says that it is the same data"
    assert same.cell.incomparable == ()
    gone = row(found(tiny, data={"folder": str(tiny.folder / "gone")}), "Baseline")
    assert gone.results == () and "trained on other data" in gone.notes[0]


def test_differences_over_common_seeds(trained: Tiny) -> None:
    collected = found(trained)
    by_cell = differences(collected, "Baseline")
    baseline, graph = row(collected, "Baseline"), row(collected, "Baseline + GNN")
    difference = by_cell[graph.cell.title]["R@1"]
    assert (difference.seeds, difference.half_width) == ((0,), None)
    assert difference.mean == graph.results[0].values["R@1"] - baseline.results[0].values["R@1"]
    assert baseline.cell.title not in by_cell
    text = as_text(collected, by_cell, "Baseline")
    assert "folder: row minus Baseline, over the seeds of both, with its 95 % interval" in text and "(one seed)" in text
    # Of two rows of a name, the one that --rows leaves is no reference for rows of other losses.
    trained.spec.with_name("losses.yaml").write_text(
        trained.spec.read_text()
        + "  - {name: Baseline, loss: PA, overrides: [loss.metric=proxy_anchor, generation.enabled=false]}\n"
    )
    table = read_table(trained.spec.with_name("losses.yaml"))
    rows = ["Baseline (PA)", "Baseline + GNN"]
    chosen = collect(make_plan(table, Choice(rows, out=trained.runs / "tables")), [])
    assert differences(chosen, "Baseline") == {} and list(differences(chosen, "Baseline (PA)")) == [graph.cell.title]
    with pytest.raises(ConfigError, match="--against: no row of table spec is called `Basis`"):
        differences(collected, "Basis")


def test_another_source_is_not_the_papers_data(tiny: Tiny) -> None:
    tiny.spec.write_text(tiny.spec.read_text().replace("folder", "cub"))
    baseline = row(found(tiny), "Baseline")
    assert len(baseline.results) == 2
    (reason,) = baseline.cell.incomparable
    assert reason.endswith("shards holds folder, not cub")
