"""Jobs of the project's scripts on a cluster, and what they leave."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster

ROOT = Path(__file__).parents[2]
JOB_LIMIT_S = 150.0
# Everything that a newcomer's command says, and as much less as makes it a test.
SHORTER = ("train.epochs=2", "train.log_every=1", "train.max_steps_per_epoch=8", "data.num_workers=0")
# AdamW's first moves are signs of gradients times the rate: where a gradient is nothing but rounding, two float32 runs
# part at once by that much. At the demonstration's 3e-3 the fifth losses of one and two processes differ by 3e-2.
SLOWER = tuple(f"optim.{part}.lr=3.0e-5" for part in ("metric_model", "graph", "classifier"))
CLASSES = 140
SITE_VARIABLES = {
    "GCAHNG_PYTHON": sys.executable,
    "GCAHNG_HOME": str(ROOT),
    "MASTER_ADDR": "127.0.0.1",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Site:
    """A cluster, a folder for its jobs, and the shards that a job on it has made."""

    cluster: Cluster
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def run(self, *arguments: str, **variables: str) -> str:
        """Submit a job, wait for its end, and return what it printed."""
        return self.completed(*self.submit(*arguments, **variables))

    def submit(self, *arguments: str, **variables: str) -> tuple[str, Path]:
        """A job's number (JOB_TASK of a task of an array), and the file that it prints to."""
        out = self.folder / f"job-{len(list(self.folder.glob('job-*')))}.out"
        out.touch()
        job = self.cluster.submit([f"--output={out}", *arguments], SITE_VARIABLES | variables, cwd=ROOT)
        task = next((word.removeprefix("--array=") for word in arguments if word.startswith("--array=")), None)
        return (str(job) if task is None else f"{job}_{task}"), out

    def completed(self, job: str, out: Path, limit: float = JOB_LIMIT_S) -> str:
        """What a job printed that must end, and well."""
        state = self.cluster.wait(job, limit)
        assert state == "COMPLETED", f"job {job} {state}\n{self.said(job, out)}"
        return out.read_text()

    def said(self, job: str, out: Path) -> str:
        """Everything that is known of a job."""
        files = sorted(self.folder.glob(f"**/slurm/{job.partition('_')[0]}*-*.log"))
        return "\n".join([out.read_text(), *(file.read_text() for file in files), self.cluster.logs()])


def settings_of_run(site: Site, run_dir: Path) -> list[str]:
    """Settings of a short run of the demonstration."""
    return [f"data.dir={site.data}", f"run.dir={run_dir}", *SHORTER, *SLOWER]


def rows_by_kind(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run's metrics."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kinds = {row["kind"] for row in rows}
    return {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
