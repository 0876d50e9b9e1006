"""Signals of one process: what is noted, when a run ends by it, what it leaves, and that loader workers live on."""

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_cases import assert_same_tensors, make_trainer, read_metrics, saved_tensors, train

from gcahng.data.workers import worker_loader
from gcahng.errors import Interrupted, TrainingError
from gcahng.training import embedding
from gcahng.training.interruption import Interruption, leave_marker
from gcahng.training.progress import Progress
from gcahng.training.signals import SIGNALS, Signals
from gcahng.training.step import TrainingStep
from gcahng.training.trainer import Trainer


@contextmanager
def own_handlers() -> Iterator[list[int]]:
    """Handlers as a program may have them, and what they got."""
    heard: list[int] = []
    before = {number: signal.signal(number, lambda got, _: heard.append(got)) for number in SIGNALS}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_is_noted_and_handlers_come_back() -> None:
    signals = Signals()
    with own_handlers() as heard:
        with signals.noted():
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                send(number)
            assert heard == []
        assert signals.received == signal.SIGUSR1
        send(signal.SIGTERM)
        assert heard == [signal.SIGTERM] and signals.received == signal.SIGUSR1


def test_nested_notes_are_one() -> None:
    """A command notes signals from its start; the trainer, for those who have no command."""
    signals = Signals()
    with own_handlers() as heard, signals.noted():
        with signals.noted():
            pass
        send(signal.SIGTERM)
        assert heard == [] and signals.received == signal.SIGTERM


def test_elsewhere_than_in_the_main_thread_nothing_is_noted(shards, tmp_path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    found: list[Any] = []
    settings = {"train.max_steps_per_epoch": 1}
    thread = threading.Thread(target=lambda: found.append(train(shards, tmp_path / "run", settings)))
    thread.start()
    thread.join(60)
    assert found and found[0]["steps"] == 1
    assert before == [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("received", [None, signal.SIGUSR1])
def test_obeying_ends_the_process(received: int | None) -> None:
    """Where there is nothing to save: at once, if a signal was noted already."""
    pid = os.fork()
    if pid == 0:
        signals = Signals()
        with signals.noted():
            if received is not None:
                send(received)
            signals.obey()
            send(signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == (received or signal.SIGTERM)


def interrupted_in(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> str:
    """Run with a SIGTERM in the given call, from 1 on, of `owner.name`; what was raised."""
    calls: list[int] = []
    original = getattr(owner, name)

    def signalled(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            send(signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, signalled)
        with pytest.raises(Interrupted) as raised:
            trainer.run()
    trainer.close()
    return str(raised.value)


def test_a_run_interrupted_again_and_again_is_the_undisturbed_one(shards, tmp_path, monkeypatch) -> None:
    """With loader workers; in the middle of an epoch, in an evaluation twice in a row, in the last step of an epoch."""
    settings = {"train.epochs": 2, "train.resume": "auto", "data.num_workers": 1, "eval.batch_size": 4}
    train(shards, tmp_path / "whole", settings)
    cut = tmp_path / "cut"
    moments = [(TrainingStep, "__call__", 2), *[(embedding, "embed_batch", 2)] * 2, (TrainingStep, "__call__", 5)]
    stood = []
    for owner, name, call in moments:
        trainer = make_trainer(shards, cut, settings)
        assert interrupted_in(trainer, monkeypatch, owner, name, call) == "The run was asked to end by SIGTERM."
        found = json.loads((cut / "PREEMPTED").read_text())
        stood.append((found["epoch"], found["batch"], found["step"]))
        assert found["checkpoint"] == f"step-{found['step']}" == (cut / "last").resolve().name
    # After the last step of an epoch it is saved as that step, and evaluated by the next start.
    assert stood == [(0, 2, 2), (1, 0, 5), (1, 0, 5), (1, 5, 10)]
    train(shards, cut, settings)
    assert not (cut / "PREEMPTED").exists()
    assert read_metrics(cut) == read_metrics(tmp_path / "whole")
    assert_same_tensors(saved_tensors(cut), saved_tensors(tmp_path / "whole"))


def test_a_signal_behind_the_last_evaluation_lets_the_run_finish(shards, tmp_path, monkeypatch) -> None:
    trainer = make_trainer(shards, tmp_path / "run", {"train.max_steps_per_epoch": 1})
    finish = trainer._finish
    monkeypatch.setattr(trainer, "_finish", lambda: (send(signal.SIGTERM), finish())[1])
    assert trainer.run()["steps"] == 1
    assert (tmp_path / "run" / "results.json").exists() and not (tmp_path / "run" / "PREEMPTED").exists()


def test_an_interruption_that_cannot_be_saved_is_no_interruption(shards, tmp_path, monkeypatch) -> None:
    """The disk is full: the error is what is said, and no marker calls for another start."""
    trainer = make_trainer(shards, tmp_path / "run")

    def full(*_: object, **__: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gcahng.training.checkpoint.save_checkpoint", full)
    step = TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda *a, **k: (send(signal.SIGUSR1), step(*a, **k))[1])
    with pytest.raises(TrainingError, match="No space left on device") as raised:
        trainer.run()
    trainer.close()
    assert not isinstance(raised.value, Interrupted) and not (tmp_path / "run" / "PREEMPTED").exists()


def test_a_marker_that_cannot_be_written_is_an_error_of_ours(tmp_path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(
        TrainingError, match=r"run/PREEMPTED cannot be written \(.*\)\. .* by SIGTERM\. What was trained"
    ):
        leave_marker(tmp_path / "run", Interruption().error(), Progress())


class Slow:
    """A data set that answers with its process, after a while."""

    def __getitem__(self, request: int) -> int:
        time.sleep(0.2)
        return os.getpid()


class Parent:
    """A data set that answers with its process's parent."""

    def __getitem__(self, request: int) -> int:
        return os.getppid()


def test_workers_are_children_of_the_process_that_they_end_with() -> None:
    """Also where processes are made otherwise by default: those of a fork server outlive a killed process."""
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert set(worker_loader(Parent(), range(2), 1, False)) == {os.getpid()}
    finally:
        multiprocessing.set_start_method(default, force=True)


def test_workers_take_no_notice_of_the_signals(tmp_path) -> None:
    """From their first moment on, but for a SIGTERM of the process that they work for: another one sends them."""
    loader = worker_loader(Slow(), range(8), 2, False)
    signals = Signals()
    with signals.noted():
        answers = iter(loader)
        workers = [worker.pid for worker in answers._workers]  # type: ignore[attr-defined]
        for name in ("TERM", "USR1", "TERM"):
            subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)
        assert set(answers) == set(workers) and len(workers) == 2
    assert signals.received is None
