"""What a run refuses before it starts, what it replaces only when told to, and where it stops."""

import pytest
import torch
from run_cases import assert_same_tensors, make_trainer, read_metrics, saved_tensors, train

from gcahng.errors import ConfigError, DataError, TrainingError

BASELINE = {"graph.enabled": False, "generation.enabled": False}


def test_an_existing_run_is_neither_overwritten_nor_touched(shards, tmp_path) -> None:
    settings = BASELINE | {"train.max_steps_per_epoch": 1}
    train(shards, tmp_path / "run", settings)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"/run already holds a run.*step-1.*train.resume=auto"):
        make_trainer(shards, tmp_path / "run", settings)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_overwrite_replaces_the_run_and_nothing_else(shards, tmp_path) -> None:
    settings = BASELINE | {"train.max_steps_per_epoch": 2}
    train(shards, tmp_path / "run", settings | {"train.epochs": 2, "train.keep_last": 5})
    notes = tmp_path / "run" / "step-notes"
    notes.mkdir()
    train(shards, tmp_path / "run", settings | {"seed": 3}, overwrite=True)
    train(shards, tmp_path / "fresh", settings | {"seed": 3})
    assert_same_tensors(saved_tensors(tmp_path / "run"), saved_tensors(tmp_path / "fresh"))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "fresh")
    assert {p.name for p in (tmp_path / "run").glob("step-*")} == {"step-2", "step-notes"}
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_a_run_folder_that_cannot_be_made_is_refused_before_training(shards, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"`run.dir` .*cannot be written.*file\. Choose another"):
        make_trainer(shards, tmp_path / "file" / "run")


EVALUATION_FAULTS = {
    "split": ({"eval.split": "tset"}, DataError, "Split 'tset' does not exist.*'test', 'train'"),
    "ks": ({"eval.ks": [1, 48]}, ConfigError, "`eval.ks` must not exceed.*at most 47, got 48"),
    "gallery": (
        {"eval.protocol": "query_gallery", "eval.gallery_split": "gallery"},
        DataError,
        "Split 'gallery' does not exist",
    ),
    "no pair": (
        {"eval.protocol": "query_gallery", "eval.gallery_split": "train"},
        DataError,
        "No image of split 'test' has another image of its class",
    ),
}


@pytest.mark.parametrize("case", EVALUATION_FAULTS)
def test_an_impossible_evaluation_is_refused_before_training(shards, tmp_path, case: str) -> None:
    settings, error, message = EVALUATION_FAULTS[case]
    with pytest.raises(error, match=message):
        make_trainer(shards, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_a_diverged_run_stops_and_names_the_samples(shards, tmp_path) -> None:
    settings = BASELINE | {"optim.metric_model.lr": 1e36}
    with pytest.raises(TrainingError, match=r"Step 1: \d embeddings .* Samples: \d{9}"):
        train(shards, tmp_path / "run", settings)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1]
    assert not list((tmp_path / "run").glob("step-*"))


def test_only_the_samples_that_are_not_finite_are_named(shards, tmp_path) -> None:
    trainer = make_trainer(shards, tmp_path / "run", BASELINE)
    bad = [2, 6]

    def poison(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(0, torch.tensor(bad), torch.inf)

    trainer.parts.metric_model.register_forward_hook(poison)
    rows = next(iter(trainer.loader.epoch_iterator(0))).rows
    keys = ", ".join(trainer.data.shards.key(int(rows[place])) for place in bad)
    with pytest.raises(TrainingError, match=rf"Step 0: 2 embeddings .* Samples: {keys}\.$"):
        trainer.run()
