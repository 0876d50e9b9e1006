"""Sums of block values: a loop over the blocks, the same numbers every time."""

from collections.abc import Callable

import pytest
import torch
from maths_cases import generator
from torch import Tensor

from gcahng.graph.block_sums import ONE_HOT_BLOCKS, add_blocks, add_by_product, add_by_sorting

DEVICES = pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
WAYS = pytest.mark.parametrize("add", [add_blocks, add_by_product, add_by_sorting], ids=lambda f: f.__name__)
Add = Callable[[Tensor, Tensor, Tensor], None]


@DEVICES
@WAYS
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4)])
@pytest.mark.parametrize("count", [0, 1, 50])
@pytest.mark.parametrize("blocks", [6, 1 + ONE_HOT_BLOCKS])
def test_equals_a_loop(device: str, add: Add, shape: tuple[int, ...], count: int, blocks: int) -> None:
    draw = generator(count)
    into = torch.randn(blocks, *shape, generator=draw, dtype=torch.float64)
    index = torch.randint(0, blocks, (count,), generator=draw)
    values = torch.randn(count, *shape, generator=draw, dtype=torch.float64)
    want = into.clone()
    for k, block in enumerate(index.tolist()):
        want[block] += values[k]
    got = into.to(device)
    add(got, index.to(device), values.to(device))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-13, atol=1e-13)


@DEVICES
def test_values_of_a_lower_precision_are_added_in_that_of_the_sums(device: str) -> None:
    into = torch.zeros(2, 3, device=device)
    values = torch.full((4096, 3), 1.0, dtype=torch.bfloat16, device=device)
    add_blocks(into, torch.zeros(4096, dtype=torch.int64, device=device), values)
    assert into.tolist() == [[4096.0] * 3, [0.0] * 3]  # bfloat16 itself stops at 256


@DEVICES
@WAYS
def test_the_same_call_gives_the_same_bits(device: str, add: Add) -> None:
    draw = generator(1)
    index = torch.randint(0, 5, (3000,), generator=draw).to(device)
    values = torch.randn(3000, 8, generator=draw).to(device)
    found = []
    for _ in range(3):
        found.append(torch.zeros(5, 8, device=device))
        add(found[-1], index, values)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@DEVICES
@WAYS
def test_expanded_values_and_views_of_larger_sums(device: str, add: Add) -> None:
    # What the edge stage hands over: values that are a view, sums that are a view of (positions, D).
    positions = torch.zeros(6, 2, dtype=torch.float64, device=device)
    values = torch.arange(3.0, dtype=torch.float64, device=device)[:, None, None].expand(3, 2, 2)
    add(positions.view(3, 2, 2), torch.tensor([2, 0, 2], device=device), values)
    assert positions.tolist() == [[1.0, 1.0]] * 2 + [[0.0, 0.0]] * 2 + [[2.0, 2.0]] * 2
