"""A function on W processes that talk over gloo, one thread each, for benchmarks."""

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from gcahng.distributed import Ranks

GROUP_TIMEOUT_S = 120.0
TIME_LIMIT_S = 600.0


def on_ranks(
    size: int,
    work: Callable[..., Any],
    *arguments: Any,
    group_timeout: float = GROUP_TIMEOUT_S,
    time_limit: float = TIME_LIMIT_S,
) -> list[Any]:
    """`work(ranks, *arguments)` on `size` gloo processes; what each returned, by rank.

    Args:
        size: W.
        work: A function that a fresh process can import.
        arguments: Anything that pickles.
        group_timeout: Seconds that a collective waits.
        time_limit: Seconds until all are killed.

    Raises:
        TimeoutError: They take too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = spawn(_rank, (size, folder, group_timeout, work, arguments), nprocs=size, join=False)
        assert started is not None
        deadline = time.monotonic() + time_limit
        try:
            while not started.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{size} ranks did not end within {time_limit:.0f} s.")
        finally:
            for process in started.processes:
                process.kill()
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(size)]


def _rank(
    rank: int, size: int, folder: str, group_timeout: float, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(os.path.join(folder, "store"), size)
        timeout = timedelta(seconds=group_timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    found = work(Ranks(rank, size), *arguments)
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()
