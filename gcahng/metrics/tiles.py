"""Scores of two blocks of unit vectors, computed fast, with a bound of their error.

A tile tells which pairs may matter; what they score exactly is computed for those alone
(`gcahng.metrics.unit_vectors.pair_scores`). Where float32 leaves too many open, as between embeddings that are all
alike, a tile in float64 is exact itself. Blocks have one size; the last one of a set is padded with zeros, and only to
a multiple of `STEP`, so that few items cost little.

The bound. Let q, g be unit vectors and q', g' what is multiplied (the same in float32; rounded to bfloat16):
  |q.g - q'.g'| <= |q - q'| |g| + |q'| |g - g'|             (Cauchy-Schwarz, the norms are measured)
  |q'.g' - computed| <= gamma |q'| |g'|, gamma = n u / (1 - n u)   (n terms in any order, unit roundoff u of the sums)
  |computed - stored| <= u_b |stored|                        (rounding of the result to bfloat16)

Shapes: T items of a block (`BLOCK`, or what is left), D channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.metrics.unit_vectors import LARGEST_NORM

BLOCK, STEP = 1536, 64
# Rounding of the sums: to nearest on CPUs; tensor cores cut off, and align products to the largest one.
_SUM_ROUNDOFF = {"cpu": 2.0**-24, "cuda": 2.0**-21}
_BF16_ROUNDOFF = 2.0**-8
_UNDERFLOW = 1e-30


FINER = {torch.bfloat16: torch.float32, torch.float32: torch.float64, torch.float64: torch.float64}
"""What to compute tiles in where another leaves too many pairs open."""


def padded_count(count: int) -> int:
    """Rows that so many items take up."""
    return -(-count // STEP) * STEP


def padded(vectors: Tensor) -> Tensor:
    """(n, D) vectors, zero rows behind them."""
    return torch.nn.functional.pad(vectors, (0, 0, 0, padded_count(len(vectors)) - len(vectors)))


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than those of float32 there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Unit vectors in the forms that tiles need; views of rows share memory with the whole.

    Attributes:
        exact: (rows, D) float32 unit vectors, rows a multiple of `STEP`.
        low: (rows, D) bfloat16; None to compute in float32 only.
        rounding: (rows,) float32 upper bounds of |exact - low|; None without `low`.
    """

    exact: Tensor
    low: Tensor | None = None
    rounding: Tensor | None = None

    @classmethod
    def of(cls, exact: Tensor, *, low: bool) -> "Vectors":
        """Round unit vectors for tiles."""
        if not low:
            return cls(exact=exact)
        rounded = exact.to(torch.bfloat16)
        rounding = exact.new_empty(len(exact))
        for start in range(0, len(exact), BLOCK):
            part = slice(start, start + BLOCK)
            distance = torch.linalg.vector_norm(exact[part].double() - rounded[part].double(), dim=1)
            rounding[part] = distance * (1 + 1e-6)
        return cls(exact=exact, low=rounded, rounding=rounding)

    @property
    def coarsest(self) -> torch.dtype:
        """What tiles can be computed in at least."""
        return torch.float32 if self.low is None else torch.bfloat16

    def rows(self, start: int, stop: int) -> "Vectors":
        """A view of some rows."""
        return Vectors(
            exact=self.exact[start:stop],
            low=None if self.low is None else self.low[start:stop],
            rounding=None if self.rounding is None else self.rounding[start:stop],
        )


@dataclass(frozen=True)
class Tile:
    """Computed scores of a block of rows with a block of columns.

    Attributes:
        scores: (T, T) bfloat16, float32 or float64; only valid until the next tile.
        row_error: (T,) float32 bound of the error of every score of a row, the rounding of the result left out.
        column_error: (T,) float32, the same of a column.
        stored_roundoff: Relative bound of the rounding of the result.
    """

    scores: Tensor
    row_error: Tensor
    column_error: Tensor
    stored_roundoff: float


class TileMaker:
    """Computes tiles into memory of its own, used again for every tile."""

    def __init__(self, device: torch.device) -> None:
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._roundoff = _SUM_ROUNDOFF.get(device.type, _SUM_ROUNDOFF["cuda"])

    def tile(self, rows: Vectors, columns: Vectors, dtype: torch.dtype) -> Tile:
        """Scores of two blocks.

        Args:
            rows, columns: Up to `BLOCK` vectors each.
            dtype: Of the product: bfloat16 of vectors that have this form, float32, or float64, which is exact.
        """
        if dtype == torch.bfloat16:
            assert rows.low is not None and columns.low is not None
            left, right = rows.low, columns.low
        else:
            left, right = rows.exact.to(dtype), columns.exact.to(dtype)
        if left.dtype not in self._scratch:
            self._scratch[left.dtype] = left.new_empty(BLOCK * BLOCK)
        scores = self._scratch[left.dtype][: len(left) * len(right)].view(len(left), len(right))
        torch.mm(left, right.t(), out=scores)  # with `out`, autocast leaves a product alone
        roundoff = _BF16_ROUNDOFF if dtype == torch.bfloat16 else 0.0
        return Tile(scores, self._error(rows, columns, dtype), self._error(columns, rows, dtype), roundoff)

    def _error(self, own: Vectors, other: Vectors, dtype: torch.dtype) -> Tensor:
        """(T,) bound for each vector of `own` with any of `other`."""
        if dtype == torch.float64:
            return own.exact.new_zeros(len(own.exact))
        terms = own.exact.shape[1] * self._roundoff
        computed = terms / (1 - terms) * (LARGEST_NORM + 0.01) ** 2 + _UNDERFLOW
        if dtype == torch.float32:
            return own.exact.new_full((len(own.exact),), computed)
        assert own.rounding is not None and other.rounding is not None
        return own.rounding * LARGEST_NORM + (LARGEST_NORM + own.rounding) * other.rounding.amax() + computed


def computed_limits(tile: Tile, wanted: Tensor, error: Tensor) -> Tensor:
    """What a tile shows at least where the exact score reaches what is wanted.

    Args:
        tile: Of scores.
        wanted: (n,) float64 exact scores, n <= T.
        error: (T,) the tile's error by row or by column.
    Returns:
        (T,) in the type of the tile's scores; infinite from n on.
    """
    least = wanted - error[: len(wanted)].double()
    least = torch.where(least > 0, least / (1 + tile.stored_roundoff), least / (1 - tile.stored_roundoff))
    limits = tile.scores.new_full((len(error),), torch.inf)
    rounded = least.to(limits.dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    limits[: len(wanted)] = torch.where(rounded.double() > least, below, rounded)
    return limits
