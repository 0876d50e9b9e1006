"""Steps and runs with losses and miners of pytorch-metric-learning (PML), alone and over ranks."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from exact_cases import ExactCase
from exact_ranks import compare, over_ranks
from launched_here import launched_here
from maths_cases import randomise
from run_cases import make_config
from torch import Tensor, nn

from gcahng.distributed import Ranks
from gcahng.training.config_schema import LossConfig
from gcahng.training.metric_losses import build_metric_loss
from gcahng.training.step import TrainingStep
from gcahng.training.trainer import Trainer

MEMORY = {"loss": {"pml.ContrastiveLoss": {}}, "memory_size": 13, "miner": {"pml.MultiSimilarityMiner": {}}}


def loss_config(metric: str, miner: str | None = None, **args: Any) -> LossConfig:
    """A loss with its arguments, and a miner with its defaults."""
    return LossConfig(metric=metric, args=args, miner=miner)


@dataclass(frozen=True, kw_only=True)
class PmlCase(ExactCase):
    """With a metric loss as a configuration names it."""

    metric: LossConfig = field(default_factory=LossConfig)

    def modules(self) -> dict[str, nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            loss = build_metric_loss(self.metric, self.training_classes, self.dim)
        randomise(loss, 1)
        return super().modules() | {"metric_loss": loss.to(self.dtype)}


class CloseToItsClass(nn.Module):
    """A loss of one's own that takes a miner's choice."""

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: tuple[Tensor, ...]) -> Tensor:
        anchors, positives, negatives = (embeddings[index] for index in indices_tuple)
        self.measured = {"num_triplets": torch.tensor(float(len(anchors)))}
        return ((anchors - positives).square().sum(1) - (anchors - negatives).square().sum(1) + 1).relu().mean()


class ClassWeights(CloseToItsClass):
    """With an argument for each training class."""

    def __init__(self, num_classes: int, weights: list[float]) -> None:
        super().__init__()
        if len(weights) != num_classes:
            raise ValueError(f"{len(weights)} weights of {num_classes} classes")


class Speechless(nn.Module):
    """A loss that refuses its batch and says nothing."""

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: tuple[Tensor, ...]) -> Tensor:
        raise AssertionError


class FirstOfOthers:
    """A miner of one's own: each sample, the next of its class, and a few of other classes by chance."""

    def __init__(self, count: int = 2) -> None:
        self.count = count

    def __call__(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        triplets = []
        for anchor in range(len(labels)):
            own = (labels == labels[anchor]).nonzero().flatten().tolist()
            others = (labels != labels[anchor]).nonzero().flatten()
            chosen = others[torch.randperm(len(others))[: self.count]].tolist()
            triplets += [(anchor, own[(own.index(anchor) + 1) % len(own)], negative) for negative in chosen]
        anchors, positives, negatives = torch.tensor(triplets).unbind(1)
        return anchors, positives, negatives


PAIRS = loss_config("pml.MultiSimilarityLoss", "pml.MultiSimilarityMiner")
TRIPLETS = loss_config("pml.TripletMarginLoss", "pml.TripletMarginMiner", margin=0.2)
DRAWN = loss_config("pml.TripletMarginLoss", "pml.DistanceWeightedMiner", margin=0.8)
# 4 x 2 samples in a memory of 13: it is full in the second step, and then begins anew.
CASES: dict[str, PmlCase] = {
    "pairs": PmlCase(metric=PAIRS, num_classes=7, layers=2, steps=2),
    "triplets": PmlCase(metric=TRIPLETS, num_classes=5, num_samples=3, edge_dropout="tied", batch_norm=True, steps=2),
    "drawn triplets": PmlCase(metric=DRAWN, num_classes=5, num_samples=3, steps=2),
    "ArcFace": PmlCase(metric=loss_config("pml.ArcFaceLoss", "pml.PairMarginMiner", scale=8.0), num_classes=5, steps=2),
    "memory": PmlCase(metric=LossConfig(metric="pml.CrossBatchMemory", args=MEMORY), steps=4),
    "own": PmlCase(metric=loss_config("pml_cases:CloseToItsClass", "pml_cases.FirstOfOthers"), num_classes=5, steps=2),
}


def arc_face(dim: int, ranks: Ranks) -> nn.Module:
    """The metric loss of a case under DeepSpeed; each rank's starts elsewhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ranks.rank)
        return build_metric_loss(loss_config("pml.ArcFaceLoss", scale=8.0), ExactCase().training_classes, dim)


def all_of_it(ranks: Ranks, shards: Path, folder: Path) -> dict[str, Any]:
    """Cases against one process, what happens where ranks draw otherwise, and runs that are cut and go on."""
    make_backend = over_ranks(ranks)
    found: dict[str, Any] = {"cases": compare(ranks, list(CASES.values()), make_backend)}
    with patch.object(TrainingStep, "_drawing_alike", _each_its_own(ranks)):
        found["draws of each rank"] = compare(ranks, [replace(CASES["drawn triplets"], steps=1)], make_backend)
    # What stood in for a launcher.
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_CPU")
    found["whole"] = metric_loss_of(ranks, shards, folder / "whole", {"train.epochs": 2})
    metric_loss_of(ranks, shards, folder / "cut", {"train.epochs": 1})
    found["resumed"] = metric_loss_of(ranks, shards, folder / "cut", {"train.epochs": 2, "train.resume": "auto"})
    return found


def _each_its_own(ranks: Ranks) -> Callable[..., Any]:
    def fork(step: TrainingStep, device: torch.device, number: int) -> Any:
        context = torch.random.fork_rng(devices=[])
        torch.manual_seed(100 * number + step.ranks.rank)
        return context

    return fork


# 8 samples in a step: the memory is full in the second one, and each begins at another row.
RUN: dict[str, Any] = {
    "loss": {"metric": "pml.CrossBatchMemory", "args": MEMORY},
    "optim.graph.schedule.name": "constant",
    "train.max_steps_per_epoch": 2,
}


def metric_loss_of(ranks: Ranks, shards: Path, folder: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of this rank's metric loss at the end of a run with a memory."""
    config = make_config(shards, folder, RUN | settings)
    trainer = Trainer(config, launched=launched_here(ranks, config), progress_bars=False)
    trainer.run()
    state = {name: value.clone() for name, value in trainer.parts.modules["metric_loss"].state_dict().items()}
    trainer.close()
    return state
