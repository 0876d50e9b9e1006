"""What the SLURM scripts start, with stand-ins for `srun` and Python: no SLURM needed (with one: tests/slurm)."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# Leaves srun's own options out and runs the task of the second node.
SRUN = '#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do shift; done\nSLURM_NODEID=1 exec "$@"\n'
# Configurations are really read; what would be launched is listed. It leaves what LEAVES says as its marker, and ends
# as ENDS says, if there is WAITS not before that file is there.
PYTHON = """#!/usr/bin/env bash
[[ "$1" == -c ]] && exec {python} "$@"
printf "%s\\n" "$@" "threads $OMP_NUM_THREADS"
[[ -n "${{LEAVES:-}}" ]] && echo "$LEAVES" >"${{RUN:-{run}}}/PREEMPTED"
while [[ -n "${{WAITS:-}}" && ! -e "$WAITS" ]]; do sleep 0.05; done
exit "${{ENDS:-0}}"
"""
# A job is requeued where the file `refused` is not there; what SLURM says of it is in the file `state`.
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames n[7-8]" ]] && printf "n7\\nn8\\n" && exit
[[ "$1 $2" == "show job" ]] && cat {folder}/state && exit
echo "$*" >>{folder}/asked
[[ ! -e {folder}/refused ]]
"""
SCANCEL = '#!/usr/bin/env bash\necho "scancel $*" >>{folder}/asked\n'
JOB = {"SLURM_JOB_ID": "40003", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_CPUS_ON_NODE": "6"}
CLEARED = ("SLURM_", "SRUN_", "GCAHNG_", "MASTER_", "OMP_", "ACCELERATE_", "PET_")


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
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, script: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        mine = {key: value for key, value in os.environ.items() if not key.startswith(CLEARED)}
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "GCAHNG_PYTHON": str(self.folder / "python"),
            "GCAHNG_HOME": str(ROOT),
        }
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm" / script), *arguments],
            cwd=self.folder,
            env=mine | environment | JOB | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def asked(self) -> list[str]:
        """What SLURM was asked for since the last time."""
        file = self.folder / "asked"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def launched(self, *arguments: str, **variables: str) -> list[str]:
        """The words of the launcher's command on the second node."""
        done = self.submit("train.sh", self.config, *arguments, **variables)
        assert done.returncode == 0, done.stderr
        first, *words = done.stdout.splitlines()
        assert first.startswith("job 40003: ")
        return words


@pytest.fixture
def job(tmp_path: Path) -> Job:
    texts = {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL, "scancel": SCANCEL}
    for name, text in texts.items():
        filled = text if name == "srun" else text.format(python=sys.executable, run=tmp_path / "run", folder=tmp_path)
        (tmp_path / name).write_text(filled)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "state").write_text("JobState=RUNNING Reason=None\n")
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


def left(step: int, job: str = JOB["SLURM_JOB_ID"], restarts: int = 0) -> str:
    """A marker, as `gcahng.training.interruption` leaves it."""
    return json.dumps({"step": step, "slurm_job": job, "slurm_restarts": restarts})


def test_an_interrupted_job_is_requeued_as_long_as_it_gets_on(job: Job) -> None:
    """Whatever srun's status; the steps of its interruptions are kept, of this job alone."""
    said, steps = [], (0, 7, 0, 7, 0, 9, 9, 9)
    for restarts, step in enumerate(steps):
        more = {"SLURM_RESTART_COUNT": str(restarts), "LEAVES": left(step, restarts=restarts), "ENDS": "1"}
        done = job.submit("train.sh", job.config, **more)
        said.append((done.returncode, done.stdout.splitlines()[-1], done.stderr, job.asked()))
    for step, (status, last, err, asked) in list(zip(steps, said, strict=True))[:-1]:
        assert (status, last, err) == (0, f"job 40003: interrupted at step {step}, requeued", "")
        assert asked == ["requeue 40003"]
    status, _, err, asked = said[-1]
    assert (status, asked) == (1, []) and "interrupted at step 9 for the third time in a row and is not requeued" in err
    assert (job.run_dir / "slurm" / "40003.requeued").read_text().split() == [*"0707099"]


@pytest.mark.parametrize("leaves", [None, left(5, job="40002"), left(5, restarts=1), "{not JSON", "[5]", '{"step": 5}'])
def test_otherwise_a_job_ends_as_srun_did(job: Job, leaves: str | None) -> None:
    """Without a marker, or with one that another job or an earlier start has left, or that is no marker."""
    job.run_dir.mkdir()
    if leaves is not None:
        (job.run_dir / "PREEMPTED").write_text(leaves)
    for ends in ("0", "3"):
        done = job.submit("train.sh", job.config, ENDS=ends)
        assert (done.returncode, job.asked()) == (int(ends), []), done.stderr
        assert "requeued" not in done.stdout


@pytest.mark.parametrize("why", ["None", "TimeLimit"])
def test_a_job_that_was_cancelled_is_left_so(job: Job, why: str) -> None:
    """Its processes are signalled too, and save. One that ran out of time goes on."""
    (job.folder / "state").write_text(f"   JobState=COMPLETING Reason={why} Dependency=(null)\n")
    done = job.submit("train.sh", job.config, LEAVES=left(5), ENDS="1")
    if why == "TimeLimit":
        assert (done.returncode, job.asked()) == (0, ["requeue 40003"]), done.stderr
    else:
        assert (done.returncode, job.asked()) == (1, []) and "it was cancelled or requeued" in done.stdout


def test_a_task_of_an_array_is_requeued_by_its_own_name(job: Job) -> None:
    """The number of an array's last task is that of the array."""
    task = {"SLURM_ARRAY_JOB_ID": "40003", "SLURM_ARRAY_TASK_ID": "4", "RUN": f"{job.run_dir}/seed-4"}
    done = job.submit("train.sh", job.config, LEAVES=left(2), ENDS="75", **task)
    assert done.returncode == 0 and job.asked() == ["requeue 40003_4"], done.stderr


def test_a_launcher_that_was_ended_at_once_is_started_anew(job: Job) -> None:
    for status in ("138", "143"):
        done = job.submit("train.sh", job.config, ENDS=status)
        assert done.returncode == 0 and job.asked() == ["requeue 40003"], done.stderr
    done = job.submit("train.sh", job.config, ENDS="143")
    assert done.returncode == 143 and job.asked() == []


def test_a_requeue_that_is_refused_is_said(job: Job) -> None:
    (job.folder / "refused").touch()
    done = job.submit("train.sh", job.config, LEAVES=left(2))
    assert done.returncode == 75 and "could not be requeued. It is saved: submit it again with" in done.stderr


def test_a_run_of_a_table_is_requeued_too(job: Job) -> None:
    runs = job.folder / "list.jsonl"
    runs.write_text(json.dumps([str(job.run_dir), "--config", job.config]) + "\n")
    task = {"SLURM_ARRAY_JOB_ID": "40001", "SLURM_ARRAY_TASK_ID": "0"}
    done = job.submit("tables.sh", str(runs), LEAVES=left(2), ENDS="1", **task)
    assert done.returncode == 0 and job.asked() == ["requeue 40001_0"], done.stderr
    assert "job 40001_0: interrupted at step 2, requeued\n" in Path(f"{job.run_dir}.log").read_text()


def test_a_signal_for_the_script_goes_on_to_the_processes_once(job: Job) -> None:
    """And the script waits for them: their status is its own."""
    waits = job.folder / "go"
    process = job.start("train.sh", job.config, WAITS=str(waits), ENDS="3")
    assert process.stdout is not None
    seen = ""
    while "threads 6" not in seen:  # the launched process has started
        seen += process.stdout.readline()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        deadline = time.monotonic() + 30
        while not (job.folder / "asked").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert process.poll() is None
    waits.touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert job.asked() == ["scancel --signal=USR1 40003"]
    assert out.count("passed on to the processes") == 1


def test_the_launcher_is_told_of_the_signals(job: Job) -> None:
    """What the job scripts export, a shell may source; what it has set itself stays."""
    listed = "source launch/signals.sh; echo $PET_SIGNALS_TO_HANDLE $PET_SHUTDOWN_TIMEOUT"
    mine = {key: value for key, value in os.environ.items() if not key.startswith("PET_")}
    for more, want in (({}, "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 240"), ({"PET_SHUTDOWN_TIMEOUT": "9"}, "SIGUSR1 9")):
        done = subprocess.run(["bash", "-c", listed], cwd=ROOT, env=mine | more, capture_output=True, text=True)
        assert done.stdout.strip().endswith(want)
    assert "\nsource launch/signals.sh\n" in (ROOT / "slurm" / "common.sh").read_text()
