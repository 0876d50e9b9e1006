"""Unit vectors on a fixed-point grid: the cosine of two of them has exactly one value.

Entries are multiples of 2^-26. The product of two is a multiple of 2^-52, and no sum of such products exceeds the
product of the norms, which is 1 up to rounding: in float64 every step of every inner product is exact. So a score does
not depend on the order of summation, hence not on chunk, tile, thread, rank or device, and equal vectors tie exactly.
The grid moves a score by about 1e-8, a third of what rounding does to a float32 product.

Shapes: n items, D embedding channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GRID = 2.0**-26
NORM_FLOOR = 1e-12
LARGEST_NORM = 1.0 + 1e-5
"""Bound of a unit vector's norm, rounding to the grid included (D up to 10^6)."""

_ROWS_PER_COPY = 512
# So few pairs that their rows stay in the cache between gathering and adding up.
_PAIRS_AT_ONCE = 512
# Pairs from which on their rows and columns are looked at: where those make few more, a product is faster.
_MANY_PAIRS, _TABLE_PER_PAIR = 1 << 15, 8


def unit_vectors(embeddings: Tensor, num_rows: int | None = None) -> Tensor:
    """L2-normalise each row, round it to the grid, and append zero rows up to `num_rows`.

    Norms are taken in float64 on rows scaled by their largest entry, so that no finite row overflows or underflows,
    and multiples of one vector become equal. Squares are added up in one order: a row becomes the same vector on every
    device and among any others. A zero row stays zero: its score with anything is 0.

    Args:
        embeddings: (n, D), finite.
        num_rows: Rows of the result, n by default.
    Returns:
        (num_rows, D) float32. Entries of 1/4 and above keep 24 bits: still multiples of the grid.
    """
    unit = embeddings.new_zeros((num_rows or len(embeddings), embeddings.shape[1]), dtype=torch.float32)
    # By slices: a float64 copy of the whole would be the largest tensor of the evaluation.
    for start in range(0, len(embeddings), _ROWS_PER_COPY):
        rows = embeddings[start : start + _ROWS_PER_COPY].to(torch.float64)
        largest = rows.abs().amax(dim=1, keepdim=True)
        rows = rows / torch.where(largest > 0, largest, 1.0)
        norm = _sums_in_one_order(rows.square()).sqrt().clamp_min(NORM_FLOOR)
        unit[start : start + len(rows)] = (rows / norm / GRID).round_() * GRID
    return unit


def _sums_in_one_order(values: Tensor) -> Tensor:
    """(n, 1) sums of (n, D) values, which are overwritten: halves are added until one column is left."""
    width = values.shape[1]
    while width > 1:
        half = (width + 1) // 2
        values[:, : width - half] += values[:, half:width]
        width = half
    return values[:, :1]


def pair_scores(queries: Tensor, gallery: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Exact scores of listed pairs.

    Args:
        queries: (q, D) unit vectors.
        gallery: (g, D) unit vectors.
        rows, columns: (m,) int64, the pairs.
    Returns:
        (m,) float64.
    """
    if len(rows) > _MANY_PAIRS:
        (row, at_row), (column, at_column) = _listed(rows, len(queries)), _listed(columns, len(gallery))
        if len(row) * len(column) <= _TABLE_PER_PAIR * len(rows):
            return all_scores(queries[row], gallery[column])[at_row, at_column]
    found = torch.empty(len(rows), dtype=torch.float64, device=queries.device)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        found[part] = torch.linalg.vecdot(queries[rows[part]].double(), gallery[columns[part]].double())
    return found


def _listed(numbers: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The numbers below `limit` that are listed, ascending, and for each entry of the list its place among them."""
    present = torch.zeros(limit, dtype=torch.bool, device=numbers.device)
    present[numbers] = True
    return present.nonzero().squeeze(1), (present.cumsum(0) - 1)[numbers]


def all_scores(queries: Tensor, gallery: Tensor) -> Tensor:
    """Exact scores of all pairs: (q, D) and (g, D) unit vectors to (q, g) float64."""
    return queries.double() @ gallery.double().t()


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and reduced sums inside, as error bounds of products assume; put them back on leaving."""
    matmul = torch.backends.cuda.matmul
    backends = (matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    reduced = matmul.allow_bf16_reduced_precision_reduction
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        matmul.allow_bf16_reduced_precision_reduction = False
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        matmul.allow_bf16_reduced_precision_reduction = reduced
