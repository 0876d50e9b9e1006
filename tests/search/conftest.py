"""A converted data set and a run on it, which the tests of embedding and search share."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from run_cases import convert_patterns, draw_patterns, train


@dataclass(frozen=True)
class Trained:
    """Shards (48 test images of 8 classes, D = 8, batches of 7), their image files, and a checkpoint."""

    images: Path
    shards: Path
    run: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / "last"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Never written to."""
    folder = tmp_path_factory.mktemp("embedded")
    images = draw_patterns(folder / "images")
    shards = convert_patterns(images, folder / "shards")
    train(shards, folder / "run", {"train.max_steps_per_epoch": 2})
    return Trained(images, shards, folder / "run")
