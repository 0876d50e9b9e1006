"""Labels of all ranks, and one error on all of them where a rank's part is not as planned."""

from typing import Any

import pytest
import torch
from collective_cases import FAULTS, SAMPLES, exchanges
from rank_group import run_ranks

from gcahng.distributed import ONE
from gcahng.distributed.batch_exchange import BatchExchange

SIZE = 3
# Classes 0 | 1 2 | 3 4 5 on the three ranks; see `collective_cases.whole_part`.
ALL_LABELS = [10 * group + number for group in range(SAMPLES) for number in range(6)]
OTHERS = ("rank 0: step 7, images (3, 3, 8, 8), 3 labels, planned 3", "rank 1: step 7, images (6, 3, 8, 8), 6 labels")
LAST = {
    "too many images": "rank 2: step 7, images (50, 3, 8, 8), 50 labels, planned 9",
    "too few images": "rank 2: step 7, images (2, 3, 8, 8), 2 labels, planned 9",
    "no images": "rank 2: step 7, images (0, 3, 8, 8), 0 labels, planned 9",
    "a label too few": "rank 2: step 7, images (9, 3, 8, 8), 8 labels, planned 9",
    "another image size": "rank 2: step 7, images (9, 3, 8, 9), 9 labels, planned 9",
    "another number of dimensions": "rank 2: step 7, images (9, 3, 8, 8, 1), 9 labels, planned 9",
    "many dimensions": "rank 2: step 7, images (9, 1, 2, 3, 4, ...), 9 labels, planned 9",
    "another step": "rank 2: step 8, images (9, 3, 8, 8), 9 labels, planned 9",
}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(SIZE, exchanges)


def test_every_rank_gets_all_labels(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        for name in ("well before", "int32", "columns"):
            assert of_rank[name] == ALL_LABELS, name


def test_a_faulty_part_is_the_same_error_on_every_rank(found: list[dict[str, Any]]) -> None:
    assert LAST.keys() == FAULTS.keys()
    for name, line in LAST.items():
        messages = {of_rank[name] for of_rank in found}
        assert len(messages) == 1, name
        (message,) = messages
        for part in (*OTHERS, line, "Give every rank its part of the same batch plan"):
            assert part in message


def test_ranks_go_on_after_an_error(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        for name in FAULTS:
            assert of_rank[f"well after {name}"] == ALL_LABELS
        assert of_rank["sum"] == SIZE


def test_one_rank_keeps_its_labels() -> None:
    labels = torch.arange(4)
    assert BatchExchange(ONE, labels, (4, 3, 8, 8), (), 2, 0).labels() is labels
