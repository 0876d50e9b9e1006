"""`python -m shards.verify` as people run it: exit status, messages, the JSON file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shard_cases import edit_manifest, flip, samples_of, write_shards

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "set"
    samples = [s for split in ("train", "test") for s in samples_of(split, f"{split} bird", 3, 0)]
    write_shards(folder, samples)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "shards.verify", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_whole_folder(whole: Path, tmp_path: Path) -> None:
    done = run(whole, "--decode", "--workers", 2, "--json", tmp_path / "report.json")
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, [f"{whole}: whole"])
    assert done.stdout.startswith("read: 2 shards, 6 samples, 0.0 MB, all images decoded\n")
    assert "verify: 100%" in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["whole"] is True and report["faults"] == [] and report["samples"] == 6


def test_faults_are_printed_counted_and_written(copied: Path, tmp_path: Path) -> None:
    flip(copied / "shard-000001.tar", 900)
    edit_manifest(copied, lambda raw: raw.update(seed=8), sign=False)
    (copied / "more.txt").write_text("")
    done = run(copied, "--quiet", "--workers", 1, "--json", tmp_path / "report.json")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("fault: manifest.json: was changed after the conversion: expected manifest_sha256")
    assert lines[1].startswith("fault: shard-000001.tar: is damaged: expected sha256")
    assert lines[2].startswith("fault: shard-000001.tar: the image of sample 000000003 is damaged: expected crc32")
    assert lines[3:] == [
        "warning: more.txt is not named by the manifest.",
        "read: 2 shards, 6 samples, 0.0 MB",
        f"{copied}: DAMAGED, 3 faults. Restore the files or convert again.",
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["whole"] is False and len(report["faults"]) == report["num_faults"] == 3


def test_what_cannot_be_checked(copied: Path, tmp_path: Path) -> None:
    edit_manifest(copied, lambda raw: raw.update(version=1))
    cases = {
        (tmp_path / "none",): f"error: {tmp_path}/none/manifest.json is missing: ",
        (copied,): f"error: {copied}/manifest.json: expected version 2, got 1. Convert the data set again",
        (copied / "manifest.json",): f"error: {copied}/manifest.json is a file: expected a folder of shards. Give the",
        ("pipe:cat x",): "error: `pipe:` is refused as a place of shards",
    }
    for arguments, message in cases.items():
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


def test_impossible_options(whole: Path, tmp_path: Path) -> None:
    done = run(whole, "--workers", 0, "--quiet")
    assert (done.returncode, done.stderr) == (2, "error: `workers` must be at least 1, got 0.\n")
    done = run(whole, "--quiet", "--json", tmp_path / "none" / "report.json")
    assert done.returncode == 2
    assert done.stderr == f"error: Cannot write {tmp_path}/none/report.json (No such file or directory). " + (
        "Give another --json.\n"
    )
    done = run()
    assert done.returncode == 2 and "the following arguments are required: location" in done.stderr
