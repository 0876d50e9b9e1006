"""Saving while training goes on: a snapshot in memory, written by a thread of rank 0.

A save stops the training for as long as it takes to collect the state from all ranks and to copy it into the host's
memory. What the thread has written is a checkpoint as `checkpoint.py` describes it, whole or not there. A save that
is due while the one before is still being written waits for that.

A disk that refuses does not end the training: the error is logged, the newest whole checkpoint stays, the next save
tries again. Only the end of a run insists (`finish`).
"""

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import TrainingError
from gcahng.training import checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, in memory that nobody else writes to.

    Attributes:
        step: Iterations finished.
        modules, optimizers: States by part.
        ranks: Tensors that each rank has for itself, by `rank/name`.
        state: What `state.json` holds.
        config_yaml: Resolved configuration.
        best: Steps of the best checkpoints by link.
        keep_all: Remove no older checkpoint.
    """

    step: int
    modules: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, Mapping[str, Any]]
    ranks: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config_yaml: str
    best: Mapping[str, int]
    keep_all: bool = False


@dataclass(frozen=True)
class Saved:
    """How a save went.

    Attributes:
        step: Of the checkpoint.
        seconds: From the call until it was whole on the disk, or had failed.
        error: Why it failed; None if it did not.
    """

    step: int
    seconds: float
    error: TrainingError | None


class CheckpointWriter:
    """Writes a run's checkpoints one after the other; rank 0 has one."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int,
        in_background: bool,
        told: Callable[[Saved], None],
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            run_dir: Run folder.
            keep_last: Newest checkpoints kept, besides those that a link names.
            in_background: Write in a thread; False: `save` returns when the checkpoint is written.
            told: Hears of each save that has ended, in the thread that calls `save` or `finish`.
            first: Done before each checkpoint is written, in the thread that writes it.
        """
        self.run_dir = run_dir
        self._keep_last = keep_last
        self._in_background = in_background
        self._told = told
        self._first = first
        self._thread: threading.Thread | None = None
        self._done: list[Saved | BaseException] = []
        self.last: Saved | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot, after the one before has been written; its failure is logged, not raised."""
        self.settle()
        started = time.monotonic()
        if not self._in_background:
            self._done.append(self._write(snapshot, started))
            self.settle()
            return

        def work() -> None:
            try:
                self._done.append(self._write(snapshot, started))
            except BaseException as error:  # raised by the next `settle`
                self._done.append(error)

        # No daemon: an interpreter that ends waits for the file to be whole.
        self._thread = threading.Thread(target=work, name="checkpoint writer")
        self._thread.start()

    def settle(self) -> None:
        """Wait for what is being written, and tell of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.tell()

    def tell(self) -> None:
        """Tell of what has ended since the last time, without waiting.

        Raises:
            BaseException: The writing failed for another reason than its disk.
        """
        while self._done:
            saved = self._done.pop(0)
            if isinstance(saved, BaseException):
                raise saved
            self.last = saved
            self._told(saved)

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            TrainingError: It failed.
        """
        self.settle()
        if self.last is not None and self.last.error is not None:
            raise self.last.error

    def _write(self, snapshot: Snapshot, started: float) -> Saved:
        error = None
        try:
            self._save(snapshot)
        except (TrainingError, OSError) as caught:
            error = caught if isinstance(caught, TrainingError) else TrainingError(f"{self.run_dir}: {caught}")
            log.error("%s Training goes on without it.", error)
        return Saved(snapshot.step, time.monotonic() - started, error)

    def _save(self, snapshot: Snapshot) -> None:
        self._first()
        folder = checkpoint.save_checkpoint(
            self.run_dir,
            snapshot.step,
            modules=snapshot.modules,
            optimizers=snapshot.optimizers,
            ranks=snapshot.ranks,
            state=snapshot.state,
            config_yaml=snapshot.config_yaml,
        )
        checkpoint.point(self.run_dir, "last", folder)
        for link, step in snapshot.best.items():
            # From the counters, not from what just improved: a run that was killed before it set a
            # link sets it after it was resumed.
            if (best := self.run_dir / f"step-{step}").is_dir():
                checkpoint.point(self.run_dir, link, best)
        if not snapshot.keep_all:
            checkpoint.prune(self.run_dir, self._keep_last)


class HostCopies:
    """Copies of a state in the host's memory, which the next copy uses again.

    Fresh memory costs several times what the copy itself does: the system clears each page when it is first written
    to. So a state's memory is held as long as the run lasts.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], Tensor] = {}

    def of(self, state: Any) -> Any:
        """A copy of tensors, dictionaries, lists and plain values; it holds until the next call."""
        before, self._memory = self._memory, {}
        return self._copied(state, (), before)

    def _copied(self, state: Any, place: tuple[Any, ...], before: Mapping[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(state, Tensor):
            known = before.get(place)
            if known is None or known.shape != state.shape or known.dtype != state.dtype:
                known = torch.empty(state.shape, dtype=state.dtype)
            self._memory[place] = known.copy_(state.detach())
            return known
        if isinstance(state, Mapping):
            return {key: self._copied(value, (*place, key), before) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self._copied(value, (*place, n), before) for n, value in enumerate(state))
        return copy.deepcopy(state)
