"""The index of one shard: a `.npy` table with one row per sample, in tar order.

It lets a reader fetch any sample with one ranged read, without scanning the tar. Ten million rows
take 280 MB, so tables are mapped into memory: all processes of a machine share one copy.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.manifest import ShardInfo
from gcahng.errors import DataError

KEY_DIGITS = 9
TAR_BLOCK = 512
INDEX_DTYPE = np.dtype(
    [
        ("key", "<u4"),  # the sample's number; written with KEY_DIGITS digits in the tar
        ("class_id", "<i4"),
        ("crc32", "<u4"),  # of the image's encoded bytes
        ("block", "<u4"),  # the image's first byte in the tar, in blocks of TAR_BLOCK bytes
        ("length", "<u4"),  # bytes of the image
        ("meta_block", "<u4"),  # the same of the sample's JSON member
        ("meta_length", "<u4"),
    ]
)
_REPAIR = "Restore the file or convert the data set again."


class IndexRow(NamedTuple):
    """Where one sample lies in its tar; fields as in `INDEX_DTYPE`."""

    key: int
    class_id: int
    crc32: int
    block: int
    length: int
    meta_block: int
    meta_length: int

    @property
    def offset(self) -> int:
        """First byte of the encoded image in the tar."""
        return self.block * TAR_BLOCK

    @property
    def meta_offset(self) -> int:
        """First byte of the JSON member's content in the tar."""
        return self.meta_block * TAR_BLOCK


def key_text(key: int) -> str:
    """The sample's key as the tar's member names spell it: `key_text(123) == "000000123"`."""
    return f"{key:0{KEY_DIGITS}d}"


def encode_index(rows: Sequence[tuple[int, ...]]) -> bytes:
    """The bytes of an index file.

    Args:
        rows: One tuple per sample, fields as in `INDEX_DTYPE`.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=INDEX_DTYPE), allow_pickle=False)
    return buffer.getvalue()


def load_index(path: Path, shard: ShardInfo) -> NDArray[np.void]:
    """Map and check the index of `shard`; reads all of it once.

    Returns:
        Read-only table of dtype `INDEX_DTYPE`, shape (shard.num_samples,), over the mapped file.

    Raises:
        DataError: The file is missing or differs from what the manifest says.
    """
    try:
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None
    if got != shard.index_sha256:
        raise DataError(
            f"Index {path} differs from the manifest: expected sha256 {shard.index_sha256}, got {got}. {_REPAIR}"
        )
    table = map_index(path, shard)
    _check_ranges(table, path, shard)
    return table


def map_index(path: Path, shard: ShardInfo) -> NDArray[np.void]:
    """Map an index that `load_index` has checked before; looks at its size and header only.

    Raises:
        DataError: The file is missing, or is no table of the right size.
    """
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise _unreadable(path, error) from None
    except Exception as error:  # numpy evaluates the header, and raises what its parts please
        raise DataError(f"Index {path} is not a .npy table ({error}). {_REPAIR}") from None
    if not isinstance(table, np.memmap):  # numpy opens zip archives too
        raise DataError(f"Index {path} is not a .npy table (got {type(table).__name__}). {_REPAIR}")
    if table.dtype != INDEX_DTYPE or table.shape != (shard.num_samples,):
        raise DataError(
            f"Index {path}: expected {shard.num_samples} rows of {INDEX_DTYPE}, "
            f"got shape {table.shape} of {table.dtype}. {_REPAIR}"
        )
    # A plain array over the same memory: numpy's memmap class costs microseconds at every access.
    plain: NDArray[np.void] = table.view(np.ndarray)
    return plain


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"Index {path} cannot be read ({error.strerror}). {_REPAIR}")


def _check_ranges(table: NDArray[np.void], path: Path, shard: ShardInfo) -> None:
    for block, length in (("block", "length"), ("meta_block", "meta_length")):
        start = table[block].astype(np.int64) * TAR_BLOCK
        bad = np.flatnonzero((start == 0) | (table[length] == 0) | (start + table[length] > shard.bytes))
        if bad.size:
            row = table[bad[0]]
            raise DataError(
                f"Index {path}: sample {key_text(int(row['key']))} lies outside of its shard: "
                f"expected bytes within 0..{shard.bytes}, got {block.replace('block', 'offset')} {start[bad[0]]} and "
                f"{length} {row[length]}. {_REPAIR}"
            )
