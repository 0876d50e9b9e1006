"""Runs of several ranks that stop in the middle of an epoch and go on: otherwise launched, or of another number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed_cases import DDP, launched_as
from run_cases import make_config

from gcahng.distributed import Ranks
from gcahng.training.trainer import Trainer

# 5 steps in each of 2 epochs; stopped in the fifth, that is after a checkpoint of 4: two optimisers have moved more
# often than the third, averages are half gathered, and a schedule is on its way.
SETTINGS = {
    "train.epochs": 2,
    "train.warm_up_epochs": 1,
    "train.save_every_steps": 2,
    "train.resume": "auto",
    "loss.metric": "proxy_anchor",
}
STOPPED_IN = 8
STEPS = 10
KINDS = (DDP, "zero-0", "zero-1", "zero-2")


class Stop(Exception):
    """Stands for whatever ends all ranks at once."""


def run(ranks: Ranks, shards: Path, run_dir: Path, kind: str, *, stop: int | None = None) -> None:
    """Train as `kind` launches it, to the end or into step number `stop` (from 1)."""
    with launched_as(kind, ranks) as launched:
        config = make_config(shards, run_dir, SETTINGS)
        trainer = Trainer(config, launched=launched, progress_bars=False)
        step, made = trainer.steps.step, trainer.progress.step

        def counting(*arguments: Any, **options: Any) -> Mapping[str, torch.Tensor]:
            nonlocal made
            made += 1
            if made == stop:
                raise Stop
            return step(*arguments, **options)

        trainer.steps.step = counting  # type: ignore[assignment]
        try:
            trainer.run()
        except Stop:
            assert stop is not None
        finally:
            trainer.close()
    ranks.wait()


def from_kind_to_kind(ranks: Ranks, shards: Path, folder: Path, every: bool) -> list[tuple[str, str]]:
    """Begin as one kind, go on as another: `folder/BEGIN to END`; `folder/begun as KIND` for one process to end."""
    torch.set_num_threads(1)
    run(ranks, shards, folder / "whole", DDP)
    if every:
        pairs = [(begin, end) for begin in KINDS for end in KINDS]
    else:
        pairs = [(DDP, "zero-1"), ("zero-1", "zero-2"), ("zero-2", DDP)]
    for begin, end in pairs:
        run(ranks, shards, folder / f"{begin} to {end}", begin, stop=STOPPED_IN)
        run(ranks, shards, folder / f"{begin} to {end}", end)
    run(ranks, shards, folder / "begun as zero-2", "zero-2", stop=STOPPED_IN)
    run(ranks, shards, folder / "begun by one", "zero-1")
    return pairs
