"""Loader worker processes: how they are started, how they behave at signals, and what becomes of their faults."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from gcahng.errors import DataError, InputError

_PREFETCH = 2  # requests per worker that are made ahead of their answers
_LOOK_EVERY_S = 1.0  # a worker whose parent was killed ends within this time
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([0-9, ]+)\) ?(?:is killed by signal: ([^.]+))?")
_SHARED_MEMORY = "/dev/shm"
_NO_MEMORY = (
    "most likely for want of memory (see the system's log). Lower `data.num_workers`, or take a larger machine."
)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_IS_LINUX = hasattr(signal, "sigtimedwait")  # macOS lacks it; there these signals end a worker


@dataclass(frozen=True)
class Failure:
    """An error on its way from a worker, as a value: raised, it would bring a traceback along."""

    message: str


def worker_loader(
    dataset: Any, requests: Any, num_workers: int, pin_memory: bool, keep: bool = False
) -> DataLoader[Any]:
    """A loader that answers each request with one item of `dataset`, in order.

    Args:
        dataset: Answers a request with a whole batch.
        requests: Iterable of requests.
        num_workers: Worker processes; 0 works in this process.
        pin_memory: Put batches into page-locked memory.
        keep: Keep the workers from one pass over the requests to the next.
    Raises:
        InputError: `num_workers` is negative.
    """
    if num_workers < 0:
        raise InputError(f"`num_workers` must be 0 or more, got {num_workers}. Raise it.")
    # An item of the dataset is a whole batch already, so that one worker makes it and knows all of
    # its samples; `batch_size=None` keeps torch from batching batches.
    return _Loader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        collate_fn=_shared,
        generator=torch.Generator(),  # torch seeds its workers from it, else from the global one
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # Whatever the process's default: children of a fork server would live on when this process is killed.
        multiprocessing_context="fork" if num_workers and _IS_LINUX else None,
        persistent_workers=keep and num_workers > 0,
        prefetch_factor=_PREFETCH if num_workers else None,
    )


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Any:
        # Workers are forked here: from their first moment on they take no notice of the main process's signals.
        held = _SIGNALS if _IS_LINUX else ()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requests_in_flight(num_workers: int) -> int:
    """Requests of `worker_loader` that may be unanswered at once, the newest one included."""
    return _PREFETCH * max(0, num_workers) + 1


def next_answer(answers: Iterator[Any]) -> Any:
    """The next answer of a `worker_loader`, None after the last one; a `Failure` where a worker died."""
    try:
        return next(answers, None)
    except RuntimeError as error:
        fault = worker_fault(error)
        if fault is None:
            raise
        return Failure(str(fault))
    except (EOFError, ConnectionError, FileNotFoundError) as error:  # it died while its answer was taken
        return Failure(f"A loader worker process was killed ({type(error).__name__}), {_NO_MEMORY}")


def worker_fault(error: BaseException) -> DataError | None:
    """What is to be said of a worker that died; None where the error is about something else.

    torch notices it by a signal, so its error may come up wherever the main process is at that moment.
    """
    match = _WORKER.search(str(error)) if isinstance(error, RuntimeError) else None
    if match is None:
        return None
    how = f"was killed ({match[2]})" if match[2] else "ended"
    if match[2] == "Bus error":
        return DataError(f"Loader worker process {match[1]} {how}, {_no_shared_memory()}")
    return DataError(f"Loader worker process {match[1].strip()} {how}, {_NO_MEMORY}")


def _no_shared_memory() -> str:
    try:
        room = os.statvfs(_SHARED_MEMORY)
        found = f"{room.f_bavail * room.f_frsize >> 20} MiB of {room.f_blocks * room.f_frsize >> 20} are free"
    except OSError as error:
        found = f"it cannot be looked at: {error.strerror}"
    return (
        f"most likely for want of shared memory, through which workers hand over images: of {_SHARED_MEMORY} {found}. "
        "Enlarge it (docker run --shm-size=8g), remove what is left there, or lower `data.num_workers`; 0 needs none."
    )


def _shared(answer: Any) -> Any:
    """An answer, its tensors in shared memory, or a `Failure`; in the main process as it is.

    torch would put them there in a thread that prints an error and drops the answer, and the main process would wait
    for it for ever.
    """
    if get_worker_info() is None:
        return answer
    try:
        for tensor in _tensors(answer):
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        return Failure(f"A loader worker cannot hand over a batch ({reason}), {_no_shared_memory()}")
    return answer


def _tensors(answer: Any) -> Iterator[Tensor]:
    """The tensors of what workers answer: tuples, lists, mappings and data classes of them."""
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, tuple | list):
        for part in answer:
            yield from _tensors(part)
    elif isinstance(answer, Mapping):
        yield from _tensors(list(answer.values()))
    elif is_dataclass(answer) and not isinstance(answer, type):
        yield from _tensors([getattr(answer, field.name) for field in fields(answer)])


def _start_worker(_: int) -> None:
    """Leave signals to the main process, and computing to one thread.

    Ctrl-C and a scheduler's SIGTERM or SIGUSR1 reach the whole process group. The main process finishes its
    step and saves, for which it needs its workers. They end when it tells them to, which may be by
    a SIGTERM of its own, or when it is gone.
    """
    torch.set_num_threads(1)
    # An answer that cannot be sent would be dropped, and waited for for ever.
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _IS_LINUX:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _end_unsent(error: BaseException, _: object) -> None:
    print(f"error: a loader worker cannot send its answer: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _obey_parent(parent: int) -> None:
    """End this process at a SIGTERM of its parent, or when that is gone; take no notice of other signals.

    torch looks for the parent too, but only between two answers, and one may wait minutes for a server.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _LOOK_EVERY_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
