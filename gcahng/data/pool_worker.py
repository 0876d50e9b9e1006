"""How worker processes of a pool behave when the process that started them is stopped or killed."""

import os
import signal
import threading
from multiprocessing import parent_process


def follow_parent() -> None:
    """Called first in each worker: it leaves Ctrl-C to the main process, and ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, the workers of a killed process would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
