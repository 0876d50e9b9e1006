"""Ranks as real processes: their parts make up the batches of one rank, whatever the number of ranks and workers.

One set of two processes and one of three do all jobs, since starting Python takes longer than the jobs.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_rank
from PIL import Image

from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import make_plan
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.writer import Sample, ShardWriter

SCRIPT = Path(train_rank.__file__)
BROKEN = 12
SIZES = {"seed": 3, "num_classes": 7, "num_samples": 2}
SKIP = SIZES | {"on_error": "skip"}
SAMPLE = SIZES | {"sampler": "sample", "passes": 10}
STOP = {"epoch": 1, "batch": 4}
TIME_LIMIT = 120  # seconds


def encode(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (20, 18 + seed % 7, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(directory: Path, broken: int | None = None) -> Path:
    """30 classes of 3 to 5 images in small tars; windows of 14 classes, twice P, or more."""
    directory.mkdir()
    writer, row = ShardWriter(directory, shard_bytes=30_000), 0
    for class_number in range(30):
        for _ in range(3 + class_number % 3):
            content = encode(row)[: 150 if row == broken else None]
            writer.write(Sample(content, "png", f"class {class_number}", "train", f"{row}.png"))
            row += 1
    writer.finish("test", 0, {}, window_bytes=1)
    return directory


def jobs(shards: Path, damaged: Path, world_size: int) -> list[dict[str, Any]]:
    whole = [[epoch, 0, None] for epoch in (0, 1)]
    listed = []
    for workers in (0, 2):
        common = {"num_workers": workers}
        listed += [
            {"name": f"uniform {workers}", "shards": str(shards), "options": SIZES, "parts": whole} | common,
            {"name": f"skip {workers}", "shards": str(damaged), "options": SKIP, "parts": whole} | common,
            {"name": f"sample {workers}", "shards": str(shards), "options": SAMPLE, "parts": whole[:1]} | common,
        ]
        if world_size == 2:
            parts = [[0, 0, None], [STOP["epoch"], 0, STOP["batch"]]]
            listed.append(
                {"name": f"begun {workers}", "shards": str(damaged), "options": SKIP, "parts": parts} | common
            )
        else:
            rest = {"name": f"continued {workers}", "after": f"begun {workers}", "parts": [[2, 0, None]]}
            listed.append(rest | {"shards": str(damaged), "options": SKIP} | common)
    return listed


def run_ranks(world_size: int, listed: list[dict[str, Any]], out: Path) -> None:
    (out / f"{world_size}.json").write_text(json.dumps(listed))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(world_size), str(out / f"{world_size}.json"), str(out)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=TIME_LIMIT)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """What two and three ranks loaded, and under 1 what one rank loads without workers."""
    base = tmp_path_factory.mktemp("ranks")
    shards, damaged = write_shards(base / "shards"), write_shards(base / "damaged", BROKEN)
    found = {}
    for world_size in (2, 3):
        out = base / str(world_size)
        out.mkdir()
        for state in (base / "2").glob("*.state.json") if world_size == 3 else ():
            (out / state.name).write_text(state.read_text())
        run_ranks(world_size, jobs(shards, damaged, world_size), out)
        found[world_size] = out
    out = base / "1"
    out.mkdir()
    three_epochs = {"name": "skip 0", "parts": [[epoch, 0, None] for epoch in range(3)]}
    for job in jobs(shards, damaged, 2)[:3]:
        job |= three_epochs if job["name"] == "skip 0" else {}
        np.savez(out / f"{job['name']}.0.npz", **train_rank.load(0, 1, job, out))
    return found | {1: out}


def read(folder: Path, name: str) -> list[dict[str, np.ndarray]]:
    """A job's findings, rank by rank."""
    return [dict(np.load(path)) for path in sorted(folder.glob(f"{name}.*.npz"))]


def joined(ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The parts of all ranks put side by side along the classes; counters added up."""
    parts = {name: np.concatenate([rank[name] for rank in ranks], axis=-1) for name in ("classes", "rows", "pixels")}
    return parts | {name: sum(rank[name] for rank in ranks) for name in ("skipped", "repaired")}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    for name in ("classes", "rows", "pixels", "skipped", "repaired"):
        assert np.array_equal(got[name], want[name]), name


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("job", ["uniform", "skip", "sample"])
def test_the_parts_of_all_ranks_are_the_batches_of_one(folders, job, workers, world_size):
    ranks = read(folders[world_size], f"{job} {workers}")
    assert len(ranks) == world_size
    sizes = {2: [4, 3], 3: [3, 2, 2]}[world_size]
    for rank, size in zip(ranks, sizes, strict=True):
        assert rank["rank_sizes"].tolist() == sizes
        assert rank["classes"].shape[1] == size and rank["pixels"].shape[1:] == (2, size)
        assert np.array_equal(rank["at"], ranks[0]["at"]), "the same batches on all ranks"
    (want,) = read(folders[1], f"{job} 0")
    last = want["at"][:, 0] < (1 if job == "sample" else 2)
    assert_same(joined(ranks), {name: want[name][last] for name in want if name != "rank_sizes"})


def test_there_was_something_to_repair_and_to_skip(folders):
    (skip,), (sample,) = read(folders[1], "skip 0"), read(folders[1], "sample 0")
    assert skip["skipped"].sum() >= 2 and BROKEN not in skip["rows"]
    assert sample["repaired"].sum() >= 2 and sample["rows"].shape == (42, 2, 7)


@pytest.mark.parametrize("workers", [0, 2])
def test_three_fresh_processes_go_on_where_two_stopped(folders, workers):
    begun, continued = read(folders[2], f"begun {workers}"), read(folders[3], f"continued {workers}")
    assert begun[0]["at"][-1].tolist() == [STOP["epoch"], STOP["batch"]]
    assert continued[0]["at"][0].tolist() == [STOP["epoch"], STOP["batch"] + 1]
    (want,) = read(folders[1], "skip 0")
    before, after = joined(begun), joined(continued)
    assert_same({name: np.concatenate([before[name], after[name]]) for name in before}, want)


def test_the_plan_alone_says_what_ranks_load(folders, tmp_path):
    """No process is needed to know a batch: manifest, seed, epoch, P and K are enough."""
    shards = ShardSet.open(write_shards(tmp_path / "shards"))
    table = ClassTable.from_shards(shards, "train", samples_per_class=2)
    plan = make_plan(table, epoch=1, **SIZES)
    assert len(np.unique(np.concatenate([plan.shards(i)[0] for i in range(len(plan))]))) > len(plan.shards(0)[0])
    got = joined(read(folders[3], "uniform 2"))
    of_epoch = read(folders[3], "uniform 2")[0]["at"][:, 0] == 1
    assert of_epoch.sum() == len(plan)
    for index, (classes, rows) in enumerate(zip(got["classes"][of_epoch], got["rows"][of_epoch], strict=True)):
        assert np.array_equal(classes, plan.batch(index).labels)
        assert np.array_equal(rows, plan.batch(index).rows)
