"""Observers are no danger to a run: those that fail are left out, and an end comes even where nothing has begun."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import make_config

from gcahng.distributed import ONE
from gcahng.training.observers import Observers, RunFacts, RunObserver, make_observers
from gcahng.training.progress import Progress


class Fails(RunObserver):
    """At one event; it notes all."""

    def __init__(self, event: str) -> None:
        self.event = event
        self.heard: list[str] = []

    def _hear(self, event: str) -> None:
        self.heard.append(event)
        if event == self.event:
            raise RuntimeError("of its own")

    def begin(self, *_: Any) -> None:
        self._hear("begin")

    def step(self, *_: Any) -> None:
        self._hear("step")

    def end(self, *_: Any) -> None:
        self._hear("end")


@pytest.mark.parametrize("event", ["begin", "step", "end"])
def test_one_that_fails_hears_of_the_end_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, event: str) -> None:
    bad, good = Fails(event), Fails("")
    observers = Observers([bad, good])
    facts = RunFacts(make_config(tmp_path, tmp_path), tmp_path, ONE, torch.device("cpu"), 0, 5)
    observers.begin(facts, Progress())
    for _ in range(2):
        observers.step(Progress(), 1.0, 0.5, 8)
    observers.end(Progress(), "finished")
    assert good.heard == ["begin", "step", "step", "end"]
    assert bad.heard == {"begin": ["begin", "end"], "step": ["begin", "step", "end"], "end": good.heard}[event]
    assert [record.getMessage() for record in caplog.records] == ["Fails failed and is left out from here on."]


def test_an_end_without_a_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run folder that cannot be made ends a run before its observers hear of it."""
    config = make_config(
        tmp_path, tmp_path / "run", {"monitor.textfile": str(tmp_path / "run.prom"), "monitor.port": 1}
    )
    with caplog.at_level(logging.WARNING):
        make_observers(config, ONE).end(Progress(), "failed")
    assert caplog.records == [] and list(tmp_path.iterdir()) == []
