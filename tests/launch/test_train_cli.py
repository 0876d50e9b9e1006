"""`launch/train.py` as its users start it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from run_cases import assert_same_tensors, base_settings, read_metrics, saved_tensors

from gcahng.training.config import settings_help

ROOT = Path(__file__).parents[2]
SHORT = ("train.max_steps_per_epoch=2", "--quiet")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def test_plain_python_and_accelerate_launch_train_alike(command_line, process, config_file, tmp_path) -> None:
    """The latter as a process, in another folder than the checkout's."""
    script = ROOT / "launch" / "train.py"
    plain = command_line("train.py", "--config", config_file, "train.max_steps_per_epoch=2")
    assert plain.status == 0, plain.err
    assert "epoch 1/1" in plain.err and "embed" in plain.err  # progress bars
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    launched = process(*launcher, script, "--config", config_file, *SHORT, f"run.dir={tmp_path}/launched")
    assert launched.status == 0, launched.err
    assert "epoch 1/1" not in launched.err
    assert read_metrics(tmp_path / "launched") == read_metrics(tmp_path / "run")
    assert_same_tensors(saved_tensors(tmp_path / "launched"), saved_tensors(tmp_path / "run"))
    for ended, folder in ((plain, tmp_path / "run"), (launched, tmp_path / "launched")):
        assert ended.out.startswith(f"run folder: {folder}\nlast  ")
        assert "2 steps, " in ended.out and "MAP@R" in ended.out


def test_a_killed_process_leaves_a_run_that_goes_on(command_line, config_file, tmp_path) -> None:
    """SIGKILL in the middle of training; nothing can be tidied up."""
    epochs = ("train.epochs=300", "optim.graph.schedule.name=constant", "eval.every_epochs=1000")
    command = [sys.executable, ROOT / "launch" / "train.py", "--config", config_file, "--quiet", *epochs]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "step-15").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = max(int(p.name[5:]) for p in (tmp_path / "run").glob("step-*") if p.name[5:].isdigit())
    assert 15 <= done < 1500
    settings = (f"train.epochs={done // 5 + 1}", *epochs[1:])
    resumed = command_line("train.py", "--config", config_file, "--quiet", *settings, "train.resume=auto")
    assert resumed.status == 0, resumed.err
    whole = command_line("train.py", "--config", config_file, "--quiet", *settings, f"run.dir={tmp_path}/whole")
    assert whole.status == 0, whole.err
    assert_same_tensors(saved_tensors(tmp_path / "run"), saved_tensors(tmp_path / "whole"))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_settings_and_options_come_in_any_order(command_line, config_file, tmp_path) -> None:
    arguments = ("seed=3", "--quiet", "train.max_steps_per_epoch=1", "--config", config_file, "seed=4")
    assert command_line("train.py", *arguments).status == 0
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["seed"] == 4 and resolved["train"]["max_steps_per_epoch"] == 1


def test_the_resolved_configuration_trains_the_same_run_again(command_line, config_file, tmp_path) -> None:
    assert command_line("train.py", "--config", config_file, *SHORT).status == 0
    resolved = tmp_path / "run" / "config.yaml"
    again = f"run.dir={tmp_path}/again"
    assert command_line("train.py", "--config", resolved, again, "--quiet").status == 0
    assert_same_tensors(saved_tensors(tmp_path / "again"), saved_tensors(tmp_path / "run"))


def test_check_tries_the_run_and_writes_nothing(command_line, config_file, tmp_path) -> None:
    before = sorted(tmp_path.iterdir())
    ended = command_line("train.py", "--config", config_file, "--check", "train.epochs=9")
    assert ended.status == 0, ended.err
    lines = [line.split(":")[0] for line in ended.out.splitlines()]
    assert lines == ["configuration, data and steps are fine", "one step", "one epoch", "peak memory", "losses"]
    assert "one epoch: 5 steps, about" in ended.out and "; 9 epochs: about" in ended.out
    assert sorted(tmp_path.iterdir()) == before


def test_check_finds_what_training_would_find(command_line, config_file, launch_shards) -> None:
    for setting, message in (
        ("batch.num_classes=9", "`batch.num_classes` must not exceed"),
        ("eval.ks=[1,99]", "`eval.ks` must not exceed"),
        ("eval.split=dev", "Split 'dev' does not exist"),
        (f"run.dir={launch_shards}/manifest.json/run", "cannot be written"),
    ):
        ended = command_line("train.py", "--config", config_file, "--check", setting)
        assert ended.status == 2 and message in ended.err, ended.err


def test_all_faults_of_a_configuration_come_at_once(command_line, config_file, tmp_path) -> None:
    settings = base_settings(tmp_path / "nowhere", tmp_path / "run")
    settings["train"]["epoch"] = 3
    settings["batch"]["num_classes"] = 1
    config_file.write_text(yaml.safe_dump(settings))
    faulty = ("model.pooling=average", "optim.graph.lr=fast", "sede=1")
    ended = command_line("train.py", "--config", config_file, *faulty)
    assert ended.status == 2 and ended.out == ""
    assert "Traceback" not in ended.err
    first, *faults = ended.err.splitlines()
    assert first == f"error: Configuration `{config_file}` has 5 faults:"
    for start in (
        f"  train.epoch ({config_file}): unknown key; did you mean `train.epochs`?",
        f"  batch.num_classes ({config_file}): must be at least 2: got 1.",
        "  model.pooling (command line): must be one of avg, max, avg+max, cls",
        "  optim.graph.lr (command line): must be a number: got 'fast'.",
        "  sede (command line): unknown key; did you mean `seed`?",
    ):
        assert any(line.startswith(start) for line in faults), (start, faults)
    assert len(faults) == 5 and not (tmp_path / "run").exists()


def test_a_missing_manifest_is_named(command_line, config_file, tmp_path) -> None:
    (tmp_path / "half").mkdir()
    for folder, words in (("half", "a folder without a manifest"), ("none", "no such folder")):
        ended = command_line("train.py", "--config", config_file, f"data.dir={tmp_path}/{folder}")
        assert ended.status == 2 and ended.out == ""
        assert ended.err.startswith(f"error: {tmp_path}/{folder}/manifest.json is missing: ")
        assert words in ended.err and "python -m shards.convert" in ended.err


def test_a_missing_configuration_is_named(command_line, tmp_path) -> None:
    ended = command_line("train.py", "--config", tmp_path / "absent.yaml")
    assert ended.status == 2
    assert ended.err.startswith(f"error: Configuration `{tmp_path}/absent.yaml` cannot be read")


def test_an_existing_run_needs_resume_or_overwrite(command_line, config_file) -> None:
    arguments = ("--config", config_file, *SHORT)
    assert command_line("train.py", *arguments).status == 0
    again = command_line("train.py", *arguments)
    assert again.status == 2 and "already holds a run" in again.err and "--overwrite" in again.err
    overwritten = command_line("train.py", *arguments, "--overwrite", "train.resume=auto", "seed=8")
    assert overwritten.status == 0, overwritten.err
    assert command_line("train.py", *arguments, "--overwrite").status == 0
    assert command_line("train.py", *arguments, "train.resume=auto").status == 0


def test_several_processes_without_a_launcher_are_refused(command_line, config_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = command_line("train.py", "--config", config_file)
    assert ended.status == 2
    assert "2 processes are to run together (WORLD_SIZE), but RANK, LOCAL_RANK, MASTER_ADDR" in ended.err
    assert "Start them with `accelerate launch` or `torchrun`; for one process unset WORLD_SIZE" in ended.err
    assert not (tmp_path / "run").exists()


def test_the_cpu_that_accelerate_asks_for_is_used(command_line, config_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    auto = command_line("train.py", "--config", config_file, *SHORT, "train.device=auto")
    assert auto.status == 0, auto.err
    # How a run was launched is no setting of it.
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["device"] == "auto"
    cuda = command_line("train.py", "--config", config_file, *SHORT, "train.device=cuda")
    assert cuda.status == 2 and "`train.device` is cuda, but the launcher asks for the CPU" in cuda.err


@pytest.mark.parametrize(
    ("asked", "ours", "fits"),
    [("no", "bf16", True), ("bf16", "bf16", True), ("bf16", "fp32", False), ("fp16", "bf16", False)],
)
def test_the_precision_that_accelerate_asks_for_must_be_ours(
    command_line, config_file, monkeypatch, asked: str, ours: str, fits: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    ended = command_line("train.py", "--config", config_file, *SHORT, f"train.precision={ours}")
    assert ended.status == (0 if fits else 2), ended.err
    assert fits or f"asks for mixed_precision {asked}, but `train.precision` is {ours}" in ended.err


def test_a_run_that_diverges_ends_with_status_one(command_line, config_file) -> None:
    ended = command_line("train.py", "--config", config_file, "--quiet", "optim.metric_model.lr=1.0e+36")
    assert ended.status == 1 and ended.out == ""
    assert ended.err.splitlines()[-1].startswith("error: Step 1: ") and "Samples: " in ended.err


def test_an_interrupt_ends_quietly(command_line, config_file, monkeypatch: pytest.MonkeyPatch) -> None:
    from gcahng.training.step import TrainingStep

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingStep, "__call__", interrupted)
    ended = command_line("train.py", "--config", config_file, "--quiet")
    assert ended.status == 130 and ended.err.endswith("interrupted\n")


def test_help_explains_every_setting(command_line) -> None:
    ended = command_line("train.py", "--help")
    assert ended.status == 0
    assert settings_help() in ended.out
    for option in ("--config", "--check", "--overwrite", "--quiet", "section.key=value"):
        assert option in ended.out
    assert "starts anew whatever train.resume says" in " ".join(ended.out.split())


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config", "x", "--chekc"]])
def test_a_wrong_command_line_shows_its_use(command_line, arguments: list[str]) -> None:
    ended = command_line("train.py", *arguments)
    assert ended.status == 2 and ended.err.startswith("usage: launch/train.py")
