"""Training processes that die (SIGKILL) at a chosen moment, and what is left is gone on with."""

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import rank_group  # noqa: F401  what the server of processes imports
import torch
import torch.distributed as dist
from launched_here import launched_here
from run_cases import make_config
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from gcahng.distributed import Ranks
from gcahng.models.embedder import Embedder
from gcahng.training import checkpoint
from gcahng.training import trainer as trainer_module
from gcahng.training.trainer import Trainer

TIME_LIMIT_S = 240.0
GROUP_TIMEOUT_S = 60
CLOCK = "the clock"


@dataclass(frozen=True)
class Death:
    """When a process dies.

    Attributes:
        place: One of `PLACES`, or `CLOCK`.
        when: The call of that place that it does not survive, from 1; for the clock seconds after its start.
    """

    place: str
    when: float


NEVER = Death("", 0)


class Deaths:
    """Counts how often this process came to each place, and dies where it must."""

    def __init__(self, death: Death) -> None:
        self._death = death
        self.met: dict[str, int] = {}

    def come_to(self, place: str, last_act: Callable[[], Any] = lambda: None) -> None:
        if threading.current_thread().name == "heartbeat":
            return  # how often it writes depends on the clock
        self.met[place] = self.met.get(place, 0) + 1
        if (self._death.place, self._death.when) == (place, self.met[place]):
            with suppress(Exception):
                last_act()
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # in another thread: the signal is on its way

    def around(self, owner: Any, name: str, half: Callable[..., Any] | None = None) -> None:
        """Come to "before NAME" and "after NAME" at each call; with `half`, to "within NAME" too, which does it."""
        whole = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.come_to(f"before {name}")
            if half is not None:
                self.come_to(f"within {name}", lambda: half(*arguments, **options))
            result = whole(*arguments, **options)
            self.come_to(f"after {name}")
            return result

        setattr(owner, name, watched)


def lie_in_wait(death: Death) -> Deaths:
    """Watch everything that this process does to its weights and to its disk."""
    deaths = Deaths(death)
    save_file, write, rmtree = checkpoint.save_file, os.write, shutil.rmtree

    def half_file(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
        save_file(tensors, file)
        os.truncate(file, file.stat().st_size // 2)

    def half_tree(folder: Path, **_: Any) -> None:
        for entry in sorted(folder.iterdir())[::2]:
            entry.unlink()

    deaths.around(checkpoint, "save_file", half_file)
    deaths.around(torch, "save")
    deaths.around(os, "fsync")
    deaths.around(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
    deaths.around(shutil, "rmtree", half_tree)
    deaths.around(Path, "rename")
    deaths.around(Path, "replace")
    deaths.around(Path, "symlink_to")
    deaths.around(trainer_module, "evaluate")
    assert rmtree is not shutil.rmtree
    # Some optimisers have moved, others have not.
    register_optimizer_step_post_hook(lambda *_: deaths.come_to("within a step"))

    def in_evaluation(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, Embedder):
            deaths.come_to("a forward pass of training" if module.training else "within an evaluation")

    register_module_forward_pre_hook(in_evaluation)
    return deaths


def _train(
    rank: int, size: int, store: str, arguments: tuple[Path, Path, Mapping[str, Any]], death: Death, counts: Path | None
) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    shards, run_dir, settings = arguments
    if size > 1:
        timeout = timedelta(seconds=GROUP_TIMEOUT_S)
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
    ranks = Ranks(rank, size)
    config = make_config(shards, run_dir, settings)
    trainer = Trainer(config, launched=launched_here(ranks, config), progress_bars=False)
    deaths = lie_in_wait(death)
    trainer.run()
    trainer.close()
    if counts is not None and ranks.first:
        counts.write_text(json.dumps(deaths.met))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def train_in_processes(
    shards: Path,
    run_dir: Path,
    settings: Mapping[str, Any],
    *,
    size: int = 1,
    death: Death = NEVER,
    dying: int = 0,
    counts: Path | None = None,
) -> list[int]:
    """Train on `size` ranks, of which number `dying` dies; the exit statuses by rank.

    Raises:
        AssertionError: One was still running when time was up.
    """
    store = run_dir.parent / f"store-{time.monotonic_ns()}"
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(
            target=_train,
            args=(rank, size, str(store), (shards, run_dir, settings), death if rank == dying else NEVER, counts),
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        if death.place == CLOCK:
            processes[dying].join(death.when)
            processes[dying].kill()
        limit = time.monotonic() + TIME_LIMIT_S
        for process in processes:
            process.join(max(0.0, limit - time.monotonic()))
        running = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        assert not running, f"ranks {running} were still running {TIME_LIMIT_S:g} s after a death at {death}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def draw_death(draws: random.Random, met: Mapping[str, int], seconds: float) -> Death:
    """A moment of a run that came to each place so often, and took so long."""
    place = draws.choice([*sorted(met), CLOCK])
    return Death(place, draws.uniform(0, seconds) if place == CLOCK else draws.randint(1, met[place]))
