"""What a run saves of itself and goes on from; all ranks collect, rank 0 writes."""

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcahng.distributed import Ranks
from gcahng.distributed.agreement import agreed
from gcahng.training import checkpoint
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import Backend
from gcahng.training.config import Config, resolved_yaml
from gcahng.training.observers import RunObserver
from gcahng.training.parts import RunParts
from gcahng.training.progress import Progress
from gcahng.training.random_states import random_states, set_random_states
from gcahng.training.run_log import NoLog, RunLog
from gcahng.training.run_state import load_optimizers, load_schedules, schedule_states, whole_states
from gcahng.training.saving import CheckpointWriter, HostCopies, Saved, Snapshot

log = logging.getLogger(__name__)

# The links that name the best checkpoints, and the split whose evaluation chooses each.
BEST_LINKS = {"best": "validation", "best_test": "test"}
_RANDOM, _BUFFERS = "random", "buffers"


class RunSaver:
    """Saves parts, averages and progress of a run, and loads them."""

    def __init__(
        self,
        config: Config,
        parts: RunParts,
        backend: Backend,
        ranks: Ranks,
        device: torch.device,
        data_identity: Mapping[str, Any],
    ) -> None:
        """
        Args:
            config: Settings.
            parts: What is trained.
            backend: Knows the optimisers' states.
            ranks: All of them have a saver, and call `save` and `load` together.
            device: Of this rank.
            data_identity: What a checkpoint says of the data.
        """
        self.config = config
        self._parts, self._backend, self._ranks, self._device = parts, backend, ranks, device
        self._data_identity = dict(data_identity)
        self._observer = RunObserver()
        self._progress = Progress()
        self._run_log: RunLog | NoLog = NoLog()
        self._copies = HostCopies()
        self._writer = CheckpointWriter(
            Path(config.run.dir),
            keep_last=config.train.keep_last,
            in_background=config.train.save_in_background,
            told=self._told,
            first=self._sync_log,
        )
        self.unwritten: dict[str, list[str]] = {}
        """Rows of the run's log that were not in its files when the checkpoint was made that is gone on from."""

    def watch(self, observer: RunObserver, progress: Progress, run_log: RunLog | NoLog) -> None:
        """Tell `observer` of every save from here on; each holds the rows of `run_log` that wait for the disk."""
        self._observer, self._progress, self._run_log = observer, progress, run_log

    def _sync_log(self) -> None:
        # No checkpoint may outlive the rows of its steps.
        self._run_log.sync()

    def _told(self, saved: Saved) -> None:
        self._observer.saved(self._progress, saved)

    def save(self, progress: Progress, averages: EpochAverages, *, keep_all: bool = False) -> None:
        """Take a snapshot of all ranks, and have rank 0 write it; it does not fail for a disk that refuses.

        Args:
            progress, averages: Of the run.
            keep_all: Remove no older checkpoint.
        """
        started = time.perf_counter()
        modules, optimizers = whole_states(self._parts, self._backend)
        own = self._of_rank()
        by_rank = self._ranks.all_of(own) if self._ranks.size > 1 else [own]
        if self._ranks.first:
            # The state of the one before is in memory until it is written: not two of them at once.
            self._writer.settle()
            best = {link: progress.best[split]["step"] for link, split in BEST_LINKS.items() if split in progress.best}
            state = {
                "progress": vars(progress),
                "averages": averages.state_dict(),
                "schedules": schedule_states(self._parts),
                "backend": self._backend.state_dict(),
                "data": self._data_identity,
                "ranks": self._ranks.size,
                "unwritten": self._run_log.unwritten(),
            }
            modules, optimizers, state = self._copies.of([modules, optimizers, state])
            snapshot = Snapshot(
                progress.step,
                modules,
                optimizers,
                {f"{rank}/{name}": tensor for rank, found in enumerate(by_rank) for name, tensor in found.items()},
                state,
                resolved_yaml(self.config),
                best,
                keep_all,
            )
            self._writer.save(snapshot)
        self._observer.paused(progress, time.perf_counter() - started)

    def tell(self) -> None:
        """Let the observer know of saves that have ended; nothing is waited for."""
        if self._ranks.first:
            self._writer.tell()

    def settle(self) -> None:
        """Wait until this rank writes nothing any more."""
        self._writer.settle()

    def finish(self) -> None:
        """Wait for the last save; all ranks call it.

        Raises:
            TrainingError: It failed, on every rank.
        """
        agreed(self._ranks, self._writer.finish)

    def load(self, folder: Path, averages: EpochAverages) -> Progress:
        """Go on from a checkpoint whose weights the parts have already; all ranks call it."""
        state = checkpoint.read_state(folder)
        load_optimizers(folder, self._parts, self._backend, self._ranks)
        load_schedules(state["schedules"], self._parts)
        averages.load_state_dict(state["averages"])
        self._backend.load_state_dict(state["backend"])
        self.unwritten = state.get("unwritten", {})
        if state.get("ranks") == self._ranks.size:
            # No rank may put the folder in order while another one reads it.
            own = agreed(self._ranks, partial(checkpoint.read_tensors, folder, checkpoint.RANKS))
            self._go_on_as_rank(own)
        progress = Progress(**state["progress"])
        within = f" and {progress.batch} batches" if progress.batch else ""
        log.info("Resumed from %s: %d epochs%s, step %d.", folder, progress.epoch, within, progress.step)
        return progress

    def _of_rank(self) -> dict[str, Tensor]:
        """What this rank alone has: its generators' states, and statistics that each rank gathers of its own images."""
        own = {f"{_RANDOM}/{name}": state for name, state in random_states(self._device).items()}
        if self._ranks.size > 1 and self.config.local_statistics:
            buffers = self._parts.metric_model.named_buffers()
            own |= {f"{_BUFFERS}/{name}": buffer.detach().to("cpu", copy=True) for name, buffer in buffers}
        return own

    def _go_on_as_rank(self, tensors: Mapping[str, Tensor]) -> None:
        prefix = f"{self._ranks.rank}/"
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        random = {n.removeprefix(f"{_RANDOM}/"): t for n, t in own.items() if n.startswith(f"{_RANDOM}/")}
        set_random_states(random, self._device)
        buffers = dict(self._parts.metric_model.named_buffers())
        for name, tensor in own.items():
            if name.startswith(f"{_BUFFERS}/"):
                buffers[name.removeprefix(f"{_BUFFERS}/")].copy_(tensor)
