"""Collectives between ranks against what one process computes from all parts."""

import pytest
import torch
from collective_cases import collectives
from rank_group import run_ranks

from gcahng.distributed import ONE, Ranks


@pytest.mark.parametrize("size", [2, 3])
def test_collectives_and_their_gradients(size: int) -> None:
    assert run_ranks(size, collectives) == [[]] * size


def test_one_rank_sends_nothing() -> None:
    x = torch.randn(6, 2, requires_grad=True)
    assert ONE.sum(x) is x
    assert ONE.gather(x, (3,)) is x
    assert ONE.gather(x, ()) is x
    assert ONE.host_max([1.0, 2.0]) == ONE.host_sum([1.0, 2.0]) == [1.0, 2.0]
    assert ONE.all_of("word") == ["word"]
    ONE.wait()
    assert ONE.share == (0, 1)
    assert ONE.first


def test_a_rank_knows_its_share() -> None:
    assert Ranks(2, 5).share == (2, 5)
    assert not Ranks(2, 5).first
    assert Ranks(0, 5).first
