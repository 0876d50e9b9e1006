"""Sums of block values by block number: how edges are added up at their end nodes.

Deterministic on every device. On CPU `index_add_` goes through the index in order. On CUDA it adds by atomics in an
order that changes from run to run, and so do scatter_add_ and torch_scatter; there the sum is a matrix product where
that is cheap, else `index_put_`, which sorts the index (a radix sort keeps equal ones in order) and adds up each run
of equal ones in order.
"""

import torch
from torch import Tensor

# Blocks up to which the product with a one-hot matrix is taken, per node of a block. With b nodes per block its
# arithmetic is about blocks / (10 b D) of that of an edge block on the same pairs: 1/300 at this bound and D = 512, or
# a thirtieth of the time where edge blocks compute in bfloat16.
ONE_HOT_BLOCKS = 16


def add_blocks(into: Tensor, index: Tensor, values: Tensor) -> None:
    """into[index[k]] += values[k], in place and deterministic on every device.

    Args:
        into: (blocks, b, ...), contiguous.
        index: (n,) int64 block numbers, repeats allowed.
        values: (n, b, ...).
    """
    values = values.to(into.dtype)
    if into.device.type == "cpu":
        into.index_add_(0, index, values)
    elif into.shape[0] <= ONE_HOT_BLOCKS * into.shape[1]:
        add_by_product(into, index, values)
    else:
        add_by_sorting(into, index, values)


def add_by_product(into: Tensor, index: Tensor, values: Tensor) -> None:
    """`add_blocks` as a product with a (blocks, n) one-hot matrix."""
    one_hot = (torch.arange(into.shape[0], device=index.device)[:, None] == index).to(into.dtype)
    into.view(into.shape[0], -1).addmm_(one_hot, values.reshape(index.numel(), into[0].numel()))


def add_by_sorting(into: Tensor, index: Tensor, values: Tensor) -> None:
    """`add_blocks` by torch's accumulating `index_put_`."""
    torch.ops.aten.index_put_(into, [index], values, True)
