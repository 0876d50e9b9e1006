"""Counts images that occur more than once, byte by byte, over a whole set.

Per image 16 bytes of a digest, its class and its side are looked at, as arrays: 10 million images take half a GB.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.index import TAR_BLOCK, load_index, map_index
from gcahng.data.shards.manifest import ShardInfo
from gcahng.data.sources.source import TRAIN

DIGEST_BYTES = 16
NUM_EXAMPLES = 5


def image_digest(image: bytes) -> bytes:
    """What two images have in common if, and only if, their bytes are equal."""
    return hashlib.blake2b(image, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class Duplicates:
    """Rows that repeat the bytes of another row.

    Attributes:
        within_class: Pairs (rows, 2): an earlier image of the same class and side, and the repetition.
        across_classes: An image of another class of the same side, and the repetition: one of the labels is wrong.
        across_splits: An image of train, and one of another split that repeats it: the test is not of unseen images.
    """

    within_class: NDArray[np.int64]
    across_classes: NDArray[np.int64]
    across_splits: NDArray[np.int64]


def find_duplicates(
    digests: NDArray[np.uint64], class_ids: NDArray[np.integer[Any]], is_train: NDArray[np.bool_]
) -> Duplicates:
    """Find repetitions. Train is one side, all other splits together are the other.

    Args:
        digests: (N, 2) halves of the images' digests.
        class_ids: (N,).
        is_train: (N,).
    Returns:
        Pairs of rows, sorted by the repetition.
    """
    rows = _rows_of_repeated(digests[:, 0])
    keys = (rows, class_ids[rows], ~is_train[rows], digests[rows, 1], digests[rows, 0])
    rows = rows[np.lexsort(keys)]
    first, second = rows[:-1], rows[1:]
    same_bytes = (digests[first] == digests[second]).all(axis=1)
    same_side = same_bytes & (is_train[first] == is_train[second])
    same_class = same_side & (class_ids[first] == class_ids[second])
    # Train comes first among equal bytes, so the first of them tells whether train has the image.
    positions = np.arange(len(first))
    leader = rows[np.maximum.accumulate(np.where(same_bytes, 0, positions + 1))]
    leaked = same_bytes & is_train[leader] & ~is_train[second]
    return Duplicates(
        within_class=_pairs(first, second, same_class),
        across_classes=_pairs(first, second, same_side & ~same_class),
        across_splits=_pairs(leader, second, leaked),
    )


def count_duplicates(directory: Path, shards: Sequence[ShardInfo], digests_path: Path) -> dict[str, Any]:
    """What `Manifest.extra["duplicates"]` says.

    Args:
        directory: Where the tars and indexes are.
        shards: The tars.
        digests_path: File with the digest of every image, in the order of the tars.
    Returns:
        Counts "within_class", "across_classes" and "across_splits", and "examples": a few of each kind, as
        {"kind", "images": [two of {"class", "split", "source"}]}.
    """
    digests = np.fromfile(digests_path, dtype="<u8").astype(np.uint64, copy=False).reshape(-1, 2)
    starts = np.cumsum([0] + [shard.num_samples for shard in shards])
    class_ids = np.empty(len(digests), dtype=np.int32)
    is_train = np.empty(len(digests), dtype=np.bool_)
    for shard, start, end in zip(shards, starts, starts[1:], strict=False):
        class_ids[start:end] = load_index(directory / shard.index_name, shard)["class_id"]
        is_train[start:end] = shard.split == TRAIN
    found = find_duplicates(digests, class_ids, is_train)
    kinds = {name: getattr(found, name) for name in ("within_class", "across_classes", "across_splits")}
    examples = [
        {"kind": kind, "images": [_describe(directory, shards, starts, int(row)) for row in pair]}
        for kind, pairs in kinds.items()
        for pair in pairs[:NUM_EXAMPLES]
    ]
    return {**{kind: len(pairs) for kind, pairs in kinds.items()}, "examples": examples}


def _rows_of_repeated(halves: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rows whose first half occurs twice or more: the few that the careful comparison looks at."""
    order = np.argsort(halves)
    same = halves[order[1:]] == halves[order[:-1]]
    repeated = np.zeros(len(halves), dtype=np.bool_)
    repeated[order[1:][same]] = True
    repeated[order[:-1][same]] = True
    return np.flatnonzero(repeated)


def _pairs(first: NDArray[np.int64], second: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    pairs = np.stack([first[chosen], second[chosen]], axis=1)
    return pairs[np.argsort(pairs[:, 1], kind="stable")]


def _describe(
    directory: Path, shards: Sequence[ShardInfo], starts: NDArray[np.integer[Any]], row: int
) -> dict[str, str]:
    place = int(np.searchsorted(starts, row, side="right")) - 1
    entry = map_index(directory / shards[place].index_name, shards[place])[row - int(starts[place])]
    with (directory / shards[place].name).open("rb") as file:
        file.seek(int(entry["meta_block"]) * TAR_BLOCK)
        meta = json.loads(file.read(int(entry["meta_length"])))
    return {"class": meta["class_name"], "split": meta["split"], "source": meta["source"]}
