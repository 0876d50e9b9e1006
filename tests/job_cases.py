"""Real jobs whose processes are killed or stopped, and what is left of them in /proc."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from run_cases import base_settings, with_overrides

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "train.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate" / "cpu_n.yaml"))
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_", "PET_")
MARK = "GCAHNG_TEST_JOB"
START_S = 300.0
SOON_S = 20.0


@dataclass(frozen=True)
class Ended:
    """How a job ended; `seconds` from the fault on."""

    status: int
    out: str
    err: str
    seconds: float

    def said(self, *starts: str) -> list[str]:
        """Lines of stderr that begin so."""
        return [line for line in self.err.splitlines() if line.startswith(starts)]


class Job:
    """A job in a session of its own, every process of which carries a mark in its environment."""

    def __init__(self, *command: object, run_dir: Path, folder: Path, prefix: Sequence[str] = (), **env: str) -> None:
        self.run_dir = run_dir
        self.mark = uuid.uuid4().hex
        self._out, self._err = folder / "stdout", folder / "stderr"
        mine = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, *map(str, command)],
                cwd=ROOT,
                env=mine | {"OMP_NUM_THREADS": "1", MARK: self.mark} | env,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self._fault_at = time.monotonic()

    @property
    def pid(self) -> int:
        return self._process.pid

    def await_steps(self, steps: int) -> None:
        """Return when the run has logged so many steps."""
        self.wait_for(lambda: (self.run_dir / "metrics.jsonl").is_file() and num_steps(self.run_dir) >= steps)

    def wait_for(self, condition: Callable[[], bool], seconds: float = START_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, self._err.read_text()
            assert time.monotonic() < deadline, self._err.read_text()
            time.sleep(0.05)

    def rank(self, rank: int) -> int:
        """The process of a rank: the first one whose environment says so."""
        return min(pid for pid in processes_of(self.mark) if environment_of(pid).get("RANK") == str(rank))

    def workers(self, rank: int) -> list[int]:
        """The loader workers of a rank."""
        return children(self.rank(rank))

    def fault(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process; time counts from here."""
        os.kill(pid, number)
        self._fault_at = time.monotonic()

    def finish(self, seconds: float) -> Ended:
        """Wait for the launcher to end."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {seconds} s:\n{self._err.read_text()}") from None
        seconds = time.monotonic() - self._fault_at
        # torch's handler of SIGBUS writes a zero behind its line.
        return Ended(status, self._out.read_text(), self._err.read_text().replace("\0", ""), seconds)

    def left(self, seconds: float = SOON_S) -> dict[int, str]:
        """Processes that are there after so many seconds, and what they are."""
        deadline = time.monotonic() + seconds
        while (found := processes_of(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return {pid: command_of(pid) for pid in found}

    def end(self) -> None:
        for pid in processes_of(self.mark):
            with_signal(pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def job(
    *command: object,
    shards: Path,
    folder: Path,
    overrides: Mapping[str, object],
    env: Mapping[str, str],
    prefix: Sequence[str] = (),
) -> Iterator[Job]:
    """The smallest run, endless, under a launcher."""
    settings = with_overrides(
        base_settings(shards, folder / "run"),
        {"train.epochs": 9999, "eval.every_epochs": 9999, "data.num_workers": 1, **overrides},
    )
    config = folder / "fault.yaml"
    config.write_text(yaml.safe_dump(settings))
    started = Job(
        *command, SCRIPT, "--config", config, "--quiet", run_dir=folder / "run", folder=folder, prefix=prefix, **env
    )
    try:
        yield started
    finally:
        started.end()


def num_steps(run_dir: Path) -> int:
    return (run_dir / "metrics.jsonl").read_text().count('"kind": "step"')


def processes_of(mark: str) -> list[int]:
    """Living processes whose environment holds the mark; those that only wait to be reaped are none."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and environment_of(int(entry)).get(MARK) == mark and state_of(int(entry)) not in "ZX":
            found.append(int(entry))
    return sorted(found)


def environment_of(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.partition("=")[::2] for entry in text.split("\0") if entry)


def state_of(pid: int) -> str:
    """R, S, T, Z and so on; X where there is no such process any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "gone"


def children(parent: int) -> list[int]:
    """Living children of a process."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split() if entry.isdigit() else []
        except OSError:
            continue
        if fields and int(fields[1]) == parent and fields[0] not in "ZX":
            found.append(int(entry))
    return sorted(found)


def with_signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
