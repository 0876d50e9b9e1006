"""Runs that meet numbers that are not finite: faults switched on for one step, and components that bring their own."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed_cases import launched_as
from run_cases import make_config
from torch import Tensor, nn

from gcahng.distributed import Ranks
from gcahng.training.launched import Launched
from gcahng.training.trainer import Trainer

MEMORY = {
    "loss.metric": "pml.CrossBatchMemory",
    "loss.args": {"loss": {"pml.ContrastiveLoss": {}}, "memory_size": 13},
}


class DarkSpots(nn.Module):
    """A backbone that divides by the darkest pixel's value: infinite for an image with a black one."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        darkest = (images - images.detach().amin() + 1e-30).amin((1, 2, 3), keepdim=True)
        darkest = torch.where(darkest > 1e-6, darkest, 0.0)
        return self.norm(self.conv(images)) / darkest  # type: ignore[no-any-return]


class Dropping(nn.Sequential):
    """A backbone that draws from torch's generator."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3))


class Overflow(nn.Module):
    """A metric loss that is too large for float32."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return (embeddings.square().sum(1) + 100).exp().mean()


class RootAtZero(nn.Module):
    """A metric loss that is finite, with an infinite slope: a distance of a sample to itself."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return (embeddings[0] - embeddings[0]).square().sum().sqrt() + embeddings.square().mean()


# What goes wrong while `Switch.on`; each puts its hook into a trainer.
def bad_features(trainer: Trainer, switch: "Switch") -> None:
    """The first layer's output of the first image: BatchNorms take it in."""
    first = next(m for m in trainer.parts.metric_model.modules() if isinstance(m, nn.Conv2d))

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(0, torch.tensor([0]), torch.nan) if switch.on else output

    first.register_forward_hook(spoil)


def bad_metric_gradient(trainer: Trainer, switch: "Switch") -> None:
    weight = trainer.parts.metric_model.head.linear.weight  # type: ignore[union-attr]
    weight.register_hook(lambda gradient: gradient * torch.nan if switch.on else None)  # type: ignore[operator, union-attr]


def bad_loss(trainer: Trainer, switch: "Switch") -> None:
    loss = trainer.parts.modules["metric_loss"]
    loss.register_forward_hook(lambda module, inputs, output: output * torch.inf if switch.on else None)


def bad_classifier(trainer: Trainer, switch: "Switch") -> None:
    classifier = trainer.parts.modules["classifier"]
    classifier.register_forward_hook(lambda module, inputs, output: output * torch.nan if switch.on else None)


def bad_generation_gradient(trainer: Trainer, switch: "Switch") -> None:
    """Of the graph's read-out, which the generation pass alone reaches."""
    weight = trainer.parts.modules["graph"].edge_out.weight  # type: ignore[union-attr]

    def spoil(gradient: Tensor | None) -> Tensor | None:  # None in the metric pass, under DDP
        return gradient * torch.inf if switch.on and gradient is not None else None

    weight.register_hook(spoil)  # type: ignore[operator, union-attr]


FAULTS: dict[str, Callable[[Trainer, "Switch"], None]] = {
    "features": bad_features,
    "metric gradient": bad_metric_gradient,
    "metric loss": bad_loss,
    "classifier loss": bad_classifier,
    "generation gradient": bad_generation_gradient,
}


@dataclass
class Switch:
    on: bool = False


@dataclass
class Driven:
    """A trainer whose steps are run by hand.

    Attributes:
        trainer: It allows steps to be left out.
        switches: One for each fault.
        dropped: So far.
    """

    trainer: Trainer
    switches: dict[str, Switch] = field(default_factory=dict)
    dropped: int = 0

    @staticmethod
    def of(
        shards: Path,
        run_dir: Path,
        settings: Mapping[str, Any],
        launched: Launched | None = None,
        last_rank_alone: bool = False,
    ) -> "Driven":
        config = make_config(shards, run_dir, {"health.skip_non_finite": 9} | dict(settings))
        found = Driven(Trainer(config, launched=launched, progress_bars=False))
        ranks = found.trainer.ranks
        for name, put in FAULTS.items():
            found.switches[name] = Switch()
            present = "graph" in found.trainer.parts.modules or name in ("features", "metric gradient", "metric loss")
            if present and (not last_rank_alone or ranks.rank == ranks.size - 1):
                put(found.trainer, found.switches[name])
        return found

    def train(self, faults: Mapping[int, str | None]) -> list[bool]:
        """Steps by number, each with its fault or None; whether each was left out."""
        batches = list(self.trainer.loader.epoch_iterator(0))
        found = []
        for step, fault in faults.items():
            batch = batches[step % len(batches)]
            if fault is not None:
                self.switches[fault].on = True
            report = self.trainer.steps.run(batch.images, batch.labels, batch.rows, step, None, self.dropped)
            if fault is not None:
                self.switches[fault].on = False
            found.append(report is None)
            self.dropped += report is None
        return found

    def tensors(self, *, optimizers: bool = True) -> dict[str, Tensor]:
        """Every tensor of the parts, and of their optimisers as one process has them."""
        modules = self.trainer.parts.modules
        found = {f"{part}.{name}": t.clone() for part, m in modules.items() for name, t in m.state_dict().items()}
        for part in self.trainer.parts.optimizers if optimizers else ():
            state = self.trainer.backend.optimizer_state(part)["state"]
            for number, entries in state.items():
                found |= {f"{part}/{number}.{n}": torch.as_tensor(value).clone() for n, value in entries.items()}
        return found | {"averages": torch.tensor(list(self.trainer.averages.state_dict()["sums"].values()))}


@contextmanager
def quiet() -> Any:
    """Without DeepSpeed's own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def over_ranks(ranks: Ranks, shards: Path, folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """By kind of launch: which steps were left out, and all tensors of that run and of one that never saw them."""
    torch.set_num_threads(1)
    found = {}
    with quiet():
        for kind in kinds:
            with launched_as(kind, ranks) as launched:
                # Constant BatchNorm statistics on each rank's images would hide what the other rank took in.
                settings = MEMORY | {"model.head": "bn_linear"}
                run = Driven.of(shards, folder / kind, settings, launched, last_rank_alone=True)
                out = run.train({0: None, 1: "features", 2: "metric gradient", 3: None, 4: None})
                never = Driven.of(shards, folder / f"{kind}-never", settings, launched)
                never.train({0: None, 3: None, 4: None})
                found[kind] = out, run.tensors(), never.tensors()
                run.trainer.close()
                never.trainer.close()
    return found


def dumped_over_ranks(
    ranks: Ranks, shards: Path, folder: Path
) -> tuple[list[str], dict[str, Tensor], dict[str, Any], bool]:
    """A run of several ranks whose last one meets a bad image; keys and tensors from before it, and its batch.

    And whether a later dump was there as soon as this rank went on.
    """
    with launched_as("ddp", ranks) as launched:
        run = Driven.of(shards, folder, {"health.keep_dumps": 5}, launched, last_rank_alone=True)
        run.train({0: None})
        before = run.tensors(optimizers=False)
        run.train({1: "features"})
        batch = list(run.trainer.loader.epoch_iterator(0))[1]
        run.train({2: "generation gradient"})
        written = (folder / "faults" / "step-2").is_dir()
        rows = run.trainer.steps._rows_of_all(batch.rows)
        keys = [run.trainer.data.shards.key(int(row)) for row in rows]
        images = torch.cat([part.unflatten(0, (2, -1)) for part in ranks.all_of(batch.images)], 1).flatten(0, 1)
        run.trainer.close()
        return keys, before, {"images": images}, written
