"""Who wants to know how a run goes, beside its log: warnings, the status file, live metrics.

Every rank has its observers. They are told numbers of the host; none of them may talk to other ranks, wait for the
device, or end the training.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gcahng.distributed import Ranks
from gcahng.training.config import Config
from gcahng.training.progress import Progress
from gcahng.training.saving import Saved

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """What is known when training begins.

    Attributes:
        config: Settings.
        run_dir: Run folder.
        ranks: All processes.
        device: Of this one.
        local_rank: Of this one on its machine.
        steps_per_epoch: Of an epoch that is begun at its start.
    """

    config: Config
    run_dir: Path
    ranks: Ranks
    device: torch.device
    local_rank: int
    steps_per_epoch: int


class RunObserver:
    """Does nothing at each event; subclasses do what they are for."""

    def begin(self, facts: RunFacts, progress: Progress) -> None:
        """Training begins, or goes on."""

    def step(self, progress: Progress, seconds: float, waited: float, images: int) -> None:
        """A step has ended: seconds since the one before, those of them that waited for data, images of this rank.

        On CUDA a single step's seconds are those of the host, which runs ahead of the device.
        """

    def logged(self, progress: Progress, values: Mapping[str, Any]) -> None:
        """A row of `metrics.jsonl` (kind step): of all ranks together, the same on each."""

    def evaluating(self, progress: Progress) -> None:
        """An evaluation begins."""

    def evaluated(self, progress: Progress, row: Mapping[str, Any]) -> None:
        """A row of `metrics.jsonl` (kind evaluation), the same on each rank."""

    def dropped(self, progress: Progress, reason: str) -> None:
        """A step met numbers that are not finite and was left out."""

    def paused(self, progress: Progress, seconds: float) -> None:
        """A save has stopped the training for so long."""

    def saved(self, progress: Progress, saved: Saved) -> None:
        """A checkpoint is written, or has failed to be; on rank 0."""

    def end(self, progress: Progress, status: str) -> None:
        """Training has ended: "finished", "interrupted" or "failed"."""


class Observers(RunObserver):
    """Several as one; one that fails is logged and told of the end alone from then on."""

    def __init__(self, observers: Sequence[RunObserver]) -> None:
        self._observers = list(observers)
        self._failed: list[RunObserver] = []

    def begin(self, facts: RunFacts, progress: Progress) -> None:
        self._tell("begin", facts, progress)

    def step(self, progress: Progress, seconds: float, waited: float, images: int) -> None:
        self._tell("step", progress, seconds, waited, images)

    def logged(self, progress: Progress, values: Mapping[str, Any]) -> None:
        self._tell("logged", progress, values)

    def evaluating(self, progress: Progress) -> None:
        self._tell("evaluating", progress)

    def evaluated(self, progress: Progress, row: Mapping[str, Any]) -> None:
        self._tell("evaluated", progress, row)

    def dropped(self, progress: Progress, reason: str) -> None:
        self._tell("dropped", progress, reason)

    def paused(self, progress: Progress, seconds: float) -> None:
        self._tell("paused", progress, seconds)

    def saved(self, progress: Progress, saved: Saved) -> None:
        self._tell("saved", progress, saved)

    def end(self, progress: Progress, status: str) -> None:
        self._observers += self._failed  # what they hold open is closed
        self._tell("end", progress, status)

    def _tell(self, event: str, *facts: Any) -> None:
        for observer in tuple(self._observers):
            try:
                getattr(observer, event)(*facts)
            except Exception:  # whatever it is: not worth a run
                log.exception("%s failed and is left out from here on.", type(observer).__name__)
                self._observers.remove(observer)
                self._failed.append(observer)


def make_observers(config: Config, ranks: Ranks) -> Observers:
    """The observers that a configuration asks for, on this rank; all ranks call it.

    Raises:
        ConfigError: A file that one of them writes cannot be written.
    """
    # These build on what stands above.
    from gcahng.training.collapse_warning import CollapseWarning
    from gcahng.training.heartbeat import HeartbeatObserver
    from gcahng.training.metrics_observer import metrics_observers

    heartbeat = [HeartbeatObserver()] if ranks.first else []
    collapse = [CollapseWarning(config)] if config.health.collapse_warning else []
    return Observers([*heartbeat, *collapse, *metrics_observers(config, ranks)])
