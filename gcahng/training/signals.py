"""Signals that ask a process to end soon, noted without doing anything about them.

Nothing but the standard library, so that a command can note them before torch is imported, which takes seconds.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# Set by torchrun, and by `accelerate launch` where it starts one process. Both start processes from their main thread.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Signals:
    """The first of `SIGNALS` that came.

    Attributes:
        received: Its number; None so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within it signals are noted; afterwards they do what they did before.

        Python lets the main thread alone handle signals: elsewhere nothing is noted.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: it was not installed by Python, which cannot put it back.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def obey(self) -> None:
        """From here on they end this process, as they do by default; one that was noted does so at once."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.received is not None:
            signal.raise_signal(self.received)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number


def follow_launcher() -> None:
    """Get SIGTERM when the launcher dies, so that no process trains on without one; Linux only.

    torchrun dies at once of signals that it was not told to handle, `accelerate launch` with one process of any.
    """
    if sys.platform == "linux" and any(name in os.environ for name in _LAUNCHERS):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
