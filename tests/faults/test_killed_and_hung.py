"""Ranks and loader workers of real jobs that are killed or stopped: all end in time, say whose fault it was, and leave
no process behind."""

import os
import re
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from job_cases import ACCELERATE, TORCHRUN, children, job, processes_of, state_of

from gcahng.data.images.transform_settings import transform_settings
from gcahng.data.loader import TrainLoader
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.shards.reader import ShardSet
from gcahng.data.workers import worker_fault
from gcahng.errors import DataError

TIMEOUT_S = 6
GRACE_S = 3
# Beside the time limits: interpreters, and a machine that does other work.
MARGIN_S = 90
NO_WORD = "no word from rank {}, which hangs or was killed"
LAUNCHERS = {"accelerate": (*ACCELERATE, "--num_processes", "2"), "torchrun": TORCHRUN}


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        ("accelerate", 1),
        pytest.param("accelerate", 0, marks=pytest.mark.full),
        pytest.param("torchrun", 0, marks=pytest.mark.full),
        pytest.param("torchrun", 1, marks=pytest.mark.full),
    ],
)
def test_killed_rank(shards: Path, tmp_path: Path, launcher: str, rank: int) -> None:
    with job(*LAUNCHERS[launcher], shards=shards, folder=tmp_path, overrides={}, env={}) as run:
        run.await_steps(2)
        assert run.workers(0) and run.workers(1)
        run.fault(run.rank(rank), signal.SIGKILL)
        ended = run.finish(MARGIN_S)
        assert ended.status == 1
        (line,) = ended.said("rank ")
        assert line.startswith(f"rank {1 - rank}: error: the connection to other ranks broke; {NO_WORD.format(rank)} (")
        assert run.left() == {}


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        ("torchrun", 1),
        pytest.param("torchrun", 0, marks=pytest.mark.full),
        pytest.param("accelerate", 1, marks=pytest.mark.full),
    ],
)
def test_hung_rank(shards: Path, tmp_path: Path, launcher: str, rank: int) -> None:
    """The launcher asks the stopped process to end, which it cannot hear, and kills it after PET_SHUTDOWN_TIMEOUT."""
    overrides: dict[str, object] = {"distributed.timeout_seconds": TIMEOUT_S}
    env = {"PET_SHUTDOWN_TIMEOUT": str(GRACE_S)}
    with job(*LAUNCHERS[launcher], shards=shards, folder=tmp_path, overrides=overrides, env=env) as run:
        run.await_steps(2)
        stopped = run.rank(rank)
        run.fault(stopped, signal.SIGSTOP)
        ended = run.finish(TIMEOUT_S + GRACE_S + MARGIN_S)
        assert ended.status == 1 and ended.seconds > TIMEOUT_S / 2
        (line,) = ended.said("rank ")
        text = "error: ranks waited for each other longer than `distributed.timeout_seconds`; "
        assert line.startswith(f"rank {1 - rank}: {text}{NO_WORD.format(rank)} (")
        assert state_of(stopped) == "X" and run.left() == {}


@pytest.mark.full
@pytest.mark.parametrize(("number", "how"), [(signal.SIGKILL, "Killed"), (signal.SIGBUS, "Bus error")])
def test_killed_worker_of_a_rank(shards: Path, tmp_path: Path, number: signal.Signals, how: str) -> None:
    with job(*TORCHRUN, shards=shards, folder=tmp_path, overrides={}, env={}) as run:
        run.await_steps(2)
        (worker,) = run.workers(1)
        run.fault(worker, number)
        ended = run.finish(MARGIN_S)
        cause, echo = sorted(ended.said("rank "), reverse=True)
        assert cause.startswith(
            f"rank 1: error: Loader worker process {worker} was killed ({how}), most likely for want"
        )
        assert echo.startswith(f"rank 0: ended, since rank 1 failed: error: Loader worker process {worker} ")
        assert ended.status == 1 and run.left() == {}


@pytest.mark.full
def test_workers_of_a_killed_process_end(shards: Path, tmp_path: Path) -> None:
    with job(shards=shards, folder=tmp_path, overrides={"data.num_workers": 2}, env={}) as run:
        run.await_steps(2)
        assert len(processes_of(run.mark)) == 3
        run.fault(run.pid, signal.SIGKILL)
        assert run.finish(MARGIN_S).status == -signal.SIGKILL
        assert run.left() == {}


# Not in the ordinary suite: a process forked from a worker of pytest has once not come to its end.
@pytest.mark.full
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            signal.SIGKILL,
            r"oader worker process (\d+ )?(was killed \((Killed|\w+Error)\)|ended), most likely for want of memory",
        ),
        (
            signal.SIGBUS,
            r"was killed \(Bus error\), .*: of /dev/shm \d+ MiB of \d+ are free|(was killed \(\w+Error\)|ended), most",
        ),
    ],
)
def test_killed_worker(shards: Path, number: signal.Signals, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: torch's error comes up wherever the main thread is, and pytest's would be hit too."""
    mine, other = get_context("fork").Pipe()
    process = get_context("fork").Process(target=_load, args=(shards, number, other))
    process.start()
    other.close()
    assert mine.poll(MARGIN_S), "no end in time"
    said, left = mine.recv()
    process.join(MARGIN_S)
    assert process.exitcode == 0 and left == []
    assert re.search(message, said), said
    capfd.readouterr()  # torch's worker says of SIGBUS what it can


def _load(shards: Path, number: signal.Signals, answer: Any) -> None:
    """Load batches until a worker has been killed; what is said of it, and the workers that are left."""
    opened = ShardSet.open(shards)
    table = ClassTable.from_shards(opened, "train", samples_per_class=2)
    transform = transform_settings("glyphs", image_size=16)
    loader = TrainLoader(opened, table, seed=1, num_classes=4, num_samples=2, transform=transform, num_workers=2)
    said: BaseException | None = None
    try:
        for epoch in range(1000):
            for _ in loader.epoch_iterator(epoch):
                if epoch == 1:
                    os.kill(children(os.getpid())[0], number)
    except (DataError, RuntimeError) as error:
        said = error if isinstance(error, DataError) else worker_fault(error)
        error.__traceback__ = None
    loader.close()
    deadline = time.monotonic() + MARGIN_S
    while (left := children(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.05)
    answer.send((f"{type(said).__name__}: {said}", left))
    answer.close()
    os._exit(0)


def test_other_errors_are_not_taken_for_a_worker() -> None:
    assert worker_fault(RuntimeError("shape mismatch")) is None
    assert worker_fault(ValueError("DataLoader worker (pid 1) is killed by signal: Killed.")) is None
    many = worker_fault(RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"))
    assert str(many).startswith("Loader worker process 12, 13 ended, most likely for want of memory")
