"""Real processes that talk over gloo: one function on W ranks, its results by rank.

A group is started once and given all its work. Importing torch and the library takes seconds: one idle process does it
for all groups of a session, and ranks are forked from that. Ranks meet through a file, so no port is needed; whoever
hangs is killed when time is up, and the test fails.
"""

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gcahng.distributed import Ranks

GROUP_TIMEOUT_S = 60
TIME_LIMIT_S = 240.0

_CONTEXT = multiprocessing.get_context("forkserver")
# Also what training imports when it needs it: optimisers `torch._dynamo`, backbones and launches the others.
_CONTEXT.set_forkserver_preload(["gcahng.training.trainer", "torch._dynamo", "torchvision", "timm", "accelerate"])


class RankFailure(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(
    size: int,
    work: Callable[..., Any],
    *arguments: Any,
    time_limit: float = TIME_LIMIT_S,
    group_timeout: float = GROUP_TIMEOUT_S,
) -> list[Any]:
    """`work(ranks, *arguments)` on `size` processes; what each returned, by rank.

    Args:
        size: W; 1 makes a process too, without a process group.
        work: A function that a fresh process can import.
        arguments: Anything that pickles.
        time_limit: Seconds until all are killed.
        group_timeout: Seconds that a collective waits.
    Raises:
        RankFailure: With the traceback of the rank that failed first.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Not as arguments of the processes: those would get tensors as memory to share, of which only so many can be.
        Path(folder, "work").write_bytes(pickle.dumps((work, arguments)))
        processes = [
            _CONTEXT.Process(target=_rank, args=(rank, size, folder, group_timeout, dict(os.environ)), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            _join(processes, Path(folder), time.monotonic() + time_limit)
        finally:
            for process in processes:
                process.kill()
                process.join()
        found = []
        for rank in range(size):
            with open(Path(folder) / f"result-{rank}", "rb") as file:
                found.append(pickle.load(file))
        return found


def _join(processes: list[Any], folder: Path, deadline: float) -> None:
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            slow = [rank for rank, process in enumerate(processes) if process.is_alive()]
            raise RankFailure(f"ranks {slow} did not end in time{_errors(folder)}")
        if any(process.exitcode for process in processes):
            time.sleep(0.5)  # the others may be writing down why
            break
        time.sleep(0.02)
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if failed:
        raise RankFailure(f"ranks {failed} failed{_errors(folder)}")


def _errors(folder: Path) -> str:
    files = sorted(folder.glob("error-*"), key=lambda file: file.stat().st_mtime)
    return "".join(f"\n\n--- {file.name}\n{file.read_text()}" for file in files)


def _rank(rank: int, size: int, folder: str, group_timeout: float, environment: dict[str, str]) -> None:
    # Not as it was when the first group started.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        work, arguments = pickle.loads(Path(folder, "work").read_bytes())
        # Backends collect garbage when they close: a quarter of a second, through all that torch has ever made.
        gc.freeze()
        if size > 1:
            store = dist.FileStore(os.path.join(folder, "store"), size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=group_timeout)
            )
        result = work(Ranks(rank, size), *arguments)
        with open(os.path.join(folder, f"partial-{rank}"), "wb") as file:
            pickle.dump(result, file)
        os.rename(os.path.join(folder, f"partial-{rank}"), os.path.join(folder, f"result-{rank}"))
        if size > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
