"""Evaluations of three real processes are those of one, in every bit: protocols, tars, files, failures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_rank_cases import PROTOCOLS, evaluations
from hotel_cases import write_hotels
from rank_group import run_ranks
from run_cases import draw_patterns
from tar_cases import picture, write_tar

from gcahng.distributed import ONE

TARS = ("several tars", "one tar, distractors", "tars search tars")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hotels; five tars of a gallery, uneven; one of queries, which ranks share; some that are labelled by name."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_hotels(draw_patterns(folder / "images"), folder / "hotels")
    (folder / "tars").mkdir()
    names = {"query-0": range(5), "mixed-0": range(3), "mixed-1": range(3)}
    names |= {f"gallery-{number}": range(10 * number, 10 * number + 2 + number) for number in range(5)}
    names |= {"strangers-0": range(60, 63), "strangers-1": range(63, 68)}
    for name, numbers in names.items():
        files: list[tuple[str, bytes]] = []
        for number in numbers:
            files.append((f"{number}.jpg", picture(number)))
            if name == "mixed-1":
                files.append((f"{number}.json", b'{"label": "x"}'))
            elif not name.startswith("strangers"):
                files.append((f"{number}.cls", b"%d" % (number % 2)))
        write_tar(folder / "tars" / f"{name}.tar", files)
    return folder


def evaluated(size: int, folder: Path) -> list[dict[str, Any]]:
    return run_ranks(size, evaluations, folder / "hotels", folder / "tars", folder)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return evaluations(ONE, folder / "hotels", folder / "tars", folder)


@pytest.fixture(scope="module", params=[3])
def ran(request: pytest.FixtureRequest, folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    return evaluated(request.param, folder)


def test_every_rank_has_what_one_process_has(ran: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for name in (*PROTOCOLS, *TARS):
        for rank, found in enumerate(ran):
            # NaN of queries without a reference are equal here.
            np.testing.assert_equal(found[name], one[name], err_msg=f"{name}, rank {rank}")
    assert one["one tar, distractors"]["keys"] == [str(number) for number in range(5)]
    assert len(one["several tars"]["keys"]) == 20 and one["several tars"]["tars"][-1].endswith("gallery-4.tar")


def test_embeddings_come_to_rank_0_alone(ran: list[dict[str, Any]], one: dict[str, Any], folder: Path) -> None:
    np.testing.assert_equal(ran[0]["embeddings"], one["embeddings"])
    assert one["embeddings"]["query"].shape == (24, 8)
    assert [found["embeddings"] for found in ran[1:]] == [{}] * (len(ran) - 1)
    for name in ("chains", "tars"):
        with np.load(folder / f"{name}-{len(ran)}.npz") as saved, np.load(folder / f"{name}-1.npz") as want:
            assert saved.files == want.files and "gallery_embeddings" in saved.files
            for array in want.files:
                np.testing.assert_array_equal(saved[array], want[array])


def test_what_fails_on_one_rank_fails_on_all(ran: list[dict[str, Any]]) -> None:
    last = len(ran) - 1
    told = f"TrainingError: rank {last}: MemoryError: a loader process was killed"
    assert [found["crashed"] for found in ran] == [told] * last + ["MemoryError: a loader process was killed"]
    (mixed,) = {found["mixed labels"] for found in ran}
    assert re.match("DataError: Labels of the tars must be of one kind: got the number [01] and the name 'x'", mixed)


def test_rows_find_their_rank(ran: list[dict[str, Any]]) -> None:
    everything = np.arange(14.0).reshape(7, 2)
    parts = np.concatenate([found["rows"]["own"] for found in ran])
    np.testing.assert_array_equal(parts, everything)
    assert max(len(f["rows"]["own"]) for f in ran) - min(len(f["rows"]["own"]) for f in ran) <= 1
    assert ran[0]["rows"]["gathered"] == everything[:3].tolist()
    assert all(found["rows"]["gathered"] is None for found in ran[1:])
    (twice,) = {found["rows"]["twice"] for found in ran}
    assert twice.startswith("InputError: `places` of all ranks must be 0 to 1, each once: ")
