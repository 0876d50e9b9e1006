"""Jobs that are interrupted: saved, requeued by the job script, and completed as if nothing had happened."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import ClusterError, why_not
from job_site import ROOT, Site, settings_of_run
from run_cases import assert_same_tensors, read_metrics, saved_tensors

# Until a job that waits to start again has done so, and has ended.
LIMIT_S = 300.0
# Waits in each step, so that signals find it under way, until a file is there. The numbers are those of its base.
SLOW = """
import time
from pathlib import Path
from gcahng.losses import NPairPlusLoss

class Slow(NPairPlusLoss):
    def __init__(self, go, seconds):
        super().__init__()
        self.go, self.seconds = go, seconds

    def forward(self, *arguments, **options):
        if not Path(self.go).exists():
            time.sleep(self.seconds)
        return super().forward(*arguments, **options)
"""

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.filterwarnings("default"),
]


def slow_settings(site: Site, run_dir: Path, go: Path, seconds: float) -> list[str]:
    (site.folder / "slow_loss.py").write_text(SLOW)
    slow = ["loss.metric=slow_loss:Slow", f"loss.args={{go: {go}, seconds: {seconds}}}"]
    return [*settings_of_run(site, run_dir), "train.max_steps_per_epoch=40", *slow]


def until(site: Site, job: str, out: Path, what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} has not happened within {LIMIT_S:.0f} s\n{site.said(job, out)}")
        time.sleep(0.1)


def stepped(run_dir: Path, more_than: int = 0) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_text().splitlines()) > more_than


def marker(run_dir: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run_dir / "PREEMPTED").read_text())
    return found


def assert_same_run(got: Path, want: Path) -> None:
    """Bit for bit, but for the clocks."""
    assert read_metrics(got) == read_metrics(want)
    assert_same_tensors(saved_tensors(got), saved_tensors(want))
    assert not (got / "PREEMPTED").exists()


def test_a_job_that_hits_its_limit_is_saved_requeued_and_completes(site: Site) -> None:
    """DDP on two nodes: SLURM's own warning, the job script's own requeue."""
    run_dir, whole, go = site.folder / "limited", site.folder / "unlimited", site.folder / "go"
    variables = {"PYTHONPATH": str(site.folder)}
    limits = ("--nodes=2", "--time=60", "--signal=TERM@60")
    script = ("slurm/train.sh", "configs/demo.yaml")
    job, out = site.submit(*limits, *script, *slow_settings(site, run_dir, go, 3.0), **variables)
    until(site, job, out, "the first step", lambda: stepped(run_dir))
    # Its limit lies one to two minutes ahead from now on; how long a start takes depends on the machine.
    minutes = site.cluster.elapsed(job) // 60 + 2
    site.cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    until(site, job, out, "the interruption", (run_dir / "PREEMPTED").exists)
    found = marker(run_dir)
    site.cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    go.touch()
    printed = site.completed(job, out, LIMIT_S)
    assert found["reason"] == "The run was asked to end by SIGTERM."
    step = found["step"]
    assert 0 < step < 80 and found["checkpoint"] == f"step-{step}" and found["slurm_job"] == job
    assert f"job {job}: interrupted at step {step}, requeued\n" in printed
    assert printed.count(f"job {job}: 2 nodes x 1 processes") == 2
    site.run("--nodes=2", *script, *slow_settings(site, whole, go, 3.0), **variables)
    assert_same_run(run_dir, whole)


def test_a_job_that_is_cancelled_stays_so(site: Site) -> None:
    """Its processes are signalled too, and save; the script lets it end."""
    run_dir, go = site.folder / "cancelled", site.folder / "go-cancelled"
    settings = slow_settings(site, run_dir, go, 0.5)
    job, out = site.submit("slurm/train.sh", "configs/demo.yaml", *settings, PYTHONPATH=str(site.folder))
    until(site, job, out, "the first step", lambda: stepped(run_dir))
    site.cluster.ask("scancel", job)
    state = site.cluster.wait(job, LIMIT_S)
    assert state == "CANCELLED", site.said(job, out)
    assert (run_dir / str(marker(run_dir)["checkpoint"])).is_dir()


def test_a_task_of_an_array_comes_back_after_usr1_and_after_a_requeue(site: Site) -> None:
    """One process without launcher; the second time SLURM requeues it, and the marker is left for nobody."""
    run_dir, whole, go = site.folder / "seeded" / "seed-3", site.folder / "undisturbed", site.folder / "go-seeded"
    variables = {"PYTHONPATH": str(site.folder)}
    settings = slow_settings(site, run_dir.parent, go, 0.5)
    job, out = site.submit("--array=3", "slurm/train.sh", "configs/demo.yaml", *settings, **variables)
    until(site, job, out, "the first step", lambda: stepped(run_dir))
    site.cluster.ask("scancel", "--signal=USR1", job)
    until(site, job, out, "the interruption", (run_dir / "PREEMPTED").exists)
    first = marker(run_dir)
    until(site, job, out, "the second start", lambda: not (run_dir / "PREEMPTED").exists())
    until(site, job, out, "a further step", lambda: stepped(run_dir, int(str(first["step"]))))
    site.cluster.ask("scontrol", "requeue", job)
    until(site, job, out, "the second interruption", (run_dir / "PREEMPTED").exists)
    second = marker(run_dir)
    go.touch()
    printed = site.completed(job, out, LIMIT_S)
    assert first["reason"] == "The run was asked to end by SIGUSR1." and first["slurm_restarts"] == 0
    assert second["reason"] == "The run was asked to end by SIGTERM." and second["slurm_restarts"] == 1
    assert f"job {job}: interrupted at step {first['step']}, requeued\n" in printed
    assert printed.count("1 nodes x 1 processes") == 3
    subprocess.run(
        [
            sys.executable, "launch/train.py", "--config", "configs/demo.yaml", "--quiet",
            *slow_settings(site, whole, go, 0.5), "seed=3",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{site.folder}"},
        check=True, timeout=LIMIT_S, capture_output=True,
    )  # fmt: skip
    assert_same_run(run_dir, whole)
