"""Runs of two ranks that are interrupted at chosen moments, by real signals to one of them."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed_cases import launched_as
from run_cases import make_config
from torch.distributed import distributed_c10d

from gcahng.distributed import Ranks
from gcahng.errors import Interrupted
from gcahng.training import embedding
from gcahng.training.interruption import Interruption
from gcahng.training.launched import Launched
from gcahng.training.run_saver import RunSaver
from gcahng.training.signals import Signals
from gcahng.training.step import TrainingStep
from gcahng.training.trainer import Trainer

# Two epochs of 5 steps, each evaluated; the first in warm-up.
SETTINGS = {
    "train.epochs": 2,
    "train.warm_up_epochs": 1,
    "train.save_every_steps": 4,
    "train.resume": "auto",
    "eval.batch_size": 2,
}
# By kind of backend the moments at which a run of it is interrupted, one after the other.
KINDS = {
    "ddp": ("first step, warm-up", "save", "evaluation", "last step"),
    "zero-1": ("first step, warm-up", "evaluation"),
}


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@contextmanager
def after(owner: Any, name: str, condition: Callable[..., bool], action: Callable[[], None]) -> Iterator[None]:
    """Do `action` when `owner.name` is called and the condition holds for its arguments."""
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if condition(*arguments, **options):
            action()
        return original(*arguments, **options)

    with patch.object(owner, name, call):
        yield


def in_step(number: int, *numbers: signal.Signals) -> Any:
    """Signals that come while the `number`-th step, from 1 on, is under way."""
    return after(TrainingStep, "__call__", lambda *_, step, **__: step == number - 1, lambda: send(*numbers))


def in_save(step: int) -> Any:
    """A signal that comes while the checkpoint of a step is made."""
    return after(RunSaver, "save", lambda _, progress, *__, **___: progress.step == step, lambda: send(signal.SIGTERM))


def in_evaluation(ranks: Ranks, embedded: list[int], folder: Path) -> Any:
    """A signal that comes to rank 1 in its second batch, when rank 0 has begun and takes its time. Counts batches."""
    begun = folder / "rank 0 embeds"

    def action() -> None:
        embedded.append(1)
        if ranks.rank == 0:
            begun.touch()
            time.sleep(0.2)
        elif len(embedded) == 2:
            deadline = time.monotonic() + 30
            while not begun.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            send(signal.SIGUSR1)

    return after(embedding, "embed_batch", lambda *_: True, action)


def run(
    launched: Launched, shards: Path, folder: Path, signals: Signals | None = None, **more: Any
) -> tuple[str, bool, dict[str, Any]]:
    """How a run ended; whether signals do afterwards what they did before; where it stands."""
    config = make_config(shards, folder, SETTINGS | more)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    trainer = Trainer(config, launched=launched, progress_bars=False, signals=signals)
    try:
        trainer.run()
        end = "finished"
    except Interrupted as error:
        end = str(error)
    trainer.close()
    after_it = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    return end, before == after_it, vars(trainer.progress)


def interrupted(ranks: Ranks, kind: str, shards: Path, folder: Path) -> dict[str, Any]:
    """An undisturbed run, and one that is interrupted again and again until it is through."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"store's patience": patience(ranks)}
    with launched_as(kind, ranks) as launched:
        return found | runs(ranks, launched, KINDS[kind], shards, folder / kind)


def runs(ranks: Ranks, launched: Launched, names: Sequence[str], shards: Path, folder: Path) -> dict[str, Any]:
    run_dir = folder / "interrupted"
    found: dict[str, Any] = {"whole": run(launched, shards, folder / "whole"), "embedded": []}
    early = Signals()
    early.received = int(signal.SIGTERM) if ranks.rank == 1 else None
    found["before"] = run(launched, shards, run_dir, early)
    ranks.wait()
    found["before"] += (sorted(path.name for path in run_dir.iterdir()), (run_dir / "PREEMPTED").read_text())
    ranks.wait()
    moments: dict[str, Any] = {
        "first step, warm-up": in_step(1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM),
        "save": in_save(4),
        "evaluation": in_evaluation(ranks, found["embedded"], folder),
        "last step": in_step(10, signal.SIGUSR1),
    }
    for number, name in enumerate(names):
        # One rank alone is signalled, another one each time.
        with moments[name] if name == "evaluation" or ranks.rank == number % 2 else nullcontext():
            found[name] = run(launched, shards, run_dir)
        ranks.wait()
    found["end"] = run(launched, shards, run_dir)
    return found


def patience(ranks: Ranks) -> tuple[Any, Any]:
    """How long the default group's store waits for a key, before and after a run has begun to listen there."""
    store = distributed_c10d._get_default_store()
    before = store.timeout
    Interruption(ranks)
    return before, store.timeout
