"""`--check`: real steps, a forecast, and nothing written."""

import re

import pytest
import torch
from run_cases import STEPS_PER_EPOCH, make_trainer, train

from gcahng.errors import ConfigError, TrainingError
from gcahng.training import precheck
from gcahng.training.precheck import Forecast, forecast


def test_the_forecast_comes_from_real_steps(shards, tmp_path) -> None:
    trainer = make_trainer(shards, tmp_path / "run", {"train.epochs": 7, "train.warm_up_epochs": 1})
    steps = []
    run_step = trainer.run_step

    def watched(*batch):
        steps.append(trainer.parts.metric_model.warm_up)
        return run_step(*batch)

    trainer.run_step = watched
    trainer.parts.metric_model.set_warm_up(True)
    result = forecast(trainer, steps=3)
    assert steps == [False] * 3  # the warm-up would be cheaper than the epochs after it
    assert result.seconds_per_step > 0 and result.load_seconds_per_step > 0
    assert (result.steps_per_epoch, result.epochs) == (STEPS_PER_EPOCH, 7)
    assert result.peak_memory_bytes > 2**26  # an interpreter with torch takes as much
    assert {"total_loss", "generation_loss", "metric_loss"} <= result.losses.keys()
    per_step = result.seconds_per_step + result.load_seconds_per_step
    assert result.epoch_seconds == pytest.approx(STEPS_PER_EPOCH * per_step)
    assert list(tmp_path.iterdir()) == []


def test_a_shortened_epoch_is_forecast_as_such(shards, tmp_path) -> None:
    trainer = make_trainer(shards, tmp_path / "run", {"train.max_steps_per_epoch": 2})
    assert forecast(trainer, steps=1).steps_per_epoch == 2


def test_a_bad_sample_of_a_later_step_is_named(shards, tmp_path) -> None:
    settings = {"model.head": "linear", "data.num_workers": 0}
    trainer = make_trainer(shards, tmp_path / "run", settings)
    _, second, *_ = make_trainer(shards, tmp_path / "run", settings).loader.epoch_iterator(0)
    steps = 0

    def poison(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return output.index_fill(0, torch.tensor([1]), torch.inf) if steps == 2 else output

    trainer.parts.metric_model.head.register_forward_hook(poison)
    key = trainer.data.shards.key(int(second.rows[1]))
    with pytest.raises(TrainingError, match=rf"Step 1: .* Samples: {re.escape(key)}\."):
        forecast(trainer, steps=3)


def test_an_epoch_shorter_than_the_check(shards, tmp_path) -> None:
    settings = {"batch.num_classes": 8, "batch.num_samples": 6}
    result = forecast(make_trainer(shards, tmp_path / "run", settings), steps=3)
    assert result.steps_per_epoch == 1 and result.seconds_per_step > 0


@pytest.mark.parametrize(
    ("per_step", "epoch", "run"),
    [(0.01, "1 s", "10 s"), (1.0, "100 s", "17 min"), (30.0, "50 min", "8.3 h")],
)
def test_the_text_names_time_and_memory(per_step: float, epoch: str, run: str) -> None:
    text = Forecast(0.75 * per_step, 0.25 * per_step, 100, 10, 3 << 29, {"total_loss": 2.5}).text()
    assert f"one step: {0.75 * per_step:.3f} s, waiting for data {0.25 * per_step:.3f} s" in text
    assert f"one epoch: 100 steps, about {epoch}; 10 epochs: about {run} without evaluation" in text
    assert "peak memory: 1.50 GiB" in text and "losses: total_loss 2.5" in text


def test_an_existing_run_is_left_alone(shards, tmp_path) -> None:
    settings = {"train.max_steps_per_epoch": 1, "train.epochs": 2}
    train(shards, tmp_path / "run", settings)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="already holds a run"):
        make_trainer(shards, tmp_path / "run", settings)
    result = precheck.forecast(make_trainer(shards, tmp_path / "run", settings | {"train.resume": "auto"}))
    assert result.epochs == 2
    precheck.forecast(make_trainer(shards, tmp_path / "run", settings, overwrite=True))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
