"""What every command line does alike: logging, clear errors without a traceback, and the end of several ranks."""

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from gcahng.data.workers import worker_fault
from gcahng.distributed import failures
from gcahng.errors import InputError, TrainingError
from gcahng.training.launched import launched_rank
from gcahng.training.signals import SIGNALS

INPUT_FAULT = 2
"""Exit status for input that can be repaired."""

# A rank that fails before the ranks have met lets rank 0 speak first: the launcher then ends the others.
_RANK_0_FIRST_S = 20.0


def run(main: Callable[[], int]) -> None:
    """Run `main` and exit with its status: 2 for input that can be repaired, 1 for a run that diverged.

    Several ranks speak with one voice: rank 0 logs and prints, the others only what concerns them alone
    (`gcahng.distributed.failures`); where one fails, all end.
    """
    rank = launched_rank()
    _set_up_logging(rank)
    try:
        status = main()
    except (InputError, TrainingError) as error:
        status = _end(error, f"error: {error}", INPUT_FAULT if isinstance(error, InputError) else 1, rank)
    except KeyboardInterrupt as error:
        status = _end(error, "interrupted", 130, rank)
    except Exception as error:
        fault = worker_fault(error)  # may come up anywhere
        if fault is not None:
            sys.exit(_end(fault, f"error: {fault}", INPUT_FAULT, rank))
        if rank == 0 and not failures.connected():
            raise
        status = _end(error, "".join(traceback.format_exception(error)).rstrip(), 1, rank)
    sys.exit(status)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _shown(super().format(record))


def _shown(text: str) -> str:
    """A message without what moves a terminal's cursor or colour: it may hold names from anybody's files."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _set_up_logging(rank: int) -> None:
    sender = f"rank {rank}: " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"{sender}%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if rank:
        logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger(failures.EACH_RANK).setLevel(logging.WARNING)
        warnings.simplefilter("ignore")


def _end(error: BaseException, text: str, status: int, rank: int) -> int:
    """Say why the run ends; returns the exit status of a process that is alone, and ends one that is not."""
    for number in SIGNALS:  # no longer noted: the launcher may end this rank while it waits for its turn
        signal.signal(number, signal.SIG_DFL)
    if not failures.connected():
        if rank:
            time.sleep(_RANK_0_FIRST_S)
            text = f"rank {rank}: {text}"
        print(_shown(text), file=sys.stderr)
        return status
    # Ctrl-C comes twice: from the terminal, and from the launcher, which passes its own on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = failures.ending(error, text, status)
    if end.text is not None:
        print(_shown(end.text), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: what would be tidied up at an ordinary exit (groups, engines, loaders) waits for ranks that are gone.
    os._exit(end.status)
