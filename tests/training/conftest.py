"""The data set and the finished run that the training tests share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from run_cases import convert_patterns, draw_patterns, train

from gcahng.data.shards.reader import ShardSet


@pytest.fixture(scope="session")
def pattern_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files, one folder per class."""
    return draw_patterns(tmp_path_factory.mktemp("patterns") / "images")


@pytest.fixture(scope="session")
def shards(pattern_folder: Path) -> Path:
    """The converted data set; never written to."""
    return convert_patterns(pattern_folder, pattern_folder.with_name("shards"))


@pytest.fixture(scope="session")
def shard_set(shards: Path) -> ShardSet:
    """The data set, opened."""
    return ShardSet.open(shards)


@dataclass(frozen=True)
class FinishedRun:
    """A run and what it returned."""

    dir: Path
    results: dict[str, Any]


@pytest.fixture(scope="session")
def finished_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Three epochs of GCA-HNG with a warm-up epoch and validation; never written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = {"train.epochs": 3, "train.warm_up_epochs": 1, "data.validation": 0.375}
    return FinishedRun(folder, train(shards, folder, settings))
