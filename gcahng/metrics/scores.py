"""Cosine scores in tiles of one fixed shape.

The score of a pair has to be the same bits for any chunk size, number of threads and place in the
gallery: only then do duplicate images tie exactly, and only then can a search that is split up be
merged without changing a rank. Matrix products round differently at the ragged edges of a matrix,
so every product here has one shape, and the rest of a last tile is zero.

Shapes: G gallery items, D embedding channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Multiples of 48: the register blocks of the common CPU kernels (4 to 48 wide, float32 and
# float64) divide them, also after the split over threads, so no pair falls on an edge. 2048
# columns, say, are not enough: their last 8 float64 scores differ in the last bit.
TILE_ROWS = 192
TILE_COLUMNS = 1536

NORM_FLOOR = 1e-12
_ROWS_PER_COPY = 4096


def round_up(count: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def normalise(embeddings: Tensor, num_rows: int) -> Tensor:
    """L2-normalise each row and append zero rows up to `num_rows`.

    Norms are taken in float64 on rows scaled by their largest entry, so that no finite row
    overflows or underflows, and multiples of one vector become equal. A zero row stays zero: its
    score with anything is 0.

    Args:
        embeddings: (items, D), finite.
        num_rows: Rows of the result.

    Returns:
        (num_rows, D); float64 for float64 input, float32 otherwise.
    """
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    unit = embeddings.new_zeros((num_rows, embeddings.shape[1]), dtype=dtype)
    # By slices: a float64 copy of the whole would be the largest tensor of the evaluation.
    for start in range(0, len(embeddings), _ROWS_PER_COPY):
        rows = embeddings[start : start + _ROWS_PER_COPY].to(torch.float64)
        largest = rows.abs().amax(dim=1, keepdim=True)
        rows = rows / torch.where(largest > 0, largest, 1.0)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(NORM_FLOOR)
        unit[start : start + len(rows)] = rows / norm
    return unit


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and bf16 products off inside; they reorder close neighbours.

    Training commonly runs with them on. The settings of the process are put back on leaving.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def score_rows(unit_queries: Tensor, unit_gallery: Tensor, out: Tensor) -> None:
    """Write the scores of some queries with the whole gallery into `out`, tile by tile.

    Args:
        unit_queries: (rows, D), rows a multiple of `TILE_ROWS`.
        unit_gallery: (columns, D), columns a multiple of `TILE_COLUMNS`.
        out: (rows, columns), overwritten.
    """
    for top in range(0, len(unit_queries), TILE_ROWS):
        rows = unit_queries[top : top + TILE_ROWS]
        for left in range(0, len(unit_gallery), TILE_COLUMNS):
            columns = unit_gallery[left : left + TILE_COLUMNS]
            tile = out[top : top + TILE_ROWS, left : left + TILE_COLUMNS]
            # With `out`, autocast leaves a product alone.
            torch.mm(rows, columns.t(), out=tile)
