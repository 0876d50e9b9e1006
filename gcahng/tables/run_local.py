"""The missing runs of a table, one after the other on this machine."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gcahng.errors import ConfigError
from gcahng.tables.collect import Collected
from gcahng.tables.found_runs import FoundRun, NoResult, log_file, read_evaluation
from gcahng.tables.plan import PlannedRun
from gcahng.training.checkpoint import CONFIG
from gcahng.training.config import load_config
from gcahng.training.interruption import INTERRUPTED_STATUS, MARKER

TAIL_LINES = 15


@dataclass(frozen=True)
class MissingRun:
    """A run that a table lacks.

    Attributes:
        titles: The cells that wait for it; several where tables or rows name one experiment.
        run: What to run.
    """

    titles: tuple[str, ...]
    run: PlannedRun


def missing_runs(tables: Sequence[Collected]) -> list[MissingRun]:
    """The runs that no finished one stands for, each once, in the tables' order, first seeds first."""
    waiting: dict[Path, tuple[list[str], PlannedRun]] = {}
    for collected in tables:
        for found in collected.cells:
            for run in found.cell.planned:
                if run.seed in found.missing:
                    titles, _ = waiting.setdefault(run.folder, ([], run))
                    titles.append(found.cell.title)
    runs = [MissingRun(tuple(dict.fromkeys(titles)), run) for titles, run in waiting.values()]
    # A seed of every row before the next seed: what is there early can be compared.
    planned = [run.seed for collected in tables for found in collected.cells for run in found.cell.planned]
    order = list(dict.fromkeys(planned))
    return sorted(runs, key=lambda missing: order.index(missing.run.seed))


def run_missing(runs: Sequence[MissingRun], command: Sequence[str], say: Callable[[str], None]) -> list[MissingRun]:
    """Run them; one that fails does not keep the others from running.

    Args:
        runs: See `missing_runs`.
        command: The launcher and the training script.
        say: Prints a line.
    Returns:
        Those that failed or were interrupted.
    Raises:
        ConfigError: The launcher cannot be started, or a log not be written.
    """
    failed = []
    for number, missing in enumerate(runs, 1):
        folder = missing.run.folder
        say(f"[{number}/{len(runs)}] {', '.join(missing.titles)}, seed {missing.run.seed} -> {folder}")
        started, left = time.monotonic(), _marker(folder)
        status = _run(missing.run, command)
        if status is None:
            say("  another process runs it: left to that one")
        elif status == 0:
            say(f"  done in {time.monotonic() - started:.0f} s: {_outcome(folder)}")
        elif status == INTERRUPTED_STATUS or _marker(folder) not in (None, left):  # launchers make 1 of it
            failed.append(missing)
            say("  INTERRUPTED by a signal: the next start goes on with it")
        else:
            failed.append(missing)
            log = log_file(folder)
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
            say("\n".join([f"  FAILED with status {status}; the end of {log}:", *(f"    {line}" for line in lines)]))
    return failed


def _run(run: PlannedRun, command: Sequence[str]) -> int | None:
    """Exit status; None where another process holds the run."""
    # The log is the lock: the training process inherits it, and holds it even where this process is killed.
    with _opened(log_file(run.folder)) as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        try:
            return subprocess.run(
                [*command, *run.arguments], stdout=log, stderr=log, env=_environment(command), check=False
            ).returncode
        except OSError as error:
            raise ConfigError(
                f"--launcher cannot be started: `{command[0]}`, {error.strerror}. Name a command, for example "
                '"accelerate launch --num_processes 2".'
            ) from error


def _opened(log: Path) -> BinaryIO:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return open(log, "ab")
    except OSError as error:
        raise ConfigError(
            f"The log of a run goes to {log}, which cannot be written ({error.strerror}): expected a file, or nothing "
            "there. Move away what stands there, or choose another --out."
        ) from error


def _marker(folder: Path) -> int | None:
    """When (ns) a signal ended the run of a folder last; None if it has gone on since, or was never interrupted."""
    try:
        return (folder / MARKER).stat().st_mtime_ns
    except OSError:
        return None


def _environment(command: Sequence[str]) -> dict[str, str]:
    if command[0] != sys.executable:  # a launcher shares the cores out among its processes
        return dict(os.environ)
    # Threads of one process wait for each other: a core shared with anything else slows them all many times over, so
    # half of the cores are left to the loader and to whatever else runs. A setting of the user's wins.
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))} | os.environ


def _outcome(folder: Path) -> str:
    """The last evaluation of a run that has just ended, in a line."""
    try:
        _, columns = read_evaluation(FoundRun(folder, load_config(folder / CONFIG)), "last")
    except (ConfigError, NoResult) as error:
        return str(error)
    return "  ".join(f"{name} {value:.2f}" for name, value in columns.items() if name in ("R@1", "RP", "MAP@R"))
