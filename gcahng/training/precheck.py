"""`--check`: try a configuration before it waits in a queue."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from gcahng.data.loader import Batch
from gcahng.training.memory import peak_memory_bytes
from gcahng.training.trainer import Trainer


@dataclass(frozen=True)
class Forecast:
    """What a run will cost, from real steps on this machine.

    Attributes:
        seconds_per_step: Median of the measured steps, loading left out.
        load_seconds_per_step: Waiting for the next batch, in the steady state.
        steps_per_epoch: Iterations of an epoch.
        epochs: Of the whole run.
        peak_memory_bytes: Peak of one rank so far: resident memory on the CPU, allocated memory on CUDA.
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
            "configuration, data and steps are fine\n"
            f"one step: {self.seconds_per_step:.3f} s, waiting for data {self.load_seconds_per_step:.3f} s\n"
            f"one epoch: {self.steps_per_epoch} steps, about {_duration(self.epoch_seconds)}; "
            f"{self.epochs} epochs: about {_duration(self.epochs * self.epoch_seconds)} without evaluation\n"
            f"peak memory: {self.peak_memory_bytes / 2**30:.2f} GiB\n"
            f"losses: {losses}"
        )


def forecast(trainer: Trainer, steps: int = 3) -> Forecast:
    """Load some batches, run a few real steps, and predict time and memory; writes nothing.

    With several ranks all of them call it; times and memory are those of the slowest and the largest.

    Loading and computing are timed apart, since worker processes load while a step computes: what an epoch waits for
    is the slower of the two, in its steady state and not in the first batches that were loaded ahead.

    Args:
        trainer: Freshly built; its weights move, so throw it away afterwards.
        steps: Steps to run; the first one warms up.
    """
    # Epoch 0 may train the head alone; the forecast is for the epochs after the warm-up.
    trainer.parts.metric_model.set_warm_up(False)
    workers = trainer.config.data.num_workers
    epoch = trainer.loader.epoch_iterator(0)
    limit = trainer.config.train.max_steps_per_epoch
    batches, load_seconds = _load(iter(epoch), workers, steps)
    seconds: list[float] = []
    report: dict[str, float] = {}
    for batch in batches:
        started = time.perf_counter()
        moved = batch.to(trainer.device)
        values = trainer.run_step(moved.images, moved.labels, moved.rows)
        report = {name: float(value) for name, value in values.items()}
        seconds.append(time.perf_counter() - started)
        trainer.progress.step += 1
    trainer.steps.finish_checks()
    step_seconds, load_seconds, peak = trainer.ranks.host_max(
        [statistics.median(seconds[1:] or seconds), load_seconds, peak_memory_bytes(trainer.device)]
    )
    return Forecast(
        seconds_per_step=step_seconds,
        load_seconds_per_step=max(0.0, load_seconds - step_seconds) if workers else load_seconds,
        steps_per_epoch=len(epoch) if limit is None else min(limit, len(epoch)),
        epochs=trainer.config.train.epochs,
        peak_memory_bytes=int(peak),
        losses=report,
    )


def _load(batches: Iterator[Batch], workers: int, keep: int) -> tuple[list[Batch], float]:
    """The first `keep` batches, and the steady seconds between two batches when nobody computes in between.

    The first batch of every worker comes after its start, so as many batches as workers go untimed.
    """
    untimed, timed = max(1, workers), 2 * max(1, workers)
    kept: list[Batch] = []
    arrivals = [time.perf_counter()]
    for number, batch in enumerate(batches, 1):
        arrivals.append(time.perf_counter())
        if len(kept) < keep:
            kept.append(batch)
        if number >= max(untimed + timed, keep):
            break
    first = min(untimed, len(arrivals) - 2)
    return kept, (arrivals[-1] - arrivals[first]) / (len(arrivals) - 1 - first)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
