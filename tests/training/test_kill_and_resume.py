"""A process that is killed at any moment, again and again, leaves a run that ends bit for bit as if it had not been."""

import json
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kill_cases import Death, draw_death, train_in_processes
from run_cases import assert_same_run, read_metrics, read_state
from trainer_ranks_cases import damaged

from gcahng.data.shards.reader import ShardSet
from gcahng.distributed import ONE

# Warm-up, proxies, schedules, validation, epoch averages, unreadable images; 4 steps in each of 3 epochs.
SETTINGS = {
    "train.epochs": 3,
    "train.warm_up_epochs": 1,
    "train.save_every_steps": 1,
    "train.resume": "auto",
    "data.validation": 0.25,
    "data.on_error": "skip",
    "loss.metric": "proxy_anchor",
}
SEED = 20261122


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to, and how often it came to each place."""

    shards: Path
    dir: Path
    met: Mapping[str, int]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = ShardSet.open(shards).split_samples("train")[[0, 9, 20, 33]].tolist()
    copy = damaged(shards, folder / "shards", rows, ONE)
    started = time.monotonic()
    assert train_in_processes(copy, folder / "run", SETTINGS, counts=folder / "met.json") == [0]
    seconds = time.monotonic() - started
    assert read_state(folder / "run")["progress"]["skipped"] > 0
    return Undisturbed(copy, folder / "run", json.loads((folder / "met.json").read_text()), seconds)


def survive(whole: Undisturbed, folder: Path, kills: int, seed: int, overrides: Mapping[str, Any]) -> list[Death]:
    """Kill a run so often at random moments, let it end after each few, and compare; the deaths it died."""
    draws, died = random.Random(seed), []
    settings = SETTINGS | overrides
    run, in_a_row = folder / "run-0", 0
    while len(died) < kills:
        death = draw_death(draws, whole.met, whole.seconds)
        (status,) = train_in_processes(whole.shards, run, settings, death=death)
        assert status in (0, -signal.SIGKILL), f"{death} of seed {seed}: {status}"
        if status:
            died.append(death)
            in_a_row += 1
            if in_a_row < 3 and len(died) < kills:
                continue
            assert train_in_processes(whole.shards, run, settings) == [0], f"after {died[-in_a_row:]} of seed {seed}"
        assert_whole(run, whole, f"after {died[-in_a_row:]} of seed {seed}")
        run, in_a_row = folder / f"run-{len(died)}", 0
    return died


def assert_whole(run: Path, whole: Undisturbed, what: str) -> None:
    __tracebackhide__ = False
    try:
        assert_same_run(run, whole.dir)
    except (AssertionError, OSError) as error:
        raise AssertionError(f"{what}: {error}") from error
    steps = [row["step"] for row in read_metrics(run) if row["kind"] == "step"]
    assert steps == list(range(1, 13)), what
    assert not list(run.glob("*.partial")) and not list(run.glob("*.replaced")), what


@pytest.mark.parametrize(
    ("workers", "background"), [(1, True), (0, False), pytest.param(0, True, marks=pytest.mark.full)]
)
def test_a_run_that_is_killed_at_random_moments_is_the_undisturbed_one(
    undisturbed: Undisturbed, tmp_path, workers: int, background: bool
) -> None:
    seed = SEED + workers + 2 * background
    overrides = {"data.num_workers": workers, "train.save_in_background": background}
    died = survive(undisturbed, tmp_path, 3, seed, overrides)
    print(f"seed {seed}: {died}")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(8))
def test_a_run_that_is_killed_often_is_the_undisturbed_one(undisturbed: Undisturbed, tmp_path, seed: int) -> None:
    died = survive(undisturbed, tmp_path, 25, seed, {"train.save_in_background": seed % 2 == 0})
    print(f"seed {seed}: {died}")


# The moments at which a folder has no name, or two, or half of its files.
PLACES = ["after rename", "within rmtree", "within write"]
OTHER_PLACES = ["before rename", "before replace", "after symlink_to"]


@pytest.mark.parametrize("place", [*PLACES, *(pytest.param(place, marks=pytest.mark.full) for place in OTHER_PLACES)])
def test_each_window_of_a_save_can_be_the_last(undisturbed: Undisturbed, tmp_path, place: str) -> None:
    """A late one, when there are checkpoints to be replaced and removed."""
    death = Death(place, undisturbed.met[place] * 3 // 4)
    assert train_in_processes(undisturbed.shards, tmp_path / "run", SETTINGS, death=death) == [-signal.SIGKILL]
    assert train_in_processes(undisturbed.shards, tmp_path / "run", SETTINGS) == [0]
    assert_whole(tmp_path / "run", undisturbed, str(death))
