"""Runs of two ranks, and of three with uneven parts, against the runs of one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_group import run_ranks
from run_cases import convert_patterns, draw_patterns, make_trainer, read_metrics, saved_tensors, train
from trainer_ranks_cases import CUT, ENDS, FROZEN, WHOLE, runs

from gcahng.data.shards.reader import ShardSet
from gcahng.training import checkpoint
from gcahng.training.evaluate_checkpoint import embedding_settings
from gcahng.training.evaluation import as_row, evaluate
from gcahng.training.run_log import read_rows


@dataclass(frozen=True)
class Ran:
    """What W ranks returned, by rank, and where their runs are."""

    size: int
    of_rank: list[dict[str, Any]]
    folder: Path

    def __getitem__(self, case: str) -> list[Any]:
        return [found[case] for found in self.of_rank]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patterns")
    return convert_patterns(draw_patterns(folder / "images"), folder / "shards")


def ran_on(size: int, shards: Path, folder: Path) -> Ran:
    train(shards, folder / "begun-by-one", CUT)
    return Ran(size, run_ranks(size, runs, shards, folder), folder)


@pytest.fixture(scope="module")
def two(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two ranks, all cases."""
    return ran_on(2, shards, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Three ranks, the cases in which uneven parts matter."""
    return ran_on(3, shards, tmp_path_factory.mktemp("three"))


@pytest.fixture(params=["two", "three"])
def ran(request: pytest.FixtureRequest) -> Ran:
    found: Ran = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def one(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(shards, folder / "whole", WHOLE)
    train(shards, folder / "resumed", {key: value for key, value in ENDS.items() if key != "train.resume"})
    train(shards, folder / "frozen", FROZEN)
    return folder


def assert_same_run(got: Path, want: Path, rounding: float) -> None:
    """The same rows and weights but for rounding, which grows as a run goes on."""
    rows, wanted = read_metrics(got), read_metrics(want)
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        tolerance = 1e-5 if row["step"] <= 2 else rounding
        for name, value in other.items():
            if isinstance(value, str):
                assert row[name] == value
            elif row["kind"] == "evaluation":
                assert row[name] == pytest.approx(value, abs=0.01), name
            else:
                assert row[name] == pytest.approx(value, rel=tolerance, abs=1e-7), (row["step"], name)
    tensors, others = (
        {name: value for name, value in saved_tensors(folder).items() if not name.startswith(checkpoint.RANKS)}
        for folder in (got, want)
    )
    assert tensors.keys() == others.keys()
    for name, value in others.items():
        assert tensors[name].shape == value.shape and tensors[name].dtype == value.dtype, name


def test_a_run_is_the_run_of_one_process(ran: Ran, one: Path) -> None:
    assert_same_run(ran.folder / "whole", one / "whole", 1e-3)
    last = {name: float(results["last"]["map_at_r"]) for name, results in enumerate(ran["whole"])}
    assert len(set(last.values())) == 1


def test_hardness_is_recorded_as_by_one_process(ran: Ran, one: Path) -> None:
    rows, wanted = (read_rows(folder / "whole" / "hardness.jsonl") for folder in (ran.folder, one))
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] == [1, 3]
    # Of the same weights every edge is counted in the same bin; later rounding moves a few to the next one.
    for name, value in wanted[0].items():
        assert rows[0][name] == pytest.approx(value, rel=1e-5), name
    for row, want in zip(rows, wanted, strict=True):
        assert row.keys() == want.keys() and (row["anchors"], row["pairs"]) == (10, 80)
        for name in ("d_positive", "d_negative", "d_synthetic", "coefficients"):
            assert sum(row[name]) == sum(want[name])
        assert row["mean_d_synthetic"] == pytest.approx(want["mean_d_synthetic"], rel=1e-3)


def test_all_ranks_return_the_same_results(ran: Ran) -> None:
    assert all(results == ran["whole"][0] for results in ran["whole"])
    assert ran["whole"][0]["last"]["num_queries"] == 48


def test_rank_0_alone_writes(ran: Ran) -> None:
    folder = ran.folder / "whole"
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert not list(folder.rglob("*.partial"))
    steps = [row["step"] for row in read_metrics(folder) if row["kind"] == "step"]
    assert steps == sorted(set(steps))


def test_ranks_go_on_with_the_run_of_one_process(ran: Ran, one: Path) -> None:
    assert_same_run(ran.folder / "begun-by-one", one / "resumed", 1e-3)


def test_one_process_goes_on_with_the_run_of_ranks(two: Ran, one: Path, shards: Path) -> None:
    train(shards, two.folder / "ended-by-one", ENDS)
    assert_same_run(two.folder / "ended-by-one", one / "resumed", 1e-3)


@pytest.mark.parametrize("name", ["sharded", "begun-by-shards"])
def test_classes_spread_over_ranks_are_the_same_run(two: Ran, one: Path, name: str) -> None:
    assert_same_run(two.folder / name, one / "resumed", 1e-3)


@pytest.mark.parametrize("name", ["begun-by-one", "sharded"])
def test_optimisers_are_saved_as_one_process_has_them(two: Ran, one: Path, name: str) -> None:
    files = ("optimizer-metric_model.pt", "optimizer-graph.pt", "optimizer-classifier.pt", "optimizer-metric_loss.pt")
    for file in files:
        saved, want = (
            torch.load(run / "last" / file, weights_only=True) for run in (two.folder / name, one / "resumed")
        )
        assert saved["param_groups"] == want["param_groups"]
        for number, entries in want["state"].items():
            for key, value in entries.items():
                torch.testing.assert_close(saved["state"][number][key], value, rtol=5e-2, atol=1e-4)


def test_small_batches_change_nothing(two: Ran, one: Path) -> None:
    assert_same_run(two.folder / "small-batches", one / "frozen", 1e-3)


def test_local_statistics_are_rank_0s_where_they_are_used(two: Ran) -> None:
    assert all(results == two["local statistics"][0] for results in two["local statistics"])
    checkpoint.verify((two.folder / "local-statistics" / "last").resolve())


def test_an_evaluation_is_that_of_one_process(ran: Ran, shards: Path, tmp_path) -> None:
    trainer = make_trainer(shards, tmp_path / "run")
    model, data, config = trainer.parts.metric_model, trainer.data.shards, trainer.config.eval
    settings = embedding_settings(trainer.config)
    want = [as_row(evaluate(model, data, config, settings, rows=r)) for r in (None, data.split_samples("test")[:7])]
    for found in ran["evaluation"]:
        assert found == ran["evaluation"][0]
        for got, wanted in zip(found, want, strict=True):
            assert got == pytest.approx(wanted, abs=1e-6)


def test_a_forecast_is_every_ranks_and_writes_nothing(two: Ran) -> None:
    forecasts = [found for found, _ in two["forecast"]]
    assert not any(exists for _, exists in two["forecast"])
    for found in forecasts:
        assert found.seconds_per_step == forecasts[0].seconds_per_step > 0
        assert found.peak_memory_bytes == forecasts[0].peak_memory_bytes
        assert found.losses == forecasts[0].losses


def test_unreadable_images_are_warned_of_where_they_are_met_and_counted_together(ran: Ran, shards: Path) -> None:
    warned = [text for heard, _, _ in ran["skipped"] for text in heard]
    data = ShardSet.open(shards)
    keys = {data.key(row) for row in ran["skipped"][0][2]}
    assert warned and all(any(key in text for key in keys) for text in warned)
    counts = {count for _, count, _ in ran["skipped"]}
    assert counts == {len(warned)}
    rows = [row for row in read_metrics(ran.folder / "skipped") if row["kind"] == "step"]
    assert [row["step"] for row in rows] == [2, 4] and rows[-1]["skipped_images"] <= len(warned)
    assert checkpoint.read_state(ran.folder / "skipped" / "last")["progress"]["skipped"] == len(warned)
    assert sum(bool(heard) for heard, _, _ in ran["skipped"]) > 1, "all of them were one rank's"


def test_an_unreadable_test_image_of_one_rank_ends_all_and_loses_no_epoch(ran: Ran) -> None:
    (text,) = {text for text, _ in ran["unreadable"]}
    assert text.startswith(f"DataError: rank {ran.size - 1}: ") and "is damaged: expected crc32" in text
    assert all(saved for _, saved in ran["unreadable"])


def test_an_evaluation_that_crashes_on_one_rank_loses_no_epoch(two: Ran) -> None:
    told = "TrainingError: rank 1: MemoryError: a loader process was killed"
    assert two["crashed"] == [(told, True), ("MemoryError: a loader process was killed", True)]


def test_a_sample_of_another_rank_is_named_by_all(ran: Ran) -> None:
    ((text, key),) = set(ran["not finite"])
    assert text.startswith("TrainingError: Step 0: 1 embeddings of the batch are not finite")
    assert text.endswith(f" Samples: {key}.")


def test_a_full_disk_ends_all(two: Ran) -> None:
    told = f"TrainingError: rank 0: {two.folder / 'disk-full'}: [Errno 28] No space left on device"
    assert two["disk full"] == [told] * two.size


def test_ranks_that_were_started_differently_are_refused(ran: Ran) -> None:
    for text in ran["other settings"]:
        assert "\n  `seed`: 1 on rank 0, 2 on rank 1" in text
        others = "rank 1" if ran.size == 2 else "ranks 1-2"
        assert f"\n  `optim.graph.lr`: 0.25 on rank 0, 0.5 on {others}" in text
        assert text.startswith("ConfigError: ") and text.count("\n") == 3
    assert not (ran.folder / "other-settings").exists()


def test_ranks_with_other_weights_or_other_code_are_refused(two: Ran) -> None:
    for case, what in (("other weights", "weights of graph"), ("other code", "gcahng")):
        for text in two[case]:
            assert f"\n  {what}: " in text and text.count("\n") == 2
    assert not (two.folder / "other-weights").exists() and not (two.folder / "other-code" / "run").exists()


def test_what_one_machine_lacks_ends_all(two: Ran) -> None:
    texts = set(two["no data here"])
    lacking = "rank 1: "
    assert len(texts) == 1 and texts.pop().startswith(f"DataError: {lacking}data/manifest.json is missing")


def test_ranks_draw_differently_and_each_step_the_same(two: Ran) -> None:
    assert all(first == again for first, again in two["draws"])
    assert len({first for first, _ in two["draws"]}) == two.size
