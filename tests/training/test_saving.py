"""Saves in the background, and disks that are full: training goes on, loudly, and loses nothing."""

import errno
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import fill, make_room, small_disk
from run_cases import assert_same_run, make_trainer, read_metrics, read_state, train
from torch import nn

from gcahng.errors import TrainingError
from gcahng.training import appended_file, checkpoint
from gcahng.training.run_log import METRICS_FILE, read_rows
from gcahng.training.saving import CheckpointWriter, HostCopies, Saved, Snapshot
from gcahng.training.trainer import Trainer


class Killed(Exception):
    """Stands for whatever ends a process."""


# 4 steps in each of 3 epochs.
SETTINGS = {
    "train.epochs": 3,
    "train.save_every_steps": 1,
    "train.resume": "auto",
    "data.validation": 0.25,
    "loss.metric": "proxy_anchor",
}


def snapshot(step: int, *, keep_all: bool = False) -> Snapshot:
    module = nn.Linear(3, 2)
    return Snapshot(step, {"metric_model": module.state_dict()}, {}, {}, {"step": step}, "", {}, keep_all)


def steps_in(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(folder)]


@pytest.fixture
def said() -> list[Saved]:
    return []


def writer(folder: Path, said: list[Saved], **options: Any) -> CheckpointWriter:
    return CheckpointWriter(folder, **{"keep_last": 2, "in_background": True, "told": said.append} | options)


def test_a_background_save_returns_before_it_is_written_and_is_told_of_later(tmp_path, said: list[Saved]) -> None:
    may_write, threads = threading.Event(), []

    def first() -> None:
        threads.append(threading.current_thread())
        assert may_write.wait(60)

    saver = writer(tmp_path, said, first=first)
    saver.save(snapshot(1))
    assert steps_in(tmp_path) == [] and said == []
    saver.tell()
    assert said == []
    may_write.set()
    saver.save(snapshot(2))  # after the one before
    assert steps_in(tmp_path)[0] == "step-1" and [saved.step for saved in said] == [1]
    saver.finish()
    assert steps_in(tmp_path) == ["step-1", "step-2"] and [saved.step for saved in said] == [1, 2]
    assert all(saved.error is None and saved.seconds > 0 for saved in said)
    assert threading.main_thread() not in threads


def test_a_save_that_waits_is_whole_when_it_returns(tmp_path, said: list[Saved]) -> None:
    saver = writer(tmp_path, said, in_background=False)
    saver.save(snapshot(1))
    checkpoint.verify(tmp_path / "last")
    assert [saved.step for saved in said] == [1]


def test_older_checkpoints_stay_where_all_are_to_be_kept(tmp_path, said: list[Saved]) -> None:
    saver = writer(tmp_path, said, keep_last=1)
    saver.save(snapshot(1))
    saver.save(snapshot(2, keep_all=True))
    saver.finish()
    assert steps_in(tmp_path) == ["step-1", "step-2"]
    saver.save(snapshot(3))
    saver.finish()
    assert steps_in(tmp_path) == ["step-3"]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_fault_of_another_kind_is_raised_where_it_is_heard_of(tmp_path, said: list[Saved], in_background) -> None:
    def first() -> None:
        raise ZeroDivisionError("no disk's fault")

    saver = writer(tmp_path, said, in_background=in_background, first=first)
    if in_background:
        saver.save(snapshot(1))
    with pytest.raises(ZeroDivisionError):
        saver.settle() if in_background else saver.save(snapshot(1))


def test_copies_are_their_own_and_take_the_same_memory_again() -> None:
    weight = torch.arange(4.0)
    state = {"a": weight, "b": [{"step": torch.tensor(1.0)}, (0.9, 0.99)], "c": {"n": 1}}
    copies = HostCopies()
    first = copies.of(state)
    assert torch.equal(first["a"], weight) and first["b"][1] == (0.9, 0.99) and first["c"] == {"n": 1}
    place = first["a"].data_ptr()
    assert place != weight.data_ptr() and first["c"] is not state["c"]
    weight.add_(1)
    assert first["a"].tolist() == [0, 1, 2, 3]
    second = copies.of(state)
    assert second["a"].data_ptr() == place and second["a"].tolist() == [1, 2, 3, 4]
    other = copies.of({"a": torch.zeros(5), "b": torch.zeros(1, dtype=torch.bfloat16)})
    assert other["a"].shape == (5,) and other["b"].dtype == torch.bfloat16


# --- full disks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(shards, folder, SETTINGS)
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 16) as folder:
        yield folder


def at_steps(trainer: Trainer, actions: dict[int, Callable[[], object]]) -> None:
    """Do something before the step of a number (from 1) is taken, what came before being written."""
    step = trainer.steps.step

    def watched(*arguments: Any, **options: Any) -> Any:
        action = actions.get(options["step"] + 1)
        if action is not None:
            trainer._saver.settle()
            action()
        return step(*arguments, **options)

    trainer.steps.step = watched  # type: ignore[assignment]


def errors_of(caplog: pytest.LogCaptureFixture, what: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR and what in r.getMessage()]


def test_training_goes_on_while_the_disk_is_full(shards, disk: Path, undisturbed: Path, caplog) -> None:
    run = disk / "run"
    trainer = make_trainer(shards, run, SETTINGS)
    seen: dict[str, Any] = {}

    def look_and_make_room() -> None:
        newest = checkpoint.newest_whole(run)
        assert newest is not None
        seen["newest"] = newest.name
        seen["lines"] = [row["step"] for row in read_rows(run / METRICS_FILE)]
        assert (run / METRICS_FILE).read_bytes().endswith(b"}\n")
        make_room(disk)

    at_steps(trainer, {3: lambda: fill(disk), 7: look_and_make_room})
    trainer.run()
    # Steps 3 to 6, with an evaluation after 4, were taken without a byte of room.
    assert seen["newest"] == "step-2" and max(seen["lines"]) < 6
    failures = errors_of(caplog, "cannot be written (")
    assert [text for text in failures if "step-4 cannot be written" in text and "No space left on device" in text]
    assert len(errors_of(caplog, "metrics.jsonl cannot be written")) == 1
    assert_same_run(run, undisturbed)
    assert len(read_metrics(run)) == 12 + 6


def test_a_run_whose_last_save_failed_ends_with_an_error_and_can_go_on(
    shards, disk: Path, undisturbed: Path, caplog
) -> None:
    run = disk / "run"
    trainer = make_trainer(shards, run, SETTINGS)
    at_steps(trainer, {11: lambda: fill(disk)})
    with pytest.raises(TrainingError, match=r"step-12 cannot be written \(.*No space left on device"):
        trainer.run()
    newest = checkpoint.newest_whole(run)
    assert newest is not None and newest.name == "step-10"
    assert not (run / "results.json").exists()
    make_room(disk)
    train(shards, run, SETTINGS)
    assert_same_run(run, undisturbed)


def test_a_run_that_cannot_prepare_its_folder_says_so_and_keeps_it(shards, disk: Path, undisturbed: Path) -> None:
    run = disk / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    before = (run / "config.yaml").read_text()
    fill(disk)
    with pytest.raises(TrainingError, match=r"run cannot be written \(.*No space left on device"):
        train(shards, run, SETTINGS)
    assert (run / "config.yaml").read_text() == before
    make_room(disk)
    train(shards, run, SETTINGS)
    assert_same_run(run, undisturbed)


def test_observers_hear_of_the_end_whatever_the_writer_met(shards, tmp_path) -> None:
    def first() -> None:
        raise ZeroDivisionError("no disk's fault")

    def killed() -> None:
        raise Killed

    trainer = make_trainer(shards, tmp_path / "run", SETTINGS)
    save = trainer._saver.save

    def save_and_die(*arguments: Any, **options: Any) -> None:
        trainer._saver._writer._first = first
        save(*arguments, **options)
        killed()

    trainer._saver.save = save_and_die  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_rows_that_wait_are_in_the_checkpoint(shards, tmp_path, undisturbed: Path, monkeypatch) -> None:
    """The log's disk is full, the checkpoint's is not any more, and the process dies before it writes a row."""
    run, write, full = tmp_path / "run", appended_file.os.write, [False]

    def refusing(descriptor: int, data: Any) -> int:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    def killed() -> None:
        raise Killed

    trainer = make_trainer(shards, run, SETTINGS)
    at_steps(trainer, {3: lambda: full.__setitem__(0, True), 6: killed})
    monkeypatch.setattr(appended_file.os, "write", refusing)
    with pytest.raises(Killed):
        trainer.run()
    monkeypatch.undo()
    assert {row["step"] for row in read_rows(run / METRICS_FILE)} == {1, 2}
    waiting = [json.loads(row)["step"] for row in read_state(run)["unwritten"][METRICS_FILE]]
    assert waiting == [3, 4, 4, 4, 5]
    train(shards, run, SETTINGS)
    assert_same_run(run, undisturbed)
