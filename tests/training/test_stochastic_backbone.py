"""A backbone that draws random numbers itself draws the same after a resume."""

import sys

import pytest
import torch
from run_cases import assert_same_tensors, make_trainer, saved_tensors, train
from torch import nn


class DroppingConv(nn.Module):
    """A backbone with dropout of torch's own."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def test_dropout_inside_a_backbone_survives_a_resume(shards, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "dropping_backbone", sys.modules[__name__])
    settings = {
        "model.backbone": "dropping_backbone:DroppingConv",
        "model.backbone_args": {},
        "train.epochs": 2,
        "train.max_steps_per_epoch": 3,
    }
    train(shards, tmp_path / "whole", settings)
    trainer = make_trainer(shards, tmp_path / "cut", settings)
    step = trainer.steps.step

    def interrupted(*arguments, **keywords):
        if keywords["step"] == 4:
            raise RuntimeError("cut")
        return step(*arguments, **keywords)

    trainer.steps.step = interrupted
    with pytest.raises(RuntimeError, match="cut"):
        trainer.run()
    torch.manual_seed(123)  # another process has another global generator
    make_trainer(shards, tmp_path / "cut", settings | {"train.resume": "auto"}).run()
    assert_same_tensors(saved_tensors(tmp_path / "cut"), saved_tensors(tmp_path / "whole"))
