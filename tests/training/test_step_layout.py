"""The step refuses labels that are not group-major before anything moves."""

import pytest
import torch
from torch import nn

from gcahng.errors import InputError
from gcahng.losses import NPairPlusLoss
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import PlainBackend
from gcahng.training.step import StepSettings, TrainingStep


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 2]])
def test_other_orders_are_refused(labels) -> None:
    backend = PlainBackend({"metric_model": nn.Linear(3, 3), "metric_loss": NPairPlusLoss()}, {}, {})
    step = TrainingStep(backend, StepSettings(seed=0, num_samples=2, generate=False))
    with pytest.raises(InputError, match=r"`labels` must be group-major: expected 2 groups .* got \["):
        step(torch.randn(len(labels), 3), torch.tensor(labels), EpochAverages(), step=0)


def test_group_major_is_taken() -> None:
    backend = PlainBackend({"metric_model": nn.Linear(3, 3), "metric_loss": NPairPlusLoss()}, {}, {})
    step = TrainingStep(backend, StepSettings(seed=0, num_samples=2, generate=False))
    report = step(torch.randn(4, 3), torch.tensor([5, 2, 5, 2]), EpochAverages(), step=0)
    assert torch.isfinite(report["metric_loss"])
