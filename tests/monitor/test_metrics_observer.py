"""What single events do to the metrics, read off the text file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monitor_cases import Exported
from run_cases import make_config

from gcahng.distributed import ONE
from gcahng.errors import TrainingError
from gcahng.training.metrics_observer import MetricsObserver
from gcahng.training.observers import RunFacts
from gcahng.training.progress import Progress
from gcahng.training.saving import Saved


@pytest.fixture
def observer() -> MetricsObserver:
    return MetricsObserver()


@pytest.fixture
def value(observer: MetricsObserver, tmp_path: Path) -> Callable[[str], float | None]:
    """Begin a resumed run, whose metrics it reads."""
    config = make_config(tmp_path, tmp_path / "run", {"monitor.textfile": str(tmp_path / "run.prom")})
    facts = RunFacts(config, tmp_path / "run", ONE, torch.device("cpu"), 0, 5)
    observer.begin(facts, Progress(step=7, epoch=1, skipped=30, repaired=4))

    def read(name: str) -> float | None:
        found = Exported()
        found.add((tmp_path / "run.prom").read_text())
        own = f'run="{tmp_path / "run"}"'
        plain = {
            name.replace(f"{own},", "").replace(f",{own}", "").replace(f"{{{own}}}", ""): value
            for name, value in found.values.items()
        }
        return plain.get(name)

    return read


def test_what_was_counted_before_a_resume_does_not_count(observer, value) -> None:
    assert value("gcahng_skipped_images_total") == value("gcahng_repaired_draws_total") == 0
    progress = Progress(step=8, epoch=1, skipped=32, repaired=5)
    observer.paused(progress, 0.5)
    for _ in range(2):
        observer.logged(progress, {"step_seconds": 1.0, "data_seconds": 0.5})
    assert value("gcahng_skipped_images_total") == 2 and value("gcahng_repaired_draws_total") == 1
    assert value("gcahng_checkpoint_pause_seconds_sum") == 0.5


def test_saves_that_succeed_and_fail(observer, value) -> None:
    begun = value("gcahng_last_checkpoint_timestamp_seconds")
    observer.saved(Progress(), Saved(7, 2.0, TrainingError("disk full")))
    assert value("gcahng_checkpoint_failures_total") == 1
    assert value("gcahng_checkpoint_seconds_count") == 0
    assert value("gcahng_last_checkpoint_timestamp_seconds") == begun
    observer.saved(Progress(), Saved(8, 2.0, None))
    assert value("gcahng_checkpoint_failures_total") == 1
    assert value("gcahng_checkpoint_seconds_sum") == 2
    assert value("gcahng_last_checkpoint_timestamp_seconds") > begun


def test_steps_left_out_and_losses_that_are_not_finite(observer, value) -> None:
    observer.dropped(Progress(step=8), "loss")
    assert value("gcahng_non_finite_steps_total") == 1
    observer.logged(
        Progress(skipped=30, repaired=4),
        {"step_seconds": 1.0, "data_seconds": 0.5, "metric_loss": float("nan"), "samples": "0f"},
    )
    loss = value('gcahng_loss{name="metric"}')
    assert loss is not None and loss != loss


def test_the_state_at_the_end(observer, value) -> None:
    assert value("gcahng_step") == 7  # where a resumed run stands
    observer.evaluating(Progress(step=9, epoch=2))
    assert value("gcahng_evaluating") == 1
    observer.end(Progress(step=9, epoch=2), "interrupted")
    assert value('gcahng_run_state{state="running"}') == 0 and value('gcahng_run_state{state="interrupted"}') == 1
    assert value("gcahng_evaluating") == 0 and value("gcahng_step") == 9 and value("gcahng_epoch") == 2
