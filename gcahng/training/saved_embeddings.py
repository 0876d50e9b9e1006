"""Embeddings as a file for other tools: a plain `.npz` of numbers and texts, without pickled objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gcahng.data.shards.reader import ShardSet
from gcahng.errors import ConfigError
from gcahng.training.output_files import check_output, whole_file

_OPTION = "--save-embeddings"


@dataclass(frozen=True, eq=False)
class NamedEmbeddings:
    """What is written of n images.

    Attributes:
        embeddings: (n, D) float32.
        labels: (n,) int64 class ids.
        keys: (n,) key of each sample, unique in its tar.
        shards: (n,) tar of each sample.
    """

    embeddings: Tensor
    labels: Tensor
    keys: Sequence[str]
    shards: Sequence[str]

    @staticmethod
    def of_rows(embedded: tuple[Tensor, Tensor], shards: ShardSet, rows: NDArray[np.int64]) -> "NamedEmbeddings":
        """Embeddings and class ids of rows, with their keys."""
        numbers = rows.tolist()
        return NamedEmbeddings(
            *embedded, [shards.key(row) for row in numbers], [shards.shard_name(row) for row in numbers]
        )


def check_target(path: Path) -> None:
    """Refuse, before anything is embedded, a file that cannot be written afterwards.

    Raises:
        ConfigError: It is no `.npz`, or see `check_output`.
    """
    if path.suffix != ".npz":
        raise ConfigError(f"`{_OPTION}` {path}: expected a name that ends in .npz. Rename it.")
    check_output(_OPTION, path)


def save_embeddings(
    path: Path, query: NamedEmbeddings, gallery: NamedEmbeddings | None, class_name: Callable[[int], str]
) -> None:
    """Write embeddings; the file appears when it is whole.

    Arrays: `embeddings` (n, D) float32, `labels` (n,) int64, `keys` and `shards` (n,) text, the same with `gallery_`
    before each where another set is searched, and `class_ids` (C,) int64 with `class_names` (C,) text.

    Args:
        path: A name that ends in `.npz`.
        query: All images, or those that search.
        gallery: Those that are searched.
        class_name: Name of a class id.
    Raises:
        ConfigError: See `check_target`; or the disk is full or read-only.
    """
    check_target(path)
    arrays: dict[str, Any] = {}
    found: set[int] = set()
    for prefix, images in (("", query), ("gallery_", gallery)):
        if images is None:
            continue
        arrays |= {
            f"{prefix}embeddings": images.embeddings.numpy(),
            f"{prefix}labels": images.labels.numpy(),
            f"{prefix}keys": np.array(images.keys, dtype=np.str_),
            f"{prefix}shards": np.array(images.shards, dtype=np.str_),
        }
        found |= set(images.labels.tolist())
    class_ids = sorted(found)
    arrays["class_ids"] = np.array(class_ids, dtype=np.int64)
    arrays["class_names"] = np.array([class_name(class_id) for class_id in class_ids], dtype=np.str_)
    with whole_file(_OPTION, path) as file:
        np.savez(file, **arrays)
