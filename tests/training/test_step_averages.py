"""Epoch means of the losses: what they are before, within and after an epoch, and across a resume."""

import json

import pytest
import torch

from gcahng.training.averages import EpochAverages


def test_the_first_epoch_uses_a_million() -> None:
    averages = EpochAverages()
    assert averages.metric_loss == averages.generation_loss == 1e6
    averages.add(torch.tensor(2.0), torch.tensor(8.0))
    assert averages.metric_loss == 1e6  # until the epoch ends


def test_means_are_of_the_previous_epoch_alone() -> None:
    averages = EpochAverages()
    for metric, generation in ((1.0, 10.0), (2.0, 30.0), (6.0, 20.0)):
        averages.add(torch.tensor(metric), torch.tensor(generation))
    averages.end_epoch()
    assert (averages.metric_loss, averages.generation_loss) == (3.0, 20.0)
    averages.add(torch.tensor(5.0), torch.tensor(7.0))
    averages.end_epoch()
    assert (averages.metric_loss, averages.generation_loss) == (5.0, 7.0)


def test_each_value_counts_as_at_least_a_millionth() -> None:
    averages = EpochAverages()
    for value in (-3.0, 1.0):
        averages.add(torch.tensor(value), torch.tensor(-abs(value)))
    averages.end_epoch()
    assert averages.metric_loss == pytest.approx((1e-6 + 1) / 2, rel=1e-12)
    assert averages.generation_loss == pytest.approx(1e-6, rel=1e-12)
    averages.add(torch.tensor(float("nan")), torch.tensor(2.0))
    averages.end_epoch()
    assert averages.metric_loss != averages.metric_loss


def test_an_epoch_without_steps_or_without_generation_keeps_the_mean() -> None:
    averages = EpochAverages()
    averages.add(torch.tensor(4.0), None)
    averages.end_epoch()
    assert (averages.metric_loss, averages.generation_loss) == (4.0, 1e6)
    averages.end_epoch()
    assert averages.metric_loss == 4.0


def test_sums_are_exact_over_a_long_epoch_and_hold_no_graph() -> None:
    averages = EpochAverages()
    value = torch.tensor(0.1, requires_grad=True)
    for _ in range(10_000):
        averages.add(value * 1, None)
    averages.end_epoch()
    assert averages.metric_loss == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_state_survives_in_the_middle_of_an_epoch() -> None:
    first = EpochAverages()
    for number in range(3):
        first.add(torch.tensor(1.0 + number), torch.tensor(2.0))
    first.end_epoch()
    first.add(torch.tensor(0.7, dtype=torch.float64), torch.tensor(9.0))
    second = EpochAverages()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.metric_loss, second.generation_loss) == (2.0, 2.0)
    for each in (first, second):
        each.add(torch.tensor(0.4), torch.tensor(1.0))
        each.end_epoch()
    assert first.metric_loss == second.metric_loss == pytest.approx(0.55)
    assert first.generation_loss == second.generation_loss == 5.0


def test_a_state_at_the_end_of_an_epoch_starts_an_empty_one() -> None:
    first = EpochAverages()
    first.add(torch.tensor(3.0), None)
    first.end_epoch()
    second = EpochAverages()
    second.add(torch.tensor(100.0), torch.tensor(100.0))
    second.load_state_dict(first.state_dict())
    second.end_epoch()
    assert (second.metric_loss, second.generation_loss) == (3.0, 1e6)
