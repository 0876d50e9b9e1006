"""What alpha and beta do is logged, and a run says once if it is nothing."""

import logging
import math

import pytest
import torch
from run_cases import make_config, read_metrics, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcahng.training.averages import EpochAverages
from gcahng.training.config_schema import Config
from gcahng.training.pull_hint import PullHint
from gcahng.training.run_log import beside_the_bar


def warnings_of(config: Config, means: list[float], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said in a run whose epochs have these mean losses."""
    caplog.clear()
    hint, averages = PullHint(config), EpochAverages()
    for epoch, mean in enumerate(means):
        for part in (0.5, 1.5):
            averages.add(torch.tensor(part * mean), None)
        hint.end_epoch(averages, epoch)
        assert averages.metric_loss == pytest.approx(mean)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("alpha", "means", "parts"),
    [
        # The factor of an epoch is that of the mean before it: the third one's is exp(-5 / 0.2) = 1.4e-11.
        (5, [3, 0.2, 0.1], ["0.2, the pull factor exp(-alpha / mean) was 1.39e-11 in epoch 3", "alpha=0.34."]),
        (
            5,
            [0.2, 3, 3],
            ["0.2, the pull factor exp(-alpha / mean) was 1.39e-11 in epoch 2", "as near as its positive"],
        ),
        (
            1,
            [2000, 2000],
            ["2e+03, the pull factor exp(-alpha / mean) was 1 in epoch 2", "no effect", "alpha=3.4e+03."],
        ),
        (5, [4e-6, 1], ["4e-06, the pull factor", "here generation.alpha=6.8e-06."]),
        # What is in force at the end of the last epoch is used by none.
        (5, [3, 0.2], []),
        (5, [3, 3, 24, 0.4, 4900], []),
        (0, [3, 3], []),
    ],
)
def test_when_it_warns(shards, tmp_path, caplog, alpha, means, parts) -> None:
    settings = {"generation.alpha": alpha, "loss.metric": "proxy_anchor"}
    said = warnings_of(make_config(shards, tmp_path, settings), means, caplog)
    assert len(said) == (1 if parts else 0)
    for part in [*parts, *([f"generation.alpha={alpha} does not suit loss.metric=proxy_anchor"] if parts else [])]:
        assert part in said[0]


def test_without_synthetic_negatives_alpha_does_not_matter(shards, tmp_path, caplog) -> None:
    off = {"generation.enabled": False, "graph.enabled": False}
    assert warnings_of(make_config(shards, tmp_path, off), [0.1, 0.1], caplog) == []


def test_a_loss_of_zero_suits_no_alpha(shards, tmp_path, caplog) -> None:
    hint, averages = PullHint(make_config(shards, tmp_path)), EpochAverages()
    for epoch in range(2):
        for _ in range(3):
            averages.add(torch.tensor(0.0), None)
        hint.end_epoch(averages, epoch)
    assert "was 0 in epoch 2" in caplog.text and "No alpha suits a loss that is 0 or below." in caplog.text


def test_a_run_warns_once_and_shows_the_factor_everywhere(shards, tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    train(shards, tmp_path / "run", {"generation.alpha": 90, "train.epochs": 4, "train.max_steps_per_epoch": 1})
    said = [record.getMessage() for record in caplog.records if "generation.alpha=90" in record.getMessage()]
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step"]
    mean = rows[0]["metric_loss"]
    assert rows[1]["pull_factor"] == pytest.approx(math.exp(-90 / mean), rel=1e-5, abs=0)
    assert len(said) == 1
    assert f"{mean:.3g}, the pull factor exp(-alpha / mean) was {rows[1]['pull_factor']:.3g} in epoch 2" in said[0]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    shown = [event.value for event in board.Scalars("step/pull_factor")]
    assert shown == pytest.approx([row["pull_factor"] for row in rows], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "means", "parts"),
    [
        # The weight of an epoch is that of the mean before it: the third one's is 1 - exp(-20 / 6e4) = 3.33e-4.
        ({}, [50, 6e4, 6e4, 6e4], ["6e+04, the weight 1 - exp(-beta / mean) of the synthetic loss was 0.000333 in ep"]),
        (
            {"generation.method": "generator", "generation.coefficients": "single"},
            [6e4, 6e4],
            ["was 0.000333 in epoch 2", "of that mean; HDML's generator has 5000 to 10000."],
        ),
        ({}, [1900, 1900], []),
        ({}, [50, 6e4], []),
        ({"generation.beta": 5000}, [6e4, 6e4], []),
        ({"generation.beta": 0}, [6e4, 6e4], []),
        ({"generation.enabled": False}, [6e4, 6e4], []),
    ],
)
def test_when_it_warns_of_beta(shards, tmp_path, caplog, changes, means, parts) -> None:
    config = make_config(shards, tmp_path, {"generation.alpha": 5, "generation.beta": 20} | changes)
    hint, averages = PullHint(config), EpochAverages()
    for epoch, mean in enumerate(means):
        averages.add(torch.tensor(3.0), torch.tensor(mean, dtype=torch.float64))
        hint.end_epoch(averages, epoch)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (1 if parts else 0)
    for part in [*parts, *(["generation.beta=20 does not suit the generation loss"] if parts else [])]:
        assert part in said[0]


def test_the_bar_shows_loss_and_factor() -> None:
    assert beside_the_bar({"total_loss": 1.23456, "pull_factor": 0.18888}) == {"loss": "1.235", "pull": "0.189"}
    assert beside_the_bar({"total_loss": 2.0}) == {"loss": "2.000"}
