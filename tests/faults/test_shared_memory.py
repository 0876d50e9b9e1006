"""A real /dev/shm of one MiB, mounted for the run alone, and batches that are larger."""

import shutil
import subprocess
from pathlib import Path

import pytest
from job_cases import job

NAMESPACE = ("unshare", "--mount")


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        [*NAMESPACE, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /dev/shm"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    return tried.returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="mounting a small /dev/shm needs root and namespaces")
def test_full_shared_memory_ends_the_run_with_its_name(shards: Path, tmp_path: Path) -> None:
    overrides = {"data.num_workers": 2, "data.transform.image_size": 256, "train.log_every": 1}
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    with job(
        shards=shards, folder=tmp_path, overrides=overrides, env={}, prefix=(*NAMESPACE, "sh", "-c", script, "sh")
    ) as run:
        ended = run.finish(240)
        assert ended.status == 2, ended.err
        (line,) = ended.said("error: ")
        assert line.startswith("error: A loader worker cannot hand over a batch (")
        assert "No space left on device" in line and ": of /dev/shm " in line
        assert line.endswith("or lower `data.num_workers`; 0 needs none.") and "Traceback" not in ended.err
        assert run.left() == {}
