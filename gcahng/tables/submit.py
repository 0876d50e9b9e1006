"""The missing runs of a table as one SLURM array: a file with a line for each run, and `slurm/tables.sh`."""

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from gcahng.errors import InputError
from gcahng.tables.run_local import MissingRun

SCRIPT = Path("slurm/tables.sh")


def list_lines(runs: Sequence[MissingRun]) -> str:
    """The file that `slurm/tables.sh` reads: a JSON list [run folder, arguments of launch/train.py ...] per line."""
    return "".join(json.dumps([str(entry.run.folder), *entry.run.arguments]) + "\n" for entry in runs)


def sbatch_command(list_file: Path, count: int, options: Sequence[str], at_once: int | None) -> list[str]:
    """The command that submits a list of runs.

    Args:
        list_file: See `list_lines`.
        count: Its lines.
        options: Of sbatch.
        at_once: Jobs of the array that may run together; None: as many as the cluster lets.
    """
    limit = "" if at_once is None else f"%{at_once}"
    return ["sbatch", f"--array=0-{count - 1}{limit}", *options, str(SCRIPT), str(list_file)]


def submit(runs: Sequence[MissingRun], out: Path, options: Sequence[str], *, at_once: int | None, dry_run: bool) -> str:
    """Write the list and submit it from the project's folder, where relative paths of the runs are meant.

    Args:
        runs: At least one.
        out: The list is written to its folder `submitted`.
        options: Of sbatch.
        at_once: See `sbatch_command`.
        dry_run: Write and submit nothing.
    Returns:
        What to print: the command, and sbatch's answer.
    Raises:
        InputError: This is not the project's folder, there is no sbatch, or it refuses.
    """
    list_file = out / "submitted" / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    command = sbatch_command(list_file, len(runs), options, at_once)
    shown = shlex.join(command)
    if dry_run:
        lines = [f"{number}: {entry.run.folder}" for number, entry in enumerate(runs)]
        return "\n".join(["nothing is submitted (--dry-run); it would be", shown, *lines])
    if not SCRIPT.is_file():
        raise InputError(f"There is no {SCRIPT} here: expected the project's folder, got {Path.cwd()}. Submit from it.")
    if shutil.which(command[0]) is None:
        raise InputError(
            "There is no `sbatch` here: expected a machine of a SLURM cluster. Use `run`, or submit there."
        )
    list_file.parent.mkdir(parents=True, exist_ok=True)
    list_file.write_text(list_lines(runs), encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        list_file.unlink()
        raise InputError(f"`{shown}` was refused with status {done.returncode}: {done.stderr.strip()}")
    return f"{shown}\n{done.stdout.strip()}"
