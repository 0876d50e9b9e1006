"""Evaluation over ranks: real processes that say nothing to each other see every row, and every tar's image, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from eval_rank import ROWS, SETTINGS, Pictures, load
from tar_cases import picture

from gcahng.data.eval_loader import eval_loader
from gcahng.data.ranks import rank_part
from gcahng.errors import InputError

ROOT = Path(__file__).parents[2]
TARS = (9, 2, 6)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 13, 20])
def test_slices_of_ranks_follow_each_other(world_size: int) -> None:
    slices = [ROWS[rank_part(ROWS.size, rank, world_size)] for rank in range(world_size)]
    assert np.concatenate(slices).tolist() == ROWS.tolist()
    sizes = {len(part) for part in slices}
    assert sizes <= {len(ROWS) // world_size, -(-len(ROWS) // world_size)}


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_an_impossible_rank(rank: int, world_size: int) -> None:
    with pytest.raises(InputError, match=f"must be .*, got {rank if world_size else world_size}"):
        eval_loader(Pictures(), ROWS, transform=SETTINGS, batch_size=2, rank=rank, world_size=world_size)


def test_a_rank_without_rows_is_empty() -> None:
    loader = eval_loader(Pictures(), ROWS[:1], transform=SETTINGS, batch_size=2, rank=1, world_size=2)
    assert len(loader) == 0 and list(loader) == [] and loader.rows.tolist() == []


def test_one_rank_is_all_rows_and_says_so() -> None:
    loader = eval_loader(Pictures(), ROWS, transform=SETTINGS, batch_size=5)
    assert loader.rows.tolist() == ROWS.tolist() and [len(rows) for _, _, rows in loader] == [5, 5, 3]


def expected(batch_size: int, rows: np.ndarray, num_ahead: int) -> list[tuple[list[int], list[int]]]:
    """The same by hand: shards of this batch and of those that workers still read, then the next two."""
    batches = [[row // 5 for row in rows[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    told: list[tuple[list[int], list[int]]] = []
    for place in range(len(batches)):
        present = list(dict.fromkeys(sum(batches[max(place - num_ahead, 0) : place + 1], [])))
        later = [shard for shard in sum(batches[place + 1 :], []) if shard not in present]
        pair = (present, list(dict.fromkeys(later))[:2])
        if not told or told[-1] != pair:
            told.append(pair)
    return told


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("rows", [np.arange(12), ROWS, np.arange(12)[::-1], np.array([0, 11, 1, 10, 2])])
def test_the_source_is_told_which_shards_come(rows: np.ndarray, num_workers: int) -> None:
    source = Pictures()
    list(eval_loader(source, rows, transform=SETTINGS, batch_size=2, num_workers=num_workers))
    assert source.told == expected(2, rows, 2 * num_workers)
    if num_workers == 0 and rows[-1] == 11:
        assert source.told == [([0], [1, 2]), ([0, 1], [2]), ([1], [2]), ([2], [])]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three tars; the labels count the images."""
    folder = tmp_path_factory.mktemp("tars")
    number = 0
    for tar, count in enumerate(TARS):
        with webdataset.TarWriter(str(folder / f"{tar}.tar")) as writer:
            for _ in range(count):
                writer.write({"__key__": f"k{number}", "jpg": picture(number), "cls": number})
                number += 1
    return f"{folder}/{{0..{len(TARS) - 1}}}.tar"


def start(rank: int, world_size: int, tars: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "tests" / "eval_rank.py"), str(rank), str(world_size), tars]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_rows_and_tars(tars: str, world_size: int) -> None:
    """With 0 and with 2 workers each."""
    want = load(0, 1, 0, tars)
    assert [row[0] for row in want["rows"]] == ROWS.tolist() and [row[1] for row in want["rows"]] == list(ROWS // 3)
    assert [sample[2] for sample in want["samples"]] == list(range(sum(TARS)))
    processes = [start(rank, world_size, tars) for rank in range(world_size)]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, ended
    ranks = [json.loads(out) for out, _ in ended]
    for workers in range(2):
        assert sum((rank[workers]["rows"] for rank in ranks), []) == want["rows"]
        assert sorted(sum((rank[workers]["samples"] for rank in ranks), [])) == want["samples"]
    shares = [len(rank[0]["samples"]) for rank in ranks]
    assert shares == {2: [15, 2], 3: [9, 2, 6]}[world_size]  # whole tars, nothing padded
