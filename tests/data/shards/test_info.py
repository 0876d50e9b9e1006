"""`python -m shards.info`: counts, sizes and histograms, for every kind of folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_cases import samples_of, write_indexes, write_shards

from gcahng.data.shards.info import class_sizes, describe, describe_text, histogram
from gcahng.data.shards.reader import ShardSet

REPOSITORY = Path(__file__).parents[3]


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "shards.info", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def described(folder: Path) -> tuple[dict[str, Any], str]:
    description = describe(ShardSet.open(folder), str(folder))
    assert json.loads(json.dumps(description)) == description
    return description, describe_text(description)


PROTOCOL = {
    "name": "Birds 3",
    "published": {"train": {"classes": 2, "images": 4}, "test": {"classes": 1, "images": 1}},
    "found": {"train": {"classes": 2, "images": 4}, "test": {"classes": 1, "images": 1}},
    "matches": True,
}


def test_command_line(tmp_path: Path) -> None:
    samples = samples_of("train", "wren", 3, 0) + samples_of("train", "owl", 1, 9) + samples_of("test", "jay", 1, 5)
    skipped = [{"source": "bird.jpg", "reason": "it is cut."}]
    duplicates = {"within_class": 4, "across_classes": 1, "across_splits": 2, "examples": []}
    extra = {"protocol": PROTOCOL, "skipped": skipped, "duplicates": duplicates}
    manifest = write_shards(tmp_path / "set", samples, 1 << 20, **extra)
    done = run(tmp_path / "set", "--json", tmp_path / "info.json")
    assert (done.returncode, done.stderr) == (0, "")
    sizes = [f"{shard.bytes / 1000:.1f} kB" for shard in manifest.shards]
    assert done.stdout.splitlines() == [
        f"{tmp_path}/set: shard format version 2, source test, seed 7",
        f"3 classes, 5 images, 2 shards, {sum(s.bytes for s in manifest.shards) / 1000:.1f} kB; "
        "epochs are planned in windows of 30.0 kB",
        "",
        f"train: 2 classes, 4 images, 1 shard, {sizes[0]}, about 1 window",
        "  images per class: min 1, median 2, mean 2.0, max 3; classes of 1 image: 1",
        "  images  classes",
        "       1        1  ########################################",
        "       2        0",
        "       3        1  ########################################",
        "",
        f"test: 1 class, 1 image, 1 shard, {sizes[1]}, about 1 window",
        "  images per class: min 1, median 1, mean 1.0, max 1; classes of 1 image: 1",
        "  images  classes",
        "       1        1  ########################################",
        "",
        "protocol: Birds 3, train 2 classes / 4 images, test 1 classes / 1 images: as published",
        "duplicates, byte by byte: 4 within a class, 1 across classes, 2 across train and other splits",
        "skipped: 1",
        "  bird.jpg: it is cut.",
    ]
    written = json.loads((tmp_path / "info.json").read_text())
    assert written["splits"]["train"]["images_per_class"] == {
        "min": 1,
        "median": 2.0,
        "mean": 2.0,
        "max": 3,
        "classes_of_one_image": 1,
        "histogram": [{"from": i, "to": i, "classes": n} for i, n in ((1, 1), (2, 0), (3, 1))],
    }
    assert written["protocol"] == PROTOCOL and written["skipped"] == skipped


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/manifest.json is missing: expected a folder of shards")
    write_shards(tmp_path / "set", samples_of("train", "wren", 1, 0))
    done = run(tmp_path / "set", "--json", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: Cannot write {tmp_path} (Is a directory). Give another --json.\n"


def test_query_and_gallery_share_classes(tmp_path: Path) -> None:
    samples = [s for split, n in (("query", 2), ("gallery", 3)) for s in samples_of(split, "shirt", n, 0)]
    write_shards(tmp_path / "set", samples)
    description, text = described(tmp_path / "set")
    assert description["classes"] == 1
    assert [s["images"] for s in description["splits"].values()] == [2, 3]
    assert description["splits"]["query"]["shared_classes"] == {"gallery": 1}
    assert "\n  classes that are in gallery too: 1\n" in text
    assert text.endswith("protocol: none is published for this source\nduplicates: not counted\nskipped: 0")


def test_a_class_in_several_places_is_counted_once(tmp_path: Path) -> None:
    write_indexes(tmp_path / "set", [("train", [0, 1, 0]), ("test", [2]), ("train", [0, 1])], 3)
    shards = ShardSet.open(tmp_path / "set")
    assert class_sizes(shards, "train").tolist() == [3, 2, 0]
    assert described(tmp_path / "set")[0]["splits"]["train"]["classes"] == 2


@pytest.mark.parametrize(
    "extra",
    [
        {"protocol": {"name": "x"}, "duplicates": 3, "skipped": 5},
        {"protocol": "none", "duplicates": {"within_class": "many"}, "skipped": ["a", {"source": "b"}]},
        {"protocol": {"name": "x", "published": 1, "found": 2, "matches": False}, "skipped": [{}] * 30},
    ],
)
def test_folders_of_other_writers(tmp_path: Path, extra: dict[str, Any]) -> None:
    write_shards(tmp_path / "set", samples_of("dev", "wren", 1, 0), **extra)
    _, text = described(tmp_path / "set")
    assert "protocol: " in text and "duplicates: " in text and "skipped: " in text
    if extra["skipped"] == [{}] * 30:
        assert text.count("\n  {}") == 10 and "and 20 more, all listed in the manifest" in text


def test_protocol_that_differs(tmp_path: Path) -> None:
    found = {"train": {"classes": 2, "images": 3}}
    write_shards(
        tmp_path / "set",
        samples_of("train", "wren", 1, 0),
        protocol=PROTOCOL | {"found": found, "matches": False},
    )
    assert "NOT as published" in described(tmp_path / "set")[1]


def ends(bins: list[dict[str, int]]) -> list[tuple[int, int]]:
    return [(b["from"], b["to"]) for b in bins]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([5], [(5, 5)]),
        ([1, 4, 2], [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ([41, 60], [(low, min(low + 1, 60)) for low in range(41, 61, 2)]),
        ([1, 100], [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 100)]),
        ([2, 64], [(2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64)]),
        ([3, 65], [(3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 65)]),
    ],
)
def test_bins(sizes: list[int], expected: list[tuple[int, int]]) -> None:
    assert ends(histogram(np.array(sizes, dtype=np.int64))) == expected


@pytest.mark.parametrize("seed", range(20))
def test_every_class_is_in_one_bin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, rng.choice([3, 20, 200, 30_000]), 50) + rng.choice([0, 40])
    bins = histogram(sizes)
    assert [b["classes"] for b in bins] == [int(((sizes >= b["from"]) & (sizes <= b["to"])).sum()) for b in bins]
    assert sum(b["classes"] for b in bins) == 50
    assert all(first["to"] + 1 == second["from"] for first, second in zip(bins, bins[1:], strict=False))
    assert bins[-1]["to"] == sizes.max() and bins[0]["from"] <= sizes.min() <= bins[0]["to"]
    assert len(bins) <= 17
