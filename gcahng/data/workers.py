"""Loader worker processes: how they are started, and how they behave at signals."""

import os
import signal
import threading
from typing import Any

import torch
from torch.utils.data import DataLoader

from gcahng.errors import InputError

_PREFETCH = 2  # requests per worker that are made ahead of their answers


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
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # torch seeds its workers from it, else from the global one
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=keep and num_workers > 0,
        prefetch_factor=_PREFETCH if num_workers else None,
    )


def requests_in_flight(num_workers: int) -> int:
    """Requests of `worker_loader` that may be unanswered at once, the newest one included."""
    return _PREFETCH * max(0, num_workers) + 1


def _as_it_is(answer: Any) -> Any:
    return answer


def _start_worker(_: int) -> None:
    """Leave signals to the main process, and computing to one thread.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group. The main process finishes its
    step and saves, for which it needs its workers. They end when it tells them to, which may be by
    a SIGTERM of its own, or (torch looks every few seconds) when it is gone.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it; there SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    """End this process at a SIGTERM of its parent; take no notice of others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
