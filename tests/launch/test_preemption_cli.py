"""`launch/train.py` under its launchers, and signals: the run is saved, says so, and goes on as if undisturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from deepspeed_cases import NO_COMPILER, launched_as
from rank_group import run_ranks
from run_cases import assert_same_tensors, make_config, read_metrics, saved_tensors

from gcahng.distributed import Ranks
from gcahng.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"
TIME_LIMIT_S = 150.0
# Long enough to be interrupted; nothing depends on how many epochs there will be.
LONG = {"train.epochs": 300, "optim.graph.schedule.name": "constant", "eval.every_epochs": 1000}
KEPT_BY_SHELLS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "PET_", "SLURM_")
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 2",
    "zero-1": "accelerate.commands.launch --config_file launch/accelerate/zero1_bf16.yaml --num_processes 2",
}


@contextmanager
def started(command: str, *settings: object, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """A command of the shell from the project's folder; `exec` it, so that its process is the command's.

    One that still runs at the end is killed; what it started ends with it.
    """
    mine = {key: value for key, value in os.environ.items() if not key.startswith(KEPT_BY_SHELLS)}
    process = subprocess.Popen(
        ["bash", "-c", f'{command} "$@"', "bash", *map(str, settings)],
        cwd=ROOT,
        env=mine | {"OMP_NUM_THREADS": "1", "PY": sys.executable, "SCRIPT": str(SCRIPT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def until(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + TIME_LIMIT_S
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise AssertionError(f"it has not happened\n{process.communicate()}")
        time.sleep(0.02)


def under_way(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") > 2


def processes_of(run_dir: Path) -> list[int]:
    """Processes that have the run folder in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"run.dir={run_dir}".encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def marker(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "PREEMPTED").read_text())
    return found


def go_on(ranks: Ranks, kind: str, shards: Path, run_dir: Path, settings: Mapping[str, Any]) -> None:
    with launched_as(kind, ranks) as launched:
        for folder, resume in ((run_dir, "auto"), (run_dir.with_name("whole"), "never")):
            config = make_config(shards, folder, {**settings, "train.resume": resume})
            trainer = Trainer(config, launched=launched, progress_bars=False)
            trainer.run()
            trainer.close()


def interrupted_by_launcher(name: str, config_file: Path, run_dir: Path) -> dict[str, Any]:
    """Signal a launcher: SIGUSR1, of which one dies that was not told of it, and SIGTERM on its heels; the marker."""
    settings = [f"{key}={value}" for key, value in LONG.items()]
    command = f'source launch/signals.sh; exec "$PY" -m {LAUNCHERS[name]} "$SCRIPT" --quiet --config'
    run = (config_file, f"run.dir={run_dir}", "train.device=cpu", *settings)
    with started(command, *run, **NO_COMPILER) as launcher:
        until(lambda: under_way(run_dir), launcher)
        launcher.send_signal(signal.SIGUSR1)
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=TIME_LIMIT_S)
    assert launcher.returncode != 0 and processes_of(run_dir) == []
    found = marker(run_dir)
    assert found["checkpoint"] == f"step-{found['step']}" and (run_dir / found["checkpoint"]).is_dir()
    assert (run_dir / "last").resolve().name == found["checkpoint"]
    # One rank may have had the one signal first, another the other.
    signals = [f"The run was asked to end by {received}." for received in ("SIGUSR1", "SIGTERM")]
    assert found["reason"] in signals, err
    # DeepSpeed may have said something before.
    assert out.endswith(f"{found['reason']} It is saved: start it again with train.resume=auto.\n")
    assert out.count("It is saved") == 1
    return found


def test_a_signal_to_the_launcher_saves_on_all_ranks(config_file, tmp_path) -> None:
    interrupted_by_launcher("torchrun", config_file, tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_a_launcher_ended_goes_on_as_undisturbed(launch_shards, config_file, tmp_path, name: str) -> None:
    run_dir = tmp_path / "run"
    found = interrupted_by_launcher(name, config_file, run_dir)
    settled = LONG | {"train.epochs": found["step"] // 5 + 1}
    run_ranks(2, go_on, "ddp" if name == "torchrun" else name, launch_shards, run_dir, settled)
    whole = tmp_path / "whole"
    assert read_metrics(run_dir) == read_metrics(whole)
    assert_same_tensors(saved_tensors(run_dir), saved_tensors(whole))
    assert not (run_dir / "PREEMPTED").exists()


def test_a_process_whose_launcher_died_saves_and_ends(config_file, tmp_path) -> None:
    """That of `accelerate launch` with one process dies of SIGTERM, and passes nothing on."""
    run_dir = tmp_path / "run"
    command = 'exec "$PY" -m accelerate.commands.launch --num_processes 1 --cpu "$SCRIPT" --quiet --config'
    settings = [f"{key}={value}" for key, value in LONG.items()]
    with started(command, config_file, f"run.dir={run_dir}", *settings) as launcher:
        until(lambda: under_way(run_dir), launcher)
        (rank,) = (pid for pid in processes_of(run_dir) if pid != launcher.pid)
        launcher.terminate()
        # Its process writes to the same pipes, and closes them last.
        out, err = launcher.communicate(timeout=TIME_LIMIT_S)
    assert launcher.returncode == -signal.SIGTERM and rank not in processes_of(run_dir)
    found = marker(run_dir)
    assert (run_dir / f"step-{found['step']}").is_dir() and "asked to end by SIGTERM. It is saved:" in out, err


def test_a_signal_while_the_libraries_are_loaded_is_not_lost(config_file, tmp_path) -> None:
    """Long before the run is set up; it ends before it begins, and its folder holds the marker alone."""
    run_dir = tmp_path / "run"
    noted = 1 << (signal.SIGTERM - 1)

    def is_ready() -> bool:
        (line,) = (s for s in Path(f"/proc/{process.pid}/status").read_text().splitlines() if s.startswith("SigCgt"))
        return bool(int(line.split()[1], 16) & noted)

    command = 'exec "$PY" "$SCRIPT" --quiet --config'
    with started(command, config_file, f"run.dir={run_dir}", SLURM_JOB_ID="7") as process:
        until(is_ready, process)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            process.send_signal(number)
        out, err = process.communicate(timeout=TIME_LIMIT_S)
    assert "libtorch" not in maps
    assert process.returncode == 75, err
    assert out.startswith("The run was asked to end by SIG") and "Nothing has been trained yet: start it again" in out
    assert [path.name for path in run_dir.iterdir()] == ["PREEMPTED"]
    found = marker(run_dir)
    assert (found["step"], found["checkpoint"], found["slurm_job"], found["slurm_restarts"]) == (0, None, "7", 0)
