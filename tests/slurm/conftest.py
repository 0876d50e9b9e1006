"""Puts `cluster` and `job_site` on the import path, and starts one cluster for all tests."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import CannotStart, running_cluster
from job_site import CLASSES, Site


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    # Not pytest's folder: sockets want short paths.
    with tempfile.TemporaryDirectory(prefix="gs") as name:
        folder = Path(name)
        with ExitStack() as stack:
            try:
                cluster = stack.enter_context(running_cluster(folder / "c"))
            except CannotStart as error:
                pytest.skip(f"SLURM does not start here: {error}")
            found = Site(cluster, folder)
            found.run(
                "slurm/convert.sh", "glyphs", "--out", str(found.data), "--classes", str(CLASSES), "--size", "32",
                "--identical", "drop",
            )  # fmt: skip
            yield found
