"""Rows that lie on several ranks (embeddings of a split): brought into contiguous parts, or to rank 0.

Both go rank by rank, so that no rank ever holds more than it ends up with and one other rank's part.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from gcahng.data.ranks import rank_part
from gcahng.distributed.ranks import Ranks
from gcahng.errors import InputError


def contiguous_rows(own: Tensor, places: Tensor, count: int, ranks: Ranks) -> Tensor:
    """This rank's contiguous part (see `rank_part`) of rows that are spread over the ranks in any way.

    Args:
        own: (n_r, D) the rows that this rank has, on the CPU.
        places: (n_r,) int64, the place of each among all.
        count: How many there are on all ranks.
        ranks: All of them call this.
    Returns:
        (m_r, D), the parts of all ranks, one after another, being all rows in their order.
    Raises:
        InputError: On every rank, where the places of all ranks are not 0 to count - 1, each once.
    """
    part = rank_part(count, ranks.rank, ranks.size)
    found = own.new_empty(part.stop - part.start, own.shape[1])
    filled = torch.zeros(len(found), dtype=torch.int64)
    for sender, size in enumerate(ranks.all_of(len(own))):
        rows, at = (
            (own, places) if sender == ranks.rank else (own.new_empty(size, own.shape[1]), places.new_empty(size))
        )
        if ranks.size > 1 and size:
            rows, at = rows.contiguous(), at.contiguous()
            dist.broadcast(rows, group=ranks.host_group, group_src=sender)
            dist.broadcast(at, group=ranks.host_group, group_src=sender)
        mine = ((at >= part.start) & (at < part.stop)).nonzero().flatten()
        found[at[mine] - part.start] = rows[mine]
        filled.index_add_(0, at[mine] - part.start, torch.ones_like(mine))
    wrong = ranks.host_sum([float((filled != 1).sum())])[0]
    if wrong:
        raise InputError(f"`places` of all ranks must be 0 to {count - 1}, each once: {wrong:.0f} places are not.")
    return found


def rows_on_first(own: Tensor, ranks: Ranks) -> Tensor | None:
    """All rows on rank 0, in the order of the ranks; None on the others.

    Args:
        own: (n_r, D) this rank's rows, on the CPU.
        ranks: All of them call this.
    """
    if ranks.size == 1:
        return own
    sizes = ranks.all_of(len(own))
    if not ranks.first:
        if len(own):
            dist.send(own.contiguous(), group=ranks.host_group, group_dst=0)
        return None
    found = own.new_empty(sum(sizes), own.shape[1])
    start = sizes[0]
    found[:start] = own
    for sender, size in enumerate(sizes[1:], 1):
        if size:
            dist.recv(found[start : start + size], group=ranks.host_group, group_src=sender)
        start += size
    return found
