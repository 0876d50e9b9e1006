"""`launch/status.py` as its users start it: beside a run, after it, and on folders that hold none."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "status.py"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def state_of(run: Path) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, run, "--json"], capture_output=True, text=True, check=True, timeout=120
    )
    (found,) = json.loads(done.stdout)
    return f"{found['state']} {found['warnings']}" if found["state"] != "running" else f"running step {found['step']}"


def until(run: Path, wanted: str) -> None:
    deadline = time.monotonic() + 120
    while not (state := state_of(run)).startswith(wanted):
        assert time.monotonic() < deadline, state
        time.sleep(0.1)


def test_a_run_that_runs_and_is_killed(config_file, tmp_path) -> None:
    run = tmp_path / "run"
    endless = ("train.epochs=100000", "eval.every_epochs=100000", "train.save_every_steps=3", "--quiet")
    command = [sys.executable, ROOT / "launch" / "train.py", "--config", config_file, *endless]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        while not (run / "status.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        until(run, "running step")
        process.kill()
        process.wait()
        until(run, "stopped without a word ['it did not say that it ends")
    finally:
        process.kill()
        process.wait()


def test_text_lines_and_json(command_line, config_file, tmp_path) -> None:
    assert command_line("train.py", "--config", config_file, "--quiet", "train.max_steps_per_epoch=2").status == 0
    run = tmp_path / "run"
    shown = command_line("status.py", run)
    assert shown.status == 0 and shown.err == ""
    lines = shown.out.splitlines()
    assert lines[0] == str(run) and lines[1].startswith("  state       finished, last sign ")
    assert "epoch 1/1, step 2/2 (100.0 %)" in lines[2]
    for arguments in ((tmp_path,), (run, run)):
        several = command_line("status.py", *arguments)
        assert several.status == 0
        assert len(several.out.splitlines()) == (2 if arguments == (tmp_path,) else 9)
    (found,) = json.loads(command_line("status.py", run, "--json").out)
    assert (found["state"], found["step"], found["checkpoint"]) == ("finished", 2, "step-2")
    assert found["last"]["test"]["map_at_r"] == json.loads((run / "results.json").read_text())["last"]["map_at_r"]


def test_what_is_no_run_is_one_clear_error(command_line, tmp_path) -> None:
    ended = command_line("status.py", tmp_path)
    assert ended.status == 2 and ended.out == ""
    assert (
        ended.err.startswith(f"error: `{tmp_path}` holds no run: expected config.yaml")
        and "Give the run.dir" in ended.err
    )
    ended = command_line("status.py", tmp_path / "none")
    assert ended.status == 2 and "is no folder" in ended.err
    for wrong in ("0", "-1", "x", "inf"):
        ended = command_line("status.py", tmp_path, "--watch", wrong)
        assert ended.status == 2 and f"expected seconds above 0, got '{wrong}'" in ended.err


def test_it_needs_no_torch_and_can_be_watched(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("train: {epochs: 3}\n")
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 4, "epoch": 1, "total_loss": 2.0}\n')
    watching = (
        "import runpy, sys\n"
        f"sys.argv = ['status.py', {str(run)!r}, '--watch', '0.1']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    print('status', ended.code, {'torch', 'numpy'} & set(sys.modules) or 'light')\n"
    )
    with subprocess.Popen([sys.executable, "-c", watching], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while sum("step 4" in line for line in lines) < 2:
            lines.append(process.stdout.readline())
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"kind": "step", "step": 5, "epoch": 1, "total_loss": 2.0}\n')
        while "step 5" not in lines[-1]:
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        # It may have been in the middle of a line.
        assert process.stdout.read().rstrip().endswith("status 130 light")
