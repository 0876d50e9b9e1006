"""Sums of block values by block number: how edges are added up at their end nodes."""

import torch
from torch import Tensor

# Up to here a product with a one-hot matrix costs less than a hundredth of the edge stage.
LARGEST_ONE_HOT = 4096


def add_blocks(into: Tensor, index: Tensor, values: Tensor) -> None:
    """into[index[k]] += values[k], in place and deterministic on every device.

    Args:
        into: (blocks, ...), contiguous.
        index: (n,) int64 block numbers, repeats allowed.
        values: (n, ...).
    """
    if into.device.type == "cpu":
        into.index_add_(0, index, values.to(into.dtype))
    elif into.shape[0] <= LARGEST_ONE_HOT:
        # index_add_ adds by atomics there, in an order that changes from run to run.
        spread = (torch.arange(into.shape[0], device=index.device)[:, None] == index).to(into.dtype)
        into.view(into.shape[0], -1).addmm_(spread, values.to(into.dtype).reshape(index.numel(), -1))
    else:
        # Sorts the index, hence deterministic.
        torch.ops.aten.index_put_(into, [index], values.to(into.dtype), True)
