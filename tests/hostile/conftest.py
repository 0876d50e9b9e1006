"""A folder for files that are written thousands of times."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY = "/dev/shm"


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """In memory where there is such a place: a disk takes ten times as long as the readers."""
    place = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="gcahng-fuzz-") as folder:
        yield Path(folder)
