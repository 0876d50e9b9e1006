"""The index of one shard: a `.npy` table with one row per sample, in tar order.

It lets a reader fetch any sample with one ranged read, without scanning the tar.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.manifest import ShardInfo
from gcahng.errors import DataError

KEY_DIGITS = 9
INDEX_DTYPE = np.dtype(
    [
        ("key", "<i8"),  # the sample's number; written with KEY_DIGITS digits in the tar
        ("class_id", "<i4"),
        ("crc32", "<u4"),  # of the image's encoded bytes
        ("offset", "<i8"),  # of the image's encoded bytes in the tar
        ("length", "<i8"),
        ("meta_offset", "<i8"),  # of the sample's JSON member in the tar
        ("meta_length", "<i4"),
    ]
)
_REPAIR = "Restore the file or convert the data set again."


def key_text(key: int) -> str:
    """The sample's key as the tar's member names spell it: `key_text(123) == "000000123"`."""
    return f"{key:0{KEY_DIGITS}d}"


def encode_index(rows: list[tuple[int, ...]]) -> bytes:
    """The bytes of an index file.

    Args:
        rows: One tuple per sample, fields as in `INDEX_DTYPE`.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=INDEX_DTYPE), allow_pickle=False)
    return buffer.getvalue()


def load_index(path: Path, shard: ShardInfo) -> NDArray[np.void]:
    """Read and check the index of `shard`.

    Returns:
        Table of dtype `INDEX_DTYPE`, shape (shard.num_samples,).

    Raises:
        DataError: The file is missing or differs from what the manifest says.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Index {path} cannot be read ({error.strerror}). {_REPAIR}") from None
    got = hashlib.sha256(content).hexdigest()
    if got != shard.index_sha256:
        raise DataError(
            f"Index {path} differs from the manifest: expected sha256 {shard.index_sha256}, got {got}. {_REPAIR}"
        )
    try:
        table: NDArray[np.void] = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"Index {path} is not a .npy table ({error}). {_REPAIR}") from None
    if table.dtype != INDEX_DTYPE or table.shape != (shard.num_samples,):
        raise DataError(
            f"Index {path}: expected {shard.num_samples} rows of {INDEX_DTYPE}, "
            f"got shape {table.shape} of {table.dtype}. {_REPAIR}"
        )
    _check_ranges(table, path, shard)
    return table


def _check_ranges(table: NDArray[np.void], path: Path, shard: ShardInfo) -> None:
    for start, length in (("offset", "length"), ("meta_offset", "meta_length")):
        end = table[start] + table[length]
        bad = np.flatnonzero((table[start] < 0) | (table[length] <= 0) | (end > shard.bytes))
        if bad.size:
            row = table[bad[0]]
            raise DataError(
                f"Index {path}: sample {key_text(int(row['key']))} lies outside of its shard: "
                f"expected bytes within 0..{shard.bytes}, got {start} {row[start]} and "
                f"{length} {row[length]}. {_REPAIR}"
            )
