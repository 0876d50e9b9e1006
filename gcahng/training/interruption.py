"""A signal asks the run to end soon: all ranks save after the same step and end.

SLURM sends SIGTERM or SIGUSR1 before a job's time is over, clouds send SIGTERM to spot instances. The handler notes it
and nothing else, so that a signal may come at any moment and any number of times. In the training loop the ranks agree
after each step. Where they work for different times (embedding a split), a rank that was signalled raises at its next
batch; others learn of it through the store of the process group, in which it leaves word.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from gcahng.distributed import ONE, Ranks
from gcahng.distributed.word import SharedWord
from gcahng.errors import Interrupted
from gcahng.training.progress import Progress

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MARKER = "PREEMPTED"
"""File in the run folder of a run that was interrupted and saved; the next start removes it."""
INTERRUPTED_STATUS = 75
"""Exit status of such a run's processes (EX_TEMPFAIL of sysexits.h)."""


class Interruption:
    """Whether this run was asked to end."""

    def __init__(self, ranks: Ranks = ONE) -> None:
        self._ranks = ranks
        self._received: int | None = None
        self._word = SharedWord("interrupted", ranks)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it signals are noted; afterwards they do what they did before. Only in the main thread."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = self._received or number

    def agreed(self) -> bool:
        """Whether any rank was asked to end; all ranks call it at the same place, and get the same answer."""
        found = int(self._ranks.host_max([float(self._received or 0)])[0])
        self._received = self._received or found or None
        return self._received is not None

    def poll(self) -> None:
        """Called between the pieces of long work that ends in `agreed`, as often as a rank likes.

        Raises:
            Interrupted: This rank, or another one, was asked to end.
        """
        if self._received is not None:
            self._word.leave(str(self._received))
        elif (said := self._word.heard()) is not None:
            self._received = int(said)
        if self._received is not None:
            raise self.error()

    def error(self) -> Interrupted:
        """What to raise."""
        number = self._received or signal.SIGTERM
        return Interrupted(f"The run was asked to end by {signal.Signals(number).name}.")


def leave_marker(run_dir: Path, error: Interrupted, progress: Progress, checkpoint: str) -> None:
    """Write `PREEMPTED`: that the run has ended early and is saved."""
    facts: dict[str, Any] = {
        "reason": str(error),
        "epoch": progress.epoch,
        "batch": progress.batch,
        "step": progress.step,
        "checkpoint": checkpoint,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "time": time.time(),
    }
    partial = run_dir / f"{MARKER}.partial"
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    partial.replace(run_dir / MARKER)


def remove_marker(run_dir: Path) -> None:
    """The run goes on."""
    (run_dir / MARKER).unlink(missing_ok=True)
