"""Ranks of references and nearest items where queries and gallery are split into parts; one part runs the same.

Every part holds a stretch of the queries and a stretch of the gallery. The queries go round: in the turn of a chunk
all parts count it against their own items, and the counts are added up. In self-retrieval the tile of two blocks
serves both, so each pair of blocks is computed once, in the turn of one of the two.

Letters: D channels, W parts, m references of a chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.metrics.counting import Counting, Items, count_far, visit
from gcahng.metrics.exchange import Exchange
from gcahng.metrics.measures import QueryMeasures, measure
from gcahng.metrics.nearest import best_of, nearest_items
from gcahng.metrics.references import ClassIndex, ReferenceRanks, ScoredReferences, counts_to_offsets, score_references
from gcahng.metrics.tiles import BLOCK, STEP, TileMaker, Vectors, padded, padded_count

_BYTES_PER_REFERENCE = 256  # its score, index and count, and what sorting and ranking need


@dataclass(frozen=True)
class Chunk:
    """Queries start..stop of those of `owner`."""

    owner: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Search:
    """One evaluation, seen from one part."""

    def __init__(
        self,
        exchange: Exchange,
        unit_queries: Tensor,
        query_labels: Sequence[Tensor],
        gallery: Items,
        gallery_labels: Sequence[Tensor],
        *,
        is_self: bool,
        memory_mb: int,
    ) -> None:
        """
        Args:
            exchange: With the other parts.
            unit_queries: (n or more, D) unit vectors of this part's queries.
            query_labels: (n_r,) int64 of each part.
            gallery: Of this part; `first_index` is that of all parts.
            gallery_labels: (g_r,) int64 of each part.
            is_self: The queries are the gallery.
            memory_mb: Working memory.
        """
        self.exchange, self.unit_queries, self.gallery = exchange, unit_queries, gallery
        self.query_labels, self.is_self, self.memory_mb = query_labels, is_self, memory_mb
        self.classes = ClassIndex.build(gallery.labels)
        self.num_items = sum(len(labels) for labels in gallery_labels)
        everything = ClassIndex.build(torch.cat(list(gallery_labels)))
        self.num_references = [everything.find(labels)[1] - int(is_self) for labels in query_labels]
        self.first_query = [0, *torch.tensor([len(labels) for labels in query_labels]).cumsum(0).tolist()]
        self.maker = TileMaker(unit_queries.device)

    @property
    def own(self) -> int:
        """Number of this part."""
        return self.exchange.part

    def measures(self, precision_ks: Sequence[int]) -> QueryMeasures:
        """Metrics, on the CPU, of all queries of all parts, in every part. Call it inside `full_precision`."""
        most = self.memory_mb * 2**20 // _BYTES_PER_REFERENCE
        depth = max(precision_ks, default=1)
        found: list[QueryMeasures | None]
        if self.is_self and all(int(counts.sum()) <= most for counts in self.num_references):
            found = [self._mutual(depth, precision_ks)]
        else:
            found = [self._one_way(chunk, depth, precision_ks) for chunk in self._chunks(most)]
        nothing = self.num_references[0].new_zeros(0)
        nobody = measure(nothing.new_zeros(1), nothing, precision_ks)  # a part may have no queries
        own = QueryMeasures.joined([nobody, *(part for part in found if part is not None)])
        device = self.unit_queries.device
        parts = [self.exchange.everyone(values.to(device)) for values in vars(own).values()]
        return QueryMeasures.joined([QueryMeasures(*(v.cpu() for v in values)) for values in zip(*parts, strict=True)])

    def nearest(self, k: int) -> tuple[Tensor, Tensor]:
        """(Q, k) float64 scores and int64 indices of all queries' nearest items, in every part."""
        scores, indices = [], []
        for chunk in self._chunks(None):
            vectors = self._vectors(chunk)
            own = nearest_items(vectors, self.gallery, k, self._own_index(chunk), memory_mb=self.memory_mb)
            parts = [self.exchange.everyone(values) for values in own]
            score, index = (torch.cat(values, dim=1) for values in parts)
            query = torch.arange(len(chunk), device=index.device).unsqueeze(1).expand_as(index)
            there = index >= 0
            best = best_of(query[there], score[there], index[there], len(chunk), k)
            scores.append(best[0])
            indices.append(best[1])
        return torch.cat(scores), torch.cat(indices)

    def _chunks(self, most_references: int | None) -> Iterator[Chunk]:
        """Chunks of at most `BLOCK` queries, and of so many references where they have more than one query."""
        for owner, counts in enumerate(self.num_references):
            total, start = counts_to_offsets(counts), 0
            while start < len(counts):
                stop = min(len(counts), start + BLOCK)
                if most_references is not None:
                    fitting = int(torch.searchsorted(total, total[start] + most_references, right=True)) - 1
                    stop = min(stop, max(start + 1, fitting))
                yield Chunk(owner, start, stop)
                start = stop

    def _vectors(self, chunk: Chunk) -> Tensor:
        """(q, D) the chunk's unit vectors, in every part."""
        own = self.unit_queries[chunk.start : chunk.stop] if chunk.owner == self.own else None
        return self.exchange.share(own, chunk.owner, (len(chunk), self.unit_queries.shape[1]), torch.float32)

    def _labels(self, chunk: Chunk) -> Tensor:
        return self.query_labels[chunk.owner][chunk.start : chunk.stop]

    def _own_index(self, chunk: Chunk) -> Tensor | None:
        """(q,) gallery index of each query of the chunk itself."""
        if not self.is_self:
            return None
        first = self.first_query[chunk.owner]
        return torch.arange(first + chunk.start, first + chunk.stop, device=self.unit_queries.device)

    def _items(self, chunk: Chunk, vectors: Tensor) -> Items:
        """The chunk's queries for tiles; in self-retrieval also as gallery items."""
        if chunk.owner == self.own and self.is_self and chunk.start % STEP == 0:
            rows = self.gallery.vectors.rows(chunk.start, chunk.start + padded_count(len(chunk)))
        else:
            rows = Vectors.of(padded(vectors), low=self.gallery.vectors.low is not None)
        return Items(rows, self._labels(chunk), self.first_query[chunk.owner] + chunk.start)

    def _depth(self, chunk: Chunk, depth: int) -> Tensor:
        return self.num_references[chunk.owner][chunk.start : chunk.stop].clamp_min(depth)

    def _references(self, chunk: Chunk, vectors: Tensor) -> ScoredReferences:
        """The chunk's references in the whole gallery."""
        own = score_references(
            vectors,
            self._labels(chunk),
            self.gallery.vectors.exact,
            self.classes,
            first_index=self.gallery.first_index,
            own_index=self._own_index(chunk),
        )
        everyone = self.exchange.everyone
        return ScoredReferences(*(torch.cat(everyone(values)) for values in (own.query, own.score, own.index)))

    def _one_way(self, chunk: Chunk, depth: int, precision_ks: Sequence[int]) -> QueryMeasures | None:
        """Count one chunk against the whole gallery; its owner gets the metrics."""
        vectors = self._vectors(chunk)
        references = self._references(chunk, vectors)
        ranks = ReferenceRanks(self._labels(chunk), references, self._depth(chunk, depth))
        counting = Counting(self._items(chunk, vectors), self.gallery, ranks)
        for block in range(self.gallery.num_blocks):
            visit(self.maker, counting, 0, None, block)
        counting.flush()
        self._add_up(ranks)
        far = ranks.far.nonzero().squeeze(1)
        if len(far):
            own_index = self._own_index(chunk)
            count = self._count_far(ranks, far, vectors[far], None if own_index is None else own_index[far])
            ranks.ahead[ranks.offset[far]] = count
        return measure(ranks.offset, ranks.ranks(), precision_ks) if chunk.owner == self.own else None

    def _add_up(self, ranks: ReferenceRanks) -> None:
        """Turn one part's counts of a chunk into those of all parts."""
        ranks.ahead = self.exchange.sum(ranks.ahead)
        ranks.far = self.exchange.sum(ranks.far.to(torch.int64)) > 0

    def _count_far(self, ranks: ReferenceRanks, far: Tensor, vectors: Tensor, own_index: Tensor | None) -> Tensor:
        return self.exchange.sum(count_far(self.maker, ranks, far, vectors, own_index, self.gallery))

    def _mutual(self, depth: int, precision_ks: Sequence[int]) -> QueryMeasures:
        """Self-retrieval: every tile counts for both of its blocks; gives this part's queries."""
        chunks = list(self._chunks(None))
        own = self._own_ranks(chunks, depth)
        backward = Counting(self.gallery, self.gallery, own)
        for number in range(len(chunks)):
            self._turn(number, chunks, own, backward)
        for owner in range(self.exchange.parts):
            self._count_far_of(owner, own)
        return measure(own.offset, own.ranks(), precision_ks)

    def _own_ranks(self, chunks: Sequence[Chunk], depth: int) -> ReferenceRanks:
        """References of this part's queries."""
        labels = self.query_labels[self.own]
        none = labels.new_empty(0)
        found = [(none, none.double(), none)]
        for chunk in chunks:
            references = self._references(chunk, self._vectors(chunk))
            if chunk.owner == self.own:
                found.append((references.query + chunk.start, references.score, references.index))
        joined = ScoredReferences(*(torch.cat(values) for values in zip(*found, strict=True)))
        return ReferenceRanks(labels, joined, self.num_references[self.own].clamp_min(depth))

    def _turn(self, number: int, chunks: Sequence[Chunk], own: ReferenceRanks, backward: Counting) -> None:
        """All parts count the tiles that are one chunk's, for the chunk and for their own queries."""
        chunk = chunks[number]
        items = self._items(chunk, self._vectors(chunk))
        ranks = self._shared_ranks(chunk, own)
        mine, block_of_chunk = chunk.owner == self.own, chunk.start // BLOCK
        forward = Counting(items, self.gallery, ranks, backward.dtypes[block_of_chunk] if mine else None)
        backward.turn_to(items)
        first = next((i for i, other in enumerate(chunks) if other.owner == self.own), 0)
        for block in range(self.gallery.num_blocks):
            other = first + block
            # Of two blocks, the first one's turn serves both where their numbers are both even or both odd.
            if other == number or ((other + number) % 2 == 0) == (number < other):
                visit(self.maker, forward, 0, None if other == number else backward, block)
        forward.flush()
        backward.flush()
        self._add_up(ranks)
        if mine:
            backward.dtypes[block_of_chunk] = forward.dtypes[0]
            own.ahead[int(own.offset[chunk.start]) : int(own.offset[chunk.stop])] += ranks.ahead
            own.far[chunk.start : chunk.stop] |= ranks.far
            own.drop(chunk.start, chunk.stop)

    def _shared_ranks(self, chunk: Chunk, own: ReferenceRanks) -> ReferenceRanks:
        """The chunk's references in every part, those dropped already left out of sight, with nothing counted yet."""
        counts = self.num_references[chunk.owner][chunk.start : chunk.stop]
        state = own.part(chunk.start, chunk.stop) if chunk.owner == self.own else None
        total, share = int(counts.sum()), self.exchange.share
        found = ScoredReferences(
            torch.arange(len(chunk), device=counts.device).repeat_interleave(counts),
            share(None if state is None else state.score, chunk.owner, (total,), torch.float64),
            share(None if state is None else state.index, chunk.owner, (total,), torch.int64),
        )
        wanted = share(None if state is None else state.wanted, chunk.owner, (len(chunk),), torch.int64)
        depth = share(None if state is None else state.depth, chunk.owner, (len(chunk),), torch.int64)
        return ReferenceRanks(self._labels(chunk), found, depth, wanted)

    def _count_far_of(self, owner: int, own: ReferenceRanks) -> None:
        """Count what is ahead of the first references of one part's far queries."""
        mine, share = owner == self.own, self.exchange.share
        device = self.unit_queries.device
        all_far = own.far.nonzero().squeeze(1) if mine else None
        count = share(
            None if all_far is None else torch.tensor([len(all_far)], device=device), owner, (1,), torch.int64
        )
        for start in range(0, int(count), BLOCK):
            size = min(BLOCK, int(count) - start)
            far = share(None if all_far is None else all_far[start : start + size], owner, (size,), torch.int64)
            position = own.offset[far] if mine else None
            vectors = self.unit_queries[far] if mine else None
            found = ScoredReferences(
                torch.arange(size, device=device),
                share(None if position is None else own.score[position], owner, (size,), torch.float64),
                share(None if position is None else own.index[position], owner, (size,), torch.int64),
            )
            ranks = ReferenceRanks(self.query_labels[owner][far], found, torch.ones_like(far))
            vectors = share(vectors, owner, (size, self.unit_queries.shape[1]), torch.float32)
            ahead = self._count_far(ranks, found.query, vectors, far + self.first_query[owner])
            if position is not None:
                own.ahead[position] = ahead
