"""A real SLURM of two nodes on this machine, for tests: controller, two node daemons, munge, all in one folder.

Needs Debian's `slurmctld slurmd slurm-client munge` and root; no systemd, no cgroups, no accounting. Both nodes are
this host, so jobs reach rank 0 at 127.0.0.1. Credentials expire early, since a requeued job waits for that.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo", "srun")
NODES = ("n1", "n2")
START_LIMIT_S = 30.0
POLL_S = 0.2

CONFIG = """
ClusterName=gcahng
SlurmUser=root
SlurmdUser=root
SlurmctldHost=localhost
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2
KillWait=10
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_ports} CPUs={cpus} RealMemory={memory}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


class ClusterError(AssertionError):
    """The cluster or a job on it did not do as it should; the message holds the logs."""


class CannotStart(ClusterError):
    """This machine does not let the daemons run."""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge"
        return f"no SLURM here ({', '.join(missing)} missing): apt-get install {packages}"
    if os.geteuid() != 0:
        return "the SLURM daemons of the test need root"
    return None


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: Configuration, logs, sockets.
        environment: For commands that talk to it.
    """

    folder: Path
    environment: dict[str, str]
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def submit(self, arguments: Sequence[str], variables: Mapping[str, str], *, cwd: Path) -> int:
        """`sbatch arguments`; the job's number."""
        command = ["sbatch", "--parsable", *arguments]
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | dict(variables), capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr}")
        return int(done.stdout.split(";")[0])

    def state(self, job: int | str) -> str:
        """A job's state, COMPLETED say; of one task of an array, JOB_TASK."""
        text = self.ask("scontrol", "show", "job", str(job))
        return next(word.removeprefix("JobState=") for word in text.split() if word.startswith("JobState="))

    def elapsed(self, job: int | str) -> int:
        """Seconds that a job has been running."""
        text = self.ask("scontrol", "show", "job", str(job))
        clock = next(word.removeprefix("RunTime=") for word in text.split() if word.startswith("RunTime="))
        hours, minutes, seconds = map(int, clock.split(":"))
        return hours * 3600 + minutes * 60 + seconds

    def wait(self, job: int | str, limit: float) -> str:
        """The state in which a job ended.

        Raises:
            ClusterError: It has not ended within `limit` seconds.
        """
        deadline = time.monotonic() + limit
        while (state := self.state(job)) in (
            "PENDING",
            "CONFIGURING",
            "RUNNING",
            "COMPLETING",
            "REQUEUED",
            "SIGNALING",
        ):
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job} is still {state} after {limit:.0f} s\n{self.logs()}")
            time.sleep(POLL_S)
        return state

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def ask(self, *command: str) -> str:
        """What a command prints.

        Raises:
            ClusterError: It failed.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{Path(command[0]).name}-{len(self._daemons)}.log", "wb") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in `folder`, which should have a short path (sockets), and stop it at the end.

    Raises:
        CannotStart: Its nodes are not up within half a minute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_files(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    cluster = Cluster(folder, environment | {"SLURM_CONF": str(folder / "slurm.conf")})
    try:
        cluster._start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        )
        _until(lambda: (folder / "munge.socket").exists(), cluster, "munged")
        cluster._start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            cluster._start("slurmd", "-D", "-f", str(folder / "slurm.conf"), "-N", node)
        _until(lambda: _idle_nodes(cluster) == len(NODES), cluster, "the nodes")
        yield cluster
    finally:
        cluster._stop()


def _idle_nodes(cluster: Cluster) -> int:
    try:
        return cluster.ask("sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")
    except (ClusterError, subprocess.TimeoutExpired):
        return 0  # the controller is not up yet


def _until(ready: Callable[[], bool], cluster: Cluster, what: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not ready():
        if time.monotonic() > deadline:
            raise CannotStart(f"{what} did not start within {START_LIMIT_S:.0f} s\n{cluster.logs()}")
        time.sleep(POLL_S)


def _write_files(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    folder.chmod(0o755)  # munge looks at who may write to the folders of its files
    (folder / "state").mkdir()
    controller, first, second = _free_ports(3)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    common = {"folder": folder, "controller_port": controller, "cpus": os.cpu_count(), "memory": memory // 4}
    text = CONFIG.format(nodes=NODES[0], node_ports=first, **common)
    # Two lines, since free ports need not follow each other.
    line = next(line for line in text.splitlines() if line.startswith("NodeName="))
    other = line.replace(f"NodeName={NODES[0]}", f"NodeName={NODES[1]}").replace(f"Port={first}", f"Port={second}")
    (folder / "slurm.conf").write_text(text.replace(line, f"{line}\n{other}"))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
