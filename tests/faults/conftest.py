"""A converted data set for runs that meet faults."""

from pathlib import Path

import pytest
from run_cases import convert_patterns, draw_patterns


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never written to."""
    folder = tmp_path_factory.mktemp("faults")
    return convert_patterns(draw_patterns(folder / "images"), folder / "shards")
