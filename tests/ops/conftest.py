"""The data set that the dashboard is tested on."""

from pathlib import Path

import pytest
from run_cases import convert_patterns, draw_patterns


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitor")
    return convert_patterns(draw_patterns(folder / "images"), folder / "shards")
