"""Which rows of the edge buffer a pass computes, and which ordered edges each row stands for.

Without dropout, or with one mask per unordered pair, a row of a mirrored chunk stands for both directions. With masks
per direction the two directions differ after the first layer wherever their masks differ (about a third of the pairs
at probability 0.1): those reverse edges get rows of their own behind the plan's chunks, the others share.

Shapes: n block pairs of b x b edges, D channels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.kernels import EagerKernels
from gcahng.graph.pairs import PairChunk, PairPlan

# Up to here the dropout factors of a whole layer are drawn together: a hundred small operations once, not per chunk.
ROWS_DRAWN_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ChunkRows:
    """What the rows of one chunk stand for.

    Attributes:
        chunk: The rows.
        mirror: (n, b, b) bool, which rows of a mirrored chunk stand for the reverse edge too; None if all do.
        reverse: Rows of the edge buffer that hold the other reverse edges, in the order of the False entries of
            `mirror`; None if there are none.
    """

    chunk: PairChunk
    mirror: Tensor | None = None
    reverse: slice | None = None


@dataclass(frozen=True)
class EdgeLayout:
    """The rows of one pass.

    Attributes:
        plan: The block pairs.
        parts: The plan's chunks.
        extra: Chunks of single reverse edges, each 1 x 1, anchor first.
        dropout: Law of the attention masks; None for none.
    """

    plan: PairPlan
    parts: tuple[ChunkRows, ...]
    extra: tuple[PairChunk, ...]
    dropout: EdgeDropout | None
    _drawn: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        return self.plan.num_rows + sum(chunk.num_rows for chunk in self.extra)

    def all_rows(self) -> list[ChunkRows]:
        """The plan's chunks, then the extra ones."""
        return [*self.parts, *(ChunkRows(chunk) for chunk in self.extra)]

    def masks(self, part: ChunkRows, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """(n, b, b) factors of the chunk's rows in the sums of its first and of its second nodes.

        1 where the row stands for the edge that the node is the anchor of; None for ones throughout. The sums of a
        chunk's second nodes do not exist if it is not mirrored.
        """
        valid = self.plan.valid_ends(part.chunk, dtype)
        to_first = to_second = None
        if valid is not None:
            real = valid[0][:, :, None] * valid[1][:, None, :]
            to_first = to_second = real
        if part.mirror is not None:
            mirrored = part.mirror.to(dtype)
            to_second = mirrored if to_second is None else to_second * mirrored
        return to_first, to_second

    def weights(self, part: ChunkRows, dtype: torch.dtype) -> Tensor | float:
        """How many ordered edges each row stands for: (n, b, b), or one number for all."""
        to_first, to_second = self.masks(part, dtype)
        if not part.chunk.mirrored:
            return 1.0 if to_first is None else to_first
        if to_first is None and to_second is None:
            return 2.0
        return (1.0 if to_first is None else to_first) + (1.0 if to_second is None else to_second)

    def keep_scales(
        self, chunk: PairChunk, layer: int, dtype: torch.dtype, kernels: EagerKernels | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """(n, b, b) dropout factors of the weights of first and second node; None without dropout."""
        if self.dropout is None:
            return None
        if self.num_rows > ROWS_DRAWN_AT_ONCE:
            return self.dropout.scales(*_samples(self.plan, chunk), layer, dtype, kernels)
        if (layer, dtype) not in self._drawn:
            ends_of = [_samples(self.plan, part.chunk) for part in self.all_rows()]
            first, second = (
                torch.cat([each[side].expand(-1, *_grid(each)).reshape(-1, 1, 1) for each in ends_of])
                for side in (0, 1)
            )
            drawn = self.dropout.scales(first, second, layer, dtype, kernels)
            self._drawn[layer, dtype] = drawn[0].flatten(), drawn[1].flatten()
        first, second = self._drawn[layer, dtype]
        return chunk.of(first), chunk.of(second)

    def directions(self, part: ChunkRows, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values of the chunk's ordered edges: anchors first (n, b, b, ...), and anchors second, None if diagonal.

        Entry [k, i, j] of either belongs to nodes i of block first[k] and j of block second[k].
        """
        forward = part.chunk.of(buffer)
        if not part.chunk.mirrored:
            return forward, None
        if part.mirror is None or part.reverse is None:
            return forward, forward
        backward = forward.clone()
        backward[~part.mirror] = buffer[part.reverse]
        return forward, backward

    def add_directions(self, part: ChunkRows, forward: Tensor, backward: Tensor | None, into: Tensor) -> None:
        """Write to the edge buffer `into` the gradient of its rows, from those of `directions`."""
        rows = part.chunk.of(into)
        if backward is None:
            rows.copy_(forward)
        elif part.mirror is None or part.reverse is None:
            rows.copy_(forward + backward)
        else:
            apart = ~part.mirror
            into[part.reverse] = backward[apart].to(into.dtype)
            rows.copy_(forward + backward.masked_fill(apart[..., None], 0.0))


def edge_layout(plan: PairPlan, dropout: EdgeDropout | None, num_layers: int) -> EdgeLayout:
    """The rows that a pass over `num_layers` layers needs: one set for all layers.

    A reverse edge gets its own row if its masks differ in any layer.
    """
    if dropout is None or dropout.tied:
        return EdgeLayout(plan, tuple(ChunkRows(chunk) for chunk in plan.chunks), (), dropout)
    parts: list[ChunkRows] = []
    extra: list[PairChunk] = []
    start = plan.num_rows
    for chunk in plan.chunks:
        if not chunk.mirrored:
            parts.append(ChunkRows(chunk))
            continue
        mirror = _same_masks(plan, chunk, dropout, num_layers)
        k, i, j = torch.nonzero(~mirror, as_tuple=True)
        anchors, others = chunk.second[k] * chunk.block_size + j, chunk.first[k] * chunk.block_size + i
        extra.append(PairChunk(anchors, others, 1, start, False))
        parts.append(ChunkRows(chunk, mirror, extra[-1].rows))
        start += anchors.numel()
    return EdgeLayout(plan, tuple(parts), tuple(extra), dropout)


def _grid(ends_of: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """(b, b) of what `_samples` gives."""
    return ends_of[0].shape[1], ends_of[1].shape[2]


def _samples(plan: PairPlan, chunk: PairChunk) -> tuple[Tensor, Tensor]:
    samples = plan.order.view(-1, chunk.block_size)
    return samples[chunk.first][:, :, None], samples[chunk.second][:, None, :]


def _same_masks(plan: PairPlan, chunk: PairChunk, dropout: EdgeDropout, num_layers: int) -> Tensor:
    first, second = _samples(plan, chunk)
    same: Tensor | None = None
    for layer in range(num_layers):
        of_first, of_second = dropout.scales(first, second, layer, torch.float32)
        back_second, back_first = dropout.scales(second, first, layer, torch.float32)
        alike = (of_first == back_first) & (of_second == back_second)
        same = alike if same is None else same & alike
    assert same is not None
    return same
