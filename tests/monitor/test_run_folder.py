"""Where a run stands, from folders in every state: with a heartbeat, without, and damaged."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_cases import make_trainer, train

from gcahng.errors import ConfigError
from gcahng.monitor import run_folder
from gcahng.monitor.process_facts import this_process
from gcahng.monitor.run_folder import find_runs, read_status
from gcahng.monitor.status_text import block, duration, table
from gcahng.training import checkpoint, heartbeat, interruption, run_log, step_dump
from gcahng.training import trainer as trainer_module
from gcahng.training.observers import Observers, RunObserver


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(shards, folder, {"train.epochs": 2})
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def beat(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def change(run: Path, **facts: Any) -> None:
    (run / "status.json").write_text(json.dumps(beat(run) | facts))


def under_way(run: Path, process: dict[str, Any], **facts: Any) -> None:
    """Make it a run whose heartbeat says that it is in its seventh step."""
    (run / "results.json").unlink(missing_ok=True)
    where = {"state": "running", "activity": "training", "epoch": 1, "batch": 2, "step": 7, "step_time": time.time()}
    change(run, **process, **where, **facts)


def test_names_of_files_are_those_that_training_writes() -> None:
    assert run_folder.METRICS == run_log.METRICS_FILE and run_folder.MARKER == interruption.MARKER
    assert run_folder.RESULTS == trainer_module.RESULTS_FILE
    assert run_folder.FAULTS == step_dump.FOLDER == checkpoint.FAULTS
    names = ("CONFIG", "MANIFEST", "STATE", "DAMAGED", "REPLACED")
    assert [getattr(run_folder, name) for name in names] == [getattr(checkpoint, name) for name in names]


def test_a_finished_run(finished: Path) -> None:
    status = read_status(finished)
    assert (status.state, status.activity, status.epoch, status.epochs) == ("finished", None, 2, 2)
    assert (status.step, status.planned_steps, status.logged_step) == (10, 10, 10)
    assert status.checkpoint == "step-10" and status.warnings == [] and status.seconds_left is None
    assert status.step_seconds is not None and status.step_seconds > 0
    assert status.images_per_second == pytest.approx(8 / status.step_seconds)
    results = json.loads((finished / "results.json").read_text())
    assert status.last["test"] == results["last"]
    assert status.best["test"]["recall_at_1"] == results["best_test"]["recall_at_1"]
    assert len(status.losses) == 9 and (status.host, status.pid) == (os.uname().nodename, os.getpid())
    text = block(status)
    assert "state       finished" in text and "epoch 2/2, step 10/10 (100.0 %)" in text
    assert f"R@1 {100 * results['last']['recall_at_1']:.2f}" in text and "warning" not in text


def test_a_run_before_heartbeats(run: Path) -> None:
    want = read_status(run)
    (run / "status.json").unlink()
    found = read_status(run)
    same = ("state", "epoch", "epochs", "step", "planned_steps", "last", "losses", "logged_step", "checkpoint")
    assert [getattr(found, name) for name in same] == [getattr(want, name) for name in same]
    assert found.host is None
    (run / "results.json").unlink()
    assert read_status(run).state == "running"  # judged by its files, which are new
    an_hour_ago = time.time() - 3600
    for file in (run / "config.yaml", run / "metrics.jsonl", run / "step-10"):
        os.utime(file, (an_hour_ago, an_hour_ago))
    status = read_status(run)
    assert status.state == "stopped without a word" and 3590 < (status.sign_age or 0) < 4000
    (run / "PREEMPTED").write_text("{}")
    assert read_status(run).state == "interrupted"


def test_before_the_first_checkpoint_and_log(run: Path) -> None:
    for entry in run.iterdir():
        if entry.name not in ("config.yaml", "metrics.jsonl"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    (run / "metrics.jsonl").write_text("")
    status = read_status(run)
    assert (status.state, status.step, status.epochs, status.checkpoint) == ("running", 0, 2, None)
    assert "no step yet" in block(status) and "checkpoint  none" in block(status)


def test_what_the_process_says(run: Path) -> None:
    """Here: the process counts, whatever its heartbeat's age. Elsewhere: the age alone."""
    own = this_process()
    under_way(run, own, time=time.time() - 600, step_seconds=2.0, evaluation_seconds=5.0)
    status = read_status(run)
    assert (status.state, status.step, status.epoch) == ("running", 7, 1)
    assert status.seconds_left == 3 * 2.0 + 5.0  # three steps, one evaluation
    assert len(status.warnings) == 1 and "its process is there, but gave no sign for 60" in status.warnings[0]
    other_process = own | {"pid_started": own["pid_started"] + 1}  # the number was given out again
    under_way(run, other_process, time=time.time())
    status = read_status(run)
    assert status.state == "stopped without a word" and "killed, out of memory" in status.warnings[0]
    elsewhere = own | {"machine": "another boot"}
    under_way(run, elsewhere, time=time.time() - 30)
    assert read_status(run).state == "running"
    under_way(run, elsewhere, time=time.time() - 61)
    assert read_status(run).state == "stopped without a word"


def test_a_process_that_ended(run: Path) -> None:
    script = "import json; from gcahng.monitor.process_facts import this_process; print(json.dumps(this_process()))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        gone = json.loads(process.stdout.readline())
        process.stdout.read()
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT):
            pass
        under_way(run, gone, time=time.time())
        assert read_status(run).state == "stopped without a word"  # a zombie trains no more
    assert read_status(run).state == "stopped without a word"
    (run / "PREEMPTED").write_text("{}")  # killed between its save and its last heartbeat
    status = read_status(run)
    assert status.state == "interrupted" and status.warnings == [
        "PREEMPTED: asked to end and saved; go on with train.resume=auto"
    ]


def test_a_late_step(run: Path) -> None:
    own = this_process()
    under_way(run, own, time=time.time(), step_seconds=1.0)
    change(run, step_time=time.time() - 200)
    (warning,) = read_status(run).warnings
    assert re.fullmatch("no step for 2[0-9]{2} seconds", warning)
    change(run, activity="evaluating")
    assert read_status(run).warnings == []
    assert "running (evaluating)" in block(read_status(run))
    change(run, activity="training", step_seconds=60.0)  # slow, not late
    assert read_status(run).warnings == []


def test_what_went_wrong_is_said(run: Path) -> None:
    weights = run / "step-10" / "classifier.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (run / "step-8.damaged").mkdir()
    (run / "faults" / "step-3").mkdir(parents=True)
    (run / "faults" / "step-4.partial").mkdir()  # a dump that is being written
    change(run, state="failed", error="TrainingError: it diverged", failed_saves=2, save_error="disk full")
    status = read_status(run)
    assert status.checkpoint == "step-5" and status.failed_saves == 2
    assert status.warnings == [
        "checkpoint step-10 is damaged (classifier.safetensors of another size than written)",
        "step-8.damaged: was set aside as damaged",
        "faults/: 1 dumped step, see launch/replay.py",
        "the last save failed: disk full",
    ]
    assert "error       TrainingError: it diverged" in block(status)
    (run / "step-5" / "manifest.json").write_text("[]")
    assert read_status(run).checkpoint is None


@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "config.yaml", "results.json", "step-10/state.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b'{"step": "many", "epoch": [], "progress": 3}', b"\xff\x00"]
)
def test_damaged_files_are_no_crash(run: Path, name: str, content: bytes) -> None:
    (run / "results.json").unlink()
    (run / name).write_bytes(content)
    status = read_status(run)
    assert status.state in ("finished", "running", "stopped without a word", "unreadable")
    assert block(status) and table([status])


def test_a_cut_last_line_and_a_long_log(run: Path) -> None:
    (run / "status.json").unlink()
    (run / "results.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        for step in range(11, 6000):
            row = {"kind": "step", "step": step, "epoch": 2, "total_loss": step / 2, "step_seconds": 0.5}
            file.write(json.dumps(row | {"data_seconds": 0.25, "dropped_steps": 3}) + "\n")
        file.write('{"kind": "step", "step": 6000, "total_l')
    status = read_status(run)
    assert (status.step, status.losses, status.dropped) == (5999, {"total_loss": 2999.5}, 3)
    assert status.data_wait_share == 0.5


def test_folders_of_runs(run: Path, tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "seed-0"
    shutil.copytree(run, deep, symlinks=True)
    assert find_runs(tmp_path) == sorted([run, deep])  # neither checkpoints nor links of checkpoints
    lines = table([read_status(run) for run in find_runs(tmp_path)]).splitlines()
    assert lines[0].split()[:4] == ["run", "state", "epoch", "step"]
    assert [line.split()[:4] for line in lines[1:]] == [
        [str(f), "finished", "2/2", "10/10"] for f in sorted([run, deep])
    ]
    for wrong in (tmp_path / "none", run / "step-10" / "state.json"):
        with pytest.raises(ConfigError, match=f"`{wrong}` is no folder: expected a run folder"):
            find_runs(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"`{tmp_path}/empty` holds no run: expected config.yaml"):
        find_runs(tmp_path / "empty")
    with pytest.raises(ConfigError, match="holds no run"):
        find_runs(run / "step-10")


def test_durations() -> None:
    found = [duration(seconds) for seconds in (None, 0, 59.9, 61, 3600, 7384, 90061, -3)]
    assert found == ["?", "0 s", "59 s", "1 min 1 s", "1 h", "2 h 3 min", "1 d 1 h", "0 s"]


def test_a_terminal_obeys_no_name(run: Path) -> None:
    change(run, state="failed", error="bad\x1b[2J\nline")
    text = block(read_status(run))
    assert "bad?[2J?line" in text and "\x1b" not in text
    change(run, state="\x1b[2J")
    for text in (block(read_status(run)), table([read_status(run)])):
        assert "?[2J" in text and "\x1b" not in text


class Looks(RunObserver):
    """Reads the run's status from inside, at each event."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.seen = run_dir, []

    def look(self, event: str, activity: str | None) -> None:
        """Once the heartbeat's thread has written what it was told."""
        patience = time.monotonic() + 60
        while (status := read_status(self.run_dir)).activity != activity and time.monotonic() < patience:
            time.sleep(0.01)
        self.seen.append((event, status.state, status.activity, status.epoch))

    def begin(self, *_: Any) -> None:
        self.look("begin", "training")

    def evaluating(self, *_: Any) -> None:
        self.look("evaluating", "evaluating")

    def evaluated(self, *_: Any) -> None:
        self.look("evaluated", "training")

    def end(self, *_: Any) -> None:
        self.look("end", None)


def test_a_run_that_fails_is_followed(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the events alone: the next beat would come in an hour."""
    monkeypatch.setattr(heartbeat, "Heartbeat", partial(heartbeat.Heartbeat, beat_seconds=3600.0))
    trainer = make_trainer(shards, tmp_path / "run", {"train.epochs": 2})
    looks = Looks(tmp_path / "run")
    trainer.observers = Observers([trainer.observers, looks])

    def breaks(*_: Any) -> None:
        if trainer.progress.step == 5:
            raise RuntimeError("a bug in the second epoch")

    trainer.steps.run, run = (lambda *args: breaks() or run(*args)), trainer.steps.run
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.run()
    trainer.close()
    assert looks.seen == [
        ("begin", "running", "training", 0),
        ("evaluating", "running", "evaluating", 1),
        ("evaluated", "running", "training", 1),
        ("end", "failed", None, 1),
    ]
    status = read_status(tmp_path / "run")
    assert status.error == "RuntimeError: a bug in the second epoch"
    assert (status.step, status.checkpoint) == (5, "step-5")
