"""Kills conversions with SIGKILL at each of their file operations in turn; run as a script by `test_killed.py`.

A script of its own, because it forks: a child costs milliseconds once everything is imported. Prints JSON: how many
moments there were and what went wrong.
"""

import itertools
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from gcahng.data.conversion.convert import convert
from gcahng.data.conversion.journal import Journal
from gcahng.data.sources.folder import Folder

# What Python tells its audit hooks of: every file that is opened, renamed and so on.
EVENTS = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
SHARD_BYTES = 8_000
LAST_TARS = 45  # a moment when the last tars are written; before, it makes no difference what OUT holds


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def in_child(action: Callable[[], object], work: Path, kill_at: int | None = None) -> tuple[int, int]:
    """Run in a process that kills itself before the given file operation; (status, images that it opened)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        operations = itertools.count()

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            path = str(arguments[0]) if event == "open" else ""
            if event in EVENTS or path.startswith(str(work)):
                if next(operations) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if path.endswith(".jpg"):
                    os.write(writing, b"i")

        sys.addaudithook(hook)
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        opened = len(pipe.read())
    return os.waitpid(pid, 0)[1], opened


def is_published(out: Path) -> bool:
    """Whether `out` is new and whole, and only its working folder is left to be removed."""
    partial = out.with_name("out.partial")
    return out.exists() and bool(Journal(partial).manifest_sha256) and not (partial / "shards").exists()


class Sweep:
    """All moments of one conversion of `work/in`."""

    def __init__(self, work: Path, overwrite: bool) -> None:
        self.work = work
        self.overwrite = overwrite
        self.problems: list[str] = []
        self.moments = 0
        self.continued = 0
        self._convert(work / "reference" / "out")
        self.reference = contents(work / "reference" / "out")
        self.old: dict[str, bytes] = {}
        if overwrite:
            convert(Folder(work / "in"), work / "old", on_error="skip", seed=5)
            self.old = contents(work / "old")

    def _convert(self, out: Path) -> None:
        source = Folder(self.work / "in")
        convert(source, out, on_error="skip", shard_bytes=SHARD_BYTES, overwrite=self.overwrite)

    def run(self) -> None:
        """Kill at moment 0, 1, 2, ... until a conversion ends before its moment has come."""
        chance = random.Random(0)
        for moment in itertools.count(LAST_TARS if self.overwrite else 0):
            out = self.work / f"{self.overwrite}-{moment}" / "out"
            out.parent.mkdir()
            if self.overwrite:
                out.mkdir()
                for name, content in self.old.items():
                    (out / name).write_bytes(content)
            status, _ = in_child(lambda out=out: self._convert(out), self.work, moment)  # type: ignore[misc]
            if status == 0:
                self.moments = moment
                return
            self._expect(moment, "status of the killed run", signal.SIGKILL, status)
            self._check_out(moment, out)
            if is_published(out):
                self._kill_again_and_again(moment, out)
            elif moment % 4 == 0:
                in_child(lambda out=out: self._convert(out), self.work, chance.randrange(60))  # type: ignore[misc]
                self._check_out(moment, out)
            self._continue(moment, out)

    def _kill_again_and_again(self, moment: int, out: Path) -> None:
        """What is left to do is to tidy up: kill that at its moment 0, then at 1, and so on."""
        for again in range(30):
            if not is_published(out):
                return
            status, opened = in_child(lambda: self._convert(out), self.work, again)
            self._expect(moment, "status of a run that tidies up", signal.SIGKILL if status else 0, status)
            self._expect(moment, "images loaded to tidy up", 0, opened)
            self._check_out(moment, out)

    def _continue(self, moment: int, out: Path) -> None:
        if out.exists() and not self.overwrite and not (out.parent / "out.partial" / "journal.jsonl").exists():
            self._expect(moment, "what a finished conversion leaves", self.reference, contents(out))
            return
        tars = Journal(out.parent / "out.partial").tars
        images = len(list((self.work / "in").rglob("*.jpg")))
        expected = images - tars[-1].items + sum(len(tar.left_out) for tar in tars) if tars else images
        finished = is_published(out)
        status, opened = in_child(lambda: self._convert(out), self.work)
        self._expect(moment, "status of the second run", 0, status)
        if tars and not finished:
            self.continued += 1
            self._expect(moment, "images that the second run loaded", expected, opened)
        self._expect(moment, "the files", self.reference, contents(out) if out.exists() else {})
        self._expect(moment, "what lies beside OUT", ["out"], [path.name for path in out.parent.iterdir()])

    def _check_out(self, moment: int, out: Path) -> None:
        if out.exists() and contents(out) not in (self.reference, self.old):
            self.problems.append(f"moment {moment}: OUT is neither missing nor whole")

    def _expect(self, moment: int, what: str, expected: object, got: object) -> None:
        if expected != got:
            shown = [sorted(v) if isinstance(v, dict) else v for v in (expected, got)]
            self.problems.append(f"moment {moment}: {what}: expected {shown[0]}, got {shown[1]}")


if __name__ == "__main__":
    sweep = Sweep(Path(sys.argv[1]), sys.argv[2] == "overwrite")
    sweep.run()
    print(json.dumps({"moments": sweep.moments, "continued": sweep.continued, "problems": sweep.problems}))
