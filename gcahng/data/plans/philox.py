"""Words of many streams at once.

`gcahng.data.draws.stream` makes one generator at a time, which takes longer than the few
words that a small class needs. Here the same words are computed for all classes of a batch together.
"""

import numpy as np
from numpy.typing import NDArray

from gcahng.data.draws import Purpose

Words = NDArray[np.uint64]
Coordinate = NDArray[np.int64] | int

_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)  # Philox 4x64, as in NumPy
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD_MASK = (1 << 64) - 1
_HALF = np.uint64(32)
_HALF_MASK = np.uint64((1 << 32) - 1)
_PER_BLOCK = 4


def stream_words(
    seed: int, purpose: Purpose, counts: NDArray[np.int64], a: Coordinate, b: Coordinate, c: Coordinate
) -> Words:
    """The first words of several streams, one stream per row.

    Args:
        seed: Seed of the run.
        purpose: What is drawn.
        counts: (n,) words of each stream.
        a: First coordinate of each stream, (n,) or one for all; so are the others.
        b: Second coordinate.
        c: Third coordinate.
    Returns:
        (n, counts.max()) words: row i begins with `stream(seed, purpose, a[i], b[i],
        c[i]).random_raw(counts[i])`; behind them stand words of the largest value.
    """
    width = int(counts.max(initial=0))
    blocks = -(-counts // _PER_BLOCK)
    rows = np.repeat(np.arange(counts.size), blocks)
    number = np.arange(rows.size) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    counter = [number.astype(np.uint64) + np.uint64(1)]  # NumPy steps the counter before it draws
    counter += [np.broadcast_to(np.asarray(x, np.uint64), counts.shape)[rows] for x in (a, b, c)]
    drawn = _philox(counter, seed, int(purpose))
    words = np.full((counts.size, -(-width // _PER_BLOCK), _PER_BLOCK), _WORD_MASK, np.uint64)
    words[rows, number] = np.stack(drawn, axis=1)
    flat = words.reshape(counts.size, words.shape[1] * _PER_BLOCK)[:, :width]
    flat[np.arange(width) >= counts[:, None]] = _WORD_MASK
    return flat


def row_permutations(words: Words) -> NDArray[np.int64]:
    """The order that each row's words put 0..counts[i]-1 in; behind it stand the remaining places."""
    return np.argsort(words, axis=1, kind="stable")


def _philox(counter: list[Words], *key: int) -> list[Words]:
    c0, c1, c2, c3 = counter
    for step in range(_ROUNDS):
        k0, k1 = (np.uint64((k + step * advance) & _WORD_MASK) for k, advance in zip(key, _KEY_STEPS, strict=True))
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return [c0, c1, c2, c3]


def _product(x: Words, factor: int) -> tuple[Words, Words]:
    """Higher and lower word of `x * factor`."""
    low, high = x & _HALF_MASK, x >> _HALF
    factor_low, factor_high = np.uint64(factor & 0xFFFFFFFF), np.uint64(factor >> 32)
    middle = high * factor_low + ((low * factor_low) >> _HALF)
    carry = low * factor_high + (middle & _HALF_MASK)
    return high * factor_high + (middle >> _HALF) + (carry >> _HALF), x * np.uint64(factor)
