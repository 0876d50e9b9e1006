"""What the SLURM scripts start, with stand-ins for `srun` and Python: no SLURM needed (with one: tests/slurm)."""

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# Leaves srun's own options out and runs the task of the second node.
SRUN = '#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do shift; done\nSLURM_NODEID=1 exec "$@"\n'
# Configurations are really read; what would be launched is listed.
PYTHON = '#!/usr/bin/env bash\n[[ "$1" == -c ]] && exec {python} "$@"\nprintf "%s\\n" "$@" "threads $OMP_NUM_THREADS"\n'
HOSTS = '#!/usr/bin/env bash\n[[ "$*" == "show hostnames n[7-8]" ]] && printf "n7\\nn8\\n"\n'
JOB = {"SLURM_JOB_ID": "40003", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_CPUS_ON_NODE": "6"}
CLEARED = ("SLURM_", "SRUN_", "GCAHNG_", "MASTER_", "OMP_", "ACCELERATE_")


@dataclass(frozen=True)
class Job:
    """A folder with stand-ins, and a configuration."""

    folder: Path

    @property
    def config(self) -> str:
        return str(self.folder / "tiny.yaml")

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def submit(self, script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        mine = {key: value for key, value in os.environ.items() if not key.startswith(CLEARED)}
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "GCAHNG_PYTHON": str(self.folder / "python"),
            "GCAHNG_HOME": str(ROOT),
        }
        return subprocess.run(
            ["bash", str(ROOT / "slurm" / script), *arguments],
            cwd=self.folder,
            env=mine | environment | JOB | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def launched(self, *arguments: str, **variables: str) -> list[str]:
        """The words of the launcher's command on the second node."""
        done = self.submit("train.sh", self.config, *arguments, **variables)
        assert done.returncode == 0, done.stderr
        first, *words = done.stdout.splitlines()
        assert first.startswith("job 40003: ")
        return words


@pytest.fixture
def job(tmp_path: Path) -> Job:
    for name, text in (("srun", SRUN), ("python", PYTHON.format(python=sys.executable)), ("scontrol", HOSTS)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    found = Job(tmp_path)
    settings = {"data": {"dir": "data"}, "run": {"dir": str(found.run_dir)}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return found


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_one_launcher_for_each_node(job: Job) -> None:
    words = job.launched(SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="3")
    want = {"num_machines": "2", "num_processes": "6", "machine_rank": "1", "main_process_ip": "n7"}
    assert {name: after(words, f"--{name}") for name in want} == want
    assert after(words, "--main_process_port") == "10003"
    assert "--multi_gpu" in words
    assert words[words.index("launch/train.py") :] == [
        "launch/train.py", "--config", job.config, "--quiet", "threads 2"
    ]  # fmt: skip
    assert (job.run_dir / "slurm").is_dir()


def test_settings_come_as_they_are(job: Job) -> None:
    words = job.launched("loss.args={scale: 3}", "seed=4", GCAHNG_DEEPSPEED="launch/deepspeed/zero1.json")
    assert words[-4:] == ["--quiet", "loss.args={scale: 3}", "seed=4", "threads 6"]
    assert after(words, "--deepspeed_config_file") == "launch/deepspeed/zero1.json" and "--multi_gpu" not in words


def test_each_task_of_an_array_is_a_seed(job: Job) -> None:
    words = job.launched("seed=1", SLURM_ARRAY_TASK_ID="5")
    assert words[-4:-1] == ["seed=1", "seed=5", f"run.dir={job.run_dir}/seed-5"]
    assert (job.run_dir / "seed-5" / "slurm").is_dir()


def test_a_requeued_job_goes_on_where_there_is_a_checkpoint(job: Job) -> None:
    settings = ("train.resume=elsewhere/last",)
    assert job.launched(*settings, SLURM_RESTART_COUNT="1")[-2] == settings[0]
    (job.run_dir / "step-4").mkdir()
    (job.run_dir / "step-4" / "manifest.json").touch()
    assert job.launched(*settings)[-2] == settings[0]
    assert job.launched(*settings, SLURM_RESTART_COUNT="1")[-3:-1] == [settings[0], "train.resume=auto"]


def test_an_evaluation_takes_the_processes_of_training(job: Job) -> None:
    """And no DeepSpeed, whatever the shell that submits has kept."""
    variables = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "3", "GCAHNG_DEEPSPEED": "zero1.json"}
    done = job.submit("eval.sh", "--run", "runs/a b", "eval.ks=[1, 2]", **variables)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    want = {"num_machines": "2", "num_processes": "6", "machine_rank": "1", "main_process_ip": "n7"}
    assert {name: after(words, f"--{name}") for name in want} == want
    assert "--multi_gpu" in words and "--use_deepspeed" not in words
    assert words[words.index("launch/evaluate.py") :] == [
        "launch/evaluate.py", "--quiet", "--run", "runs/a b", "eval.ks=[1, 2]", "threads 2"
    ]  # fmt: skip


def test_each_task_of_a_tables_array_takes_its_line(job: Job) -> None:
    """Words with blanks and other letters stay whole; a run that another process holds is left to it."""
    run_dir = str(job.folder / "é 1")
    lines = [["other", "--quiet"], [run_dir, "--config", job.config, "loss.args={scale: 3}", f'run.dir="{run_dir}"']]
    runs = job.folder / "list.jsonl"
    runs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # The stand-in for Python lists what would be launched, but reads the list for real.
    done = job.submit("tables.sh", str(runs), SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stderr
    first, *words = done.stdout.splitlines()
    assert first.endswith(f"run {run_dir}, logs in {run_dir}/slurm")
    assert words[words.index("launch/train.py") :] == ["launch/train.py", *lines[1][1:], "threads 6"]
    with open(f"{run_dir}.log", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = job.submit("tables.sh", str(runs), SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0 and done.stdout == f"{run_dir} is being trained by another process; nothing to do\n"
    for task, words_of_error in (("2", "has no run number 2."), ("", "expected a list of runs and a task of an array")):
        done = job.submit("tables.sh", str(runs), SLURM_ARRAY_TASK_ID=task)
        assert done.returncode == 2 and words_of_error in done.stderr


@pytest.mark.parametrize("script", ["train.sh", "eval.sh", "convert.sh", "tables.sh"])
def test_a_job_from_another_folder_says_so(job: Job, script: str) -> None:
    done = job.submit(script, "x", GCAHNG_HOME=str(job.folder))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {job.folder} is not the project's folder (no slurm/common.sh). Submit from")


def test_a_wrong_setting_ends_the_job_before_anything_is_started(job: Job) -> None:
    done = job.submit("train.sh", job.config, "sede=1")
    assert done.returncode == 2 and done.stdout == "" and "did you mean `seed`?" in done.stderr
    assert not job.run_dir.exists()
