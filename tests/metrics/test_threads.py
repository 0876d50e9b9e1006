"""A search on the threads of one process gives the bits of one thread."""

import importlib
import threading
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from retrieval_cases import CASES, search

from gcahng.errors import InputError
from gcahng.metrics import RetrievalResult, retrieval
from gcahng.metrics.exchange import Exchange
from gcahng.metrics.threads import on_threads


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def parts_used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let single blocks be parts, and note how many there were."""
    module = importlib.import_module("gcahng.metrics.retrieval")  # the package has a function of that name
    used: list[int] = []
    monkeypatch.setattr(module, "_BLOCKS_PER_THREAD", 1)
    monkeypatch.setattr(module, "on_threads", lambda parts, work: used.append(parts) or on_threads(parts, work))
    return used


@pytest.mark.parametrize("name", ["self", "self_chunks", "gallery", "gallery_ties"])
def test_threads_change_no_bit(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    want = search(CASES[name], None)  # too few blocks for parts
    used = parts_used(monkeypatch)
    got = search(CASES[name], None)
    assert len(used) == 1 and 2 <= used[0] <= threads
    for field in fields(RetrievalResult):
        found, expected = getattr(got, field.name), getattr(want, field.name)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1)), field.name
        else:
            assert found == expected, field.name


def test_input_that_needs_gradients_is_searched(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = parts_used(monkeypatch)
    x = torch.randn(3500, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert not retrieval(x, torch.arange(3500) // 5, num_neighbours=1).neighbour_scores.requires_grad
    assert used


def test_an_error_ends_all_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = parts_used(monkeypatch)
    running = threading.active_count()
    with pytest.raises(InputError, match="`ks` must lie between 1 and"):
        retrieval(torch.ones(3500, 4), torch.arange(3500) // 5, ks=(3500,))
    assert used
    assert threading.active_count() == running


def test_an_error_of_one_part_does_not_leave_the_others_waiting(threads: int) -> None:
    def work(others: Exchange) -> None:
        if others.part == 1:
            raise ArithmeticError("part 1")
        others.everyone(torch.zeros(1))

    with pytest.raises(ArithmeticError, match="part 1"):
        on_threads(threads, work)
