"""`--check`: try a configuration before it waits in a queue."""

import time
from dataclasses import dataclass

from gcahng.training.memory import peak_memory_bytes
from gcahng.training.trainer import Trainer


@dataclass(frozen=True)
class Forecast:
    """What a run will cost, from real steps on this machine.

    Attributes:
        seconds_per_step: Of the last measured step, loading left out.
        load_seconds_per_step: Waiting for the batch.
        steps_per_epoch: Iterations of an epoch.
        epochs: Of the whole run.
        peak_memory_bytes: Peak so far: resident memory on the CPU, allocated memory on CUDA.
        losses: Of the last measured step.
    """

    seconds_per_step: float
    load_seconds_per_step: float
    steps_per_epoch: int
    epochs: int
    peak_memory_bytes: int
    losses: dict[str, float]

    @property
    def epoch_seconds(self) -> float:
        return self.steps_per_epoch * (self.seconds_per_step + self.load_seconds_per_step)

    def text(self) -> str:
        """The forecast for a person."""
        losses = ", ".join(f"{name} {value:.4g}" for name, value in self.losses.items())
        return (
            f"one step: {self.seconds_per_step:.3f} s, waiting for data {self.load_seconds_per_step:.3f} s\n"
            f"one epoch: {self.steps_per_epoch} steps, about {_duration(self.epoch_seconds)}; "
            f"{self.epochs} epochs: about {_duration(self.epochs * self.epoch_seconds)} without evaluation\n"
            f"peak memory: {self.peak_memory_bytes / 2**30:.2f} GiB\n"
            f"losses: {losses}"
        )


def forecast(trainer: Trainer, steps: int = 3) -> Forecast:
    """Run a few real steps and predict time and memory; writes nothing.

    Args:
        trainer: Freshly built; its weights move, so throw it away afterwards.
        steps: Steps to run; the first one warms up.
    """
    # Epoch 0 may train the head alone; the forecast is for the epochs after the warm-up.
    trainer.parts.metric_model.set_warm_up(False)
    batches = trainer.loader.epoch_iterator(0)
    planned = len(batches)
    limit = trainer.config.train.max_steps_per_epoch
    report: dict[str, float] = {}
    step_seconds = load_seconds = 0.0
    started = time.perf_counter()
    for number, batch in enumerate(batches, 1):
        loaded = time.perf_counter()
        moved = batch.to(trainer.device)
        values = trainer.run_step(moved.images, moved.labels, moved.rows)
        report = {name: float(value) for name, value in values.items()}
        step_seconds, load_seconds = time.perf_counter() - loaded, loaded - started
        if number >= steps:
            break
        started = time.perf_counter()
    return Forecast(
        seconds_per_step=step_seconds,
        load_seconds_per_step=load_seconds,
        steps_per_epoch=planned if limit is None else min(limit, planned),
        epochs=trainer.config.train.epochs,
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        losses=report,
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
