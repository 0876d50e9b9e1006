"""Ranks of references by counting: tiles of scores, the few pairs near a reference scored exactly.

An item counts for a query where it scores as much as a reference that is still looked for. Where the tile's error bound
leaves open on which side of a reference it stands, its exact score and then the gallery index decide: the ranks are
those of the exact scores, whatever tiles were used. Queries whose first reference lies far down would have most of the
gallery as candidates; `count_far` counts these without listing them.

Shapes: T items of a block, c candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gcahng.metrics.references import ReferenceRanks
from gcahng.metrics.tiles import BLOCK, FINER, Tile, TileMaker, Vectors, computed_limits, padded
from gcahng.metrics.unit_vectors import pair_scores

# A query block's first tile is looked at in growing slices: after each, far references are dropped, so that the
# next has few candidates.
FIRST_SLICES = (0, 128, 256, 512, 1024, BLOCK)
# Candidates that are collected before they are looked at: many at once use all threads.
_MOST_PENDING = 1 << 14
# Open pairs of a tile from which on finer tiles cost less than scoring so many one by one.
CROWDED = BLOCK * BLOCK // 256
_GROUP = 8


def slices_of(width: int, *, first: bool) -> Iterator[tuple[int, int]]:
    """Begin and end of the slices in which so many items of a tile are looked at: the first tile's grow."""
    return pairwise([*(bound for bound in FIRST_SLICES if bound < width), width] if first else [0, width])


@dataclass(frozen=True)
class Items:
    """Images of a set or of a part of it.

    Attributes:
        vectors: Of a multiple of `STEP` rows, zero behind the items.
        labels: (n,) int64.
        first_index: Gallery index of the first item.
    """

    vectors: Vectors
    labels: Tensor
    first_index: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_blocks(self) -> int:
        """Blocks of `BLOCK` items, the last one shorter."""
        return -(-len(self.vectors.exact) // BLOCK)

    def block(self, number: int) -> Vectors:
        """The vectors of a block."""
        return self.vectors.rows(number * BLOCK, (number + 1) * BLOCK)


class Counting:
    """Counts the items of one set that are ahead of the references of the queries of one set.

    Attributes:
        dtypes: By query block: what its tiles are to be computed in.
    """

    def __init__(self, queries: Items, gallery: Items, ranks: ReferenceRanks, dtype: torch.dtype | None = None) -> None:
        self.queries = queries
        self.gallery = gallery
        self.ranks = ranks
        self.dtypes = [dtype or queries.vectors.coarsest] * queries.num_blocks
        self._visits = [0] * queries.num_blocks
        self._uncounted_visits = [0] * queries.num_blocks
        self._due: set[int] = set()
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._num_pending = 0
        self._wanted = [self._is_wanted(block) for block in range(queries.num_blocks)]

    def turn_to(self, gallery: Items) -> None:
        """Count other items from now on."""
        self.flush()
        self.gallery = gallery

    def wants(self, block: int) -> bool:
        """Whether a reference of these queries is still looked for."""
        return self._wanted[block]

    def take(self, tile: Tile, block: int, item_block: int, *, by_column: bool) -> None:
        """Count a tile for the queries of a block: its rows, or with `by_column` its columns."""
        first = self._visits[block] == 0
        for begin, end in slices_of(tile.scores.shape[0 if by_column else 1], first=first):
            self._collect(tile, block, item_block, by_column, begin, end)
            if first:
                self._due.add(block)
                self.flush()
        self._visits[block] += 1
        self._uncounted_visits[block] += 1
        if self._visits[block] & (self._visits[block] - 1) == 0:
            self._due.add(block)
        if self._num_pending > _MOST_PENDING:
            self.flush()

    def flush(self) -> None:
        """Count what was collected, and drop references that are surely far."""
        if self._pending:
            query, item, score, error = (torch.cat(found) for found in zip(*self._pending, strict=True))
            self._pending, self._num_pending = [], 0
            self._count(query, item, score, error.double())
        for block in self._due:
            self.ranks.drop(*self._part(block))
            self._wanted[block] = self._is_wanted(block)
        self._due.clear()

    def _is_wanted(self, block: int) -> bool:
        return bool(self.ranks.thresholds(*self._part(block)).isfinite().any())

    def _part(self, block: int) -> tuple[int, int]:
        """First and last but one query of a block."""
        return block * BLOCK, min(len(self.queries), (block + 1) * BLOCK)

    def _collect(self, tile: Tile, block: int, item_block: int, by_column: bool, begin: int, end: int) -> None:
        """Items begin..end of a block that may be ahead of a reference looked for."""
        error = tile.column_error if by_column else tile.row_error
        limits = computed_limits(tile, self.ranks.thresholds(*self._part(block)), error)
        if by_column:
            part = tile.scores[begin:end]
            item, query = _at_least_by_column(part, limits)
            computed = part[item, query]
        else:
            part = tile.scores[:, begin:end]
            query, item = at_least_by_row(part, limits)
            computed = part[query, item]
        error = error[query] + tile.stored_roundoff * computed.abs()
        self._pending.append((query + block * BLOCK, item + (item_block * BLOCK + begin), computed.double(), error))
        self._num_pending += len(query)

    def _count(self, query: Tensor, item: Tensor, score: Tensor, error: Tensor) -> None:
        """Count candidates: (c,) positions of query and item, (c,) float64 computed score and its error."""
        inside = item < len(self.gallery)
        others = inside & (self.queries.labels[query] != self.gallery.labels[item.clamp_max(len(self.gallery) - 1)])
        kept = others.nonzero().squeeze(1)
        query, item, score, error = query[kept], item[kept], score[kept], error[kept]
        position = self.ranks.behind(query, score + error)
        is_open = self.ranks.reaches(query, position, score - error).nonzero().squeeze(1)
        query_open, item_open = query[is_open], item[is_open]
        exact = score[is_open]
        unsure = (error[is_open] > 0).nonzero().squeeze(1)
        pairs = query_open[unsure], item_open[unsure]
        exact[unsure] = pair_scores(self.queries.vectors.exact, self.gallery.vectors.exact, *pairs)
        position[is_open] = self.ranks.behind_exactly(query_open, exact, item_open + self.gallery.first_index)
        self.ranks.add(query, position)
        num_unsure = torch.bincount(pairs[0] // BLOCK, minlength=self.queries.num_blocks).tolist()
        for block, visits in enumerate(self._uncounted_visits):
            # Not judged by the first tile, which meets all references.
            if self._visits[block] > 1 and num_unsure[block] > CROWDED * visits:
                self.dtypes[block] = FINER[self.dtypes[block]]
            self._uncounted_visits[block] = 0


def visit(maker: TileMaker, forward: Counting, row: int, backward: Counting | None, column: int) -> None:
    """Compute one tile and count it.

    Args:
        maker: Of tiles.
        forward: Counts the items of block `column` of its gallery for the queries of block `row`.
        backward: Counts the tile the other way round: its queries are `forward`'s gallery, its gallery the queries.
    """
    sides = []
    if forward.wants(row):
        sides.append((forward, row, column, False))
    if backward is not None and backward.wants(column):
        sides.append((backward, column, row, True))
    if sides:
        dtype = max((counting.dtypes[block] for counting, block, _, _ in sides), key=lambda each: each.itemsize)
        tile = maker.tile(forward.queries.block(row), forward.gallery.block(column), dtype)
        for counting, block, other, by_column in sides:
            counting.take(tile, block, other, by_column=by_column)


def count_far(
    maker: TileMaker, ranks: ReferenceRanks, far: Tensor, vectors: Tensor, own_index: Tensor | None, gallery: Items
) -> Tensor:
    """Items ahead of the first references of queries, by comparing and adding up.

    Args:
        maker: Of tiles.
        ranks: References of the queries.
        far: (f,) positions of up to `BLOCK` queries with a reference.
        vectors: (f, D) their unit vectors.
        own_index: (f,) gallery index of each query itself; None: none is in the gallery.
        gallery: Items.
    Returns:
        (f,) int64 number of items of other classes.
    """
    rows, count, dtype = Vectors(exact=padded(vectors)), torch.zeros_like(far), torch.float32
    for block in range(gallery.num_blocks):
        part = Items(gallery.block(block), gallery.labels[block * BLOCK :][:BLOCK], gallery.first_index + block * BLOCK)
        found = None
        while found is None:
            tile = maker.tile(rows, part.vectors, dtype)
            found = _count_tile(ranks, far, tile, vectors, own_index, part)
            dtype = FINER[dtype] if found is None else dtype
        count += found
    return count


def _count_tile(
    ranks: ReferenceRanks, far: Tensor, tile: Tile, vectors: Tensor, own_index: Tensor | None, items: Items
) -> Tensor | None:
    """The part of `count_far` in one block of items; None where the tile leaves too many pairs open."""
    position = ranks.offset[far]
    score, index = ranks.score[position], ranks.index[position]
    scores = tile.scores[: len(far)]
    if own_index is not None:
        own = own_index - items.first_index
        here = ((own >= 0) & (own < len(items))).nonzero().squeeze(1)
        scores[here, own[here]] = -torch.inf
    scores[:, len(items) :] = -torch.inf
    if scores.dtype == torch.float64:
        # None of the query's class is ahead of its first reference.
        places = torch.arange(items.first_index, items.first_index + scores.shape[1], device=far.device)
        return _count_rows(
            (scores > score.unsqueeze(1)) | ((scores == score.unsqueeze(1)) & (places < index.unsqueeze(1)))
        )
    error = tile.row_error[: len(far)].double()
    above = scores >= _float_from_above(score + error).unsqueeze(1)
    is_open = (scores >= -_float_from_above(error - score).unsqueeze(1)) ^ above
    count = _count_rows(above)
    if int(_count_rows(is_open).sum()) > CROWDED:
        return None
    query, item = _true_places(is_open)
    others = ranks.labels[far[query]] != items.labels[item]
    query, item = query[others], item[others]
    exact = pair_scores(vectors, items.vectors.exact, query, item)
    ahead = (exact > score[query]) | ((exact == score[query]) & (item + items.first_index < index[query]))
    return count.index_add_(0, query[ahead], torch.ones_like(query[ahead]))


def _float_from_above(values: Tensor) -> Tensor:
    """The float32 next above float64 values."""
    return torch.nextafter(values.float(), torch.full_like(values, torch.inf, dtype=torch.float32))


def _count_rows(mask: Tensor) -> Tensor:
    """(rows,) int64 true entries of up to `BLOCK` columns: bytes are added eight at a time, no sum exceeds 255."""
    lanes = mask.view(torch.int64).sum(dim=1, keepdim=True)
    return lanes.view(torch.uint8).sum(dim=1, dtype=torch.int64)


def at_least_by_row(scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of (T, w) that reach the limits (T,) of their rows.

    Few do: the largest of every `_GROUP` entries, w / `_GROUP` apart, are looked at first, which is one pass over the
    scores at the speed of memory.
    """
    scores, limits = _comparable(scores, limits)
    groups = scores.unflatten(1, (_GROUP, -1))
    row, column = _true_places(groups.amax(dim=1) >= limits.unsqueeze(1))
    found = (groups[row, :, column] >= limits[row].unsqueeze(1)).nonzero()
    return row[found[:, 0]], found[:, 1] * groups.shape[2] + column[found[:, 0]]


def _at_least_by_column(scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of (h, T) that reach the limits (T,) of their columns; as by row."""
    scores, limits = _comparable(scores, limits)
    groups = scores.unflatten(0, (-1, _GROUP))
    row, column = _true_places(groups.amax(dim=1) >= limits)
    found = (groups[row, :, column] >= limits[column].unsqueeze(1)).nonzero()
    return row[found[:, 0]] * _GROUP + found[:, 1], column[found[:, 0]]


def _comparable(scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """The same as integers where that is faster: bits of positive numbers are ordered like them, and all bits of
    negative ones are below."""
    if scores.dtype == torch.bfloat16 and bool((limits > 0).all()):
        return scores.view(torch.int16), limits.view(torch.int16)
    return scores, limits


def _true_places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the true entries of a contiguous mask whose width is a multiple of 8.

    Few are true: eight are looked at together, as one integer.
    """
    words = mask.view(torch.int64).flatten().nonzero().squeeze(1)
    found = mask.view(-1, 8)[words].nonzero()
    place = words[found[:, 0]] * 8 + found[:, 1]
    return place // mask.shape[1], place % mask.shape[1]
