"""Retrieval over ranks: the gallery in parts, the same bits as in one process."""

from dataclasses import fields

import pytest
import torch
from rank_group import run_ranks
from retrieval_cases import CASES, all_cases, faults, search

from gcahng.metrics import RetrievalResult


def both(ranks):
    return all_cases(ranks), faults(ranks)


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest) -> list[tuple[dict[str, RetrievalResult], dict[str, str]]]:
    return run_ranks(request.param, both)


@pytest.mark.parametrize("name", CASES)
def test_each_rank_has_the_result_of_one_process(name: str, found: list) -> None:
    want = search(CASES[name], None)
    for results, _ in found:
        for field in fields(RetrievalResult):
            got, expected = getattr(results[name], field.name), getattr(want, field.name)
            if isinstance(expected, torch.Tensor):
                assert got.dtype == expected.dtype
                assert torch.equal(got.nan_to_num(-1), expected.nan_to_num(-1)), field.name
            else:
                assert got == expected, field.name


def test_a_fault_of_one_rank_is_said_by_all(found: list) -> None:
    for rank, (_, messages) in enumerate(found):
        assert "row 3 holds NaN" in messages["nan_on_the_last"], rank
        assert "`ks` must lie between 1 and" in messages["k_beyond_all_parts"]
        assert "must not be empty" in messages["nothing_anywhere"]
