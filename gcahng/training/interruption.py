"""A signal asks the run to end soon: all ranks save after the same step and end.

SLURM sends SIGTERM or SIGUSR1 before a job's time is over, clouds send SIGTERM to spot instances. The handler notes it
and nothing else (`signals.py`), so that a signal may come at any moment and any number of times, to any of the ranks.
The ranks agree on it before the run folder is touched and after each step. Where they work for different times
(embedding a split), a rank that was signalled raises at its next batch; others learn of it through the store of the
process group, in which it leaves word.

So a run that ends this way is either saved or has not begun; the marker `PREEMPTED` says which. A signal that comes
behind the last step and the last batch of the last evaluation changes nothing: the run finishes.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from gcahng.distributed import ONE, Ranks
from gcahng.distributed.word import SharedWord
from gcahng.errors import Interrupted, TrainingError
from gcahng.training.progress import Progress
from gcahng.training.signals import Signals

MARKER = "PREEMPTED"
"""File in the run folder of a run that was interrupted, and can be started again; the next start removes it."""
INTERRUPTED_STATUS = 75
"""Exit status of such a run's processes (EX_TEMPFAIL of sysexits.h)."""


class Interruption:
    """Whether this run was asked to end."""

    def __init__(self, ranks: Ranks = ONE, signals: Signals | None = None) -> None:
        """
        Args:
            ranks: All of them make one.
            signals: Where signals have been noted already; by default `signals.noted()` of a fresh one notes them.
        """
        self.signals = Signals() if signals is None else signals
        self._ranks = ranks
        self._word = SharedWord("interrupted", ranks)

    def agreed(self) -> bool:
        """Whether any rank was asked to end; all ranks call it at the same place, and get the same answer."""
        # The largest number: a signal is 1 or more, and ranks that got different ones name the same.
        found = int(self._ranks.host_max([float(self.signals.received or 0)])[0])
        if found:
            self.signals.received = found
        return found > 0

    def check(self) -> None:
        """Like `agreed`.

        Raises:
            Interrupted: On all ranks, if one was asked to end.
        """
        if self.agreed():
            raise self.error()

    def poll(self) -> None:
        """Called between the pieces of long work inside `distributed.agreement.agreed`, as often as a rank likes.

        Raises:
            Interrupted: This rank, or another one, was asked to end.
        """
        if self.signals.received is not None:
            self._word.leave(str(self.signals.received))
        elif (said := self._word.heard()) is not None:
            self.signals.received = int(said)
        if self.signals.received is not None:
            raise self.error()

    def error(self) -> Interrupted:
        """What to raise."""
        number = self.signals.received or signal.SIGTERM
        return Interrupted(f"The run was asked to end by {signal.Signals(number).name}.")


def leave_marker(run_dir: Path, error: Interrupted, progress: Progress) -> None:
    """Write `PREEMPTED`: that the run has ended early, and where it goes on.

    A job script that requeues compares `slurm_job` and `slurm_restarts` with its own: a marker may be older.

    Raises:
        TrainingError: The file cannot be written.
    """
    checkpoint = f"step-{progress.step}"
    facts: dict[str, Any] = {
        "reason": str(error),
        "epoch": progress.epoch,
        "batch": progress.batch,
        "step": progress.step,
        # None: nothing has been trained in this folder yet, and the run starts as it did.
        "checkpoint": checkpoint if (run_dir / checkpoint).is_dir() else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "time": time.time(),
    }
    partial = run_dir / f"{MARKER}.partial"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        partial.replace(run_dir / MARKER)
    except OSError as problem:
        raise TrainingError(
            f"{run_dir / MARKER} cannot be written ({problem}). {error} What was trained is saved: make room, and "
            "start the run again with train.resume=auto."
        ) from problem


def remove_marker(run_dir: Path) -> None:
    """The run goes on."""
    (run_dir / MARKER).unlink(missing_ok=True)
