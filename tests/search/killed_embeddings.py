"""Kills launch/embed.py with SIGKILL at its file operations in turn; run as a script by `test_embed.py`.

A script of its own, because it forks: a child costs milliseconds once everything is imported. Prints JSON: how many
moments there were, how often images were left to the second run, and what went wrong.
"""

import io
import itertools
import json
import os
import signal
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import torch

from launch import embed

EVENTS = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def run(arguments: list[str], work: Path, kill_at: int | None = None) -> int:
    """The command line in a process that kills itself before the given file operation below `work`; its status."""
    pid = os.fork()
    if pid == 0:
        operations = itertools.count()

        def hook(event: str, values: tuple[object, ...]) -> None:
            is_ours = event in EVENTS or (event == "open" and str(values[1] or "r")[0] in "wa")
            if is_ours and str(values[0]).startswith(str(work)) and next(operations) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        sys.argv = ["launch/embed.py", *arguments]
        try:
            with redirect_stdout(io.StringIO()):
                os._exit(embed.main())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def sweep(work: Path, arguments: list[str], old: list[str], stride: int) -> dict[str, object]:
    """Kill at moment 0, stride, 2 * stride, ... until a run ends before its moment; continue each."""
    problems, continued = [], 0
    reference = work / "reference" / "out"
    reference.parent.mkdir()
    assert run([*arguments, "--out", str(reference)], work) == 0
    wanted = contents(reference)
    replaced: dict[str, bytes] = {}
    for moment in itertools.count(0, stride):
        out = work / f"{moment}" / "out"
        out.parent.mkdir()
        command = [*arguments, "--out", str(out)]
        if old:
            assert run([*old, "--out", str(out)], work) == 0
            replaced = contents(out)
            command.append("--overwrite")
        status = run(command, work, moment)
        if status == 0:
            break
        if status != signal.SIGKILL:
            problems.append(f"moment {moment}: status {status}")
        partial = out.with_name("out.partial")
        if contents(out) not in ({}, wanted, replaced):
            problems.append(f"moment {moment}: OUT is neither missing nor whole: {sorted(contents(out))}")
        parts = {path: path.stat().st_mtime_ns for path in (partial / "parts").glob("part-*") if path.suffix == ""}
        continued += bool(parts)
        # Killed again at its last moments: nothing is lost by that either.
        again = run(command, work, 6)
        if any(path.exists() and path.stat().st_mtime_ns != before for path, before in parts.items()):
            problems.append(f"moment {moment}: whole parts were embedded again")
        if again not in (0, signal.SIGKILL) or run(command, work) != 0:
            problems.append(f"moment {moment}: the second run failed")
        if contents(out) != wanted:
            problems.append(f"moment {moment}: other bytes: {sorted(contents(out))}")
        if [path.name for path in out.parent.iterdir()] != ["out"]:
            problems.append(f"moment {moment}: left over: {sorted(path.name for path in out.parent.iterdir())}")
    return {"moments": moment, "continued": continued, "problems": problems}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = []
    for number, case in enumerate(json.loads(sys.argv[2])):
        folder = Path(sys.argv[1]) / str(number)
        folder.mkdir()
        found.append(sweep(folder, **case))
    print(json.dumps(found))
