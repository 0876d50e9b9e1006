"""What an evaluation needs of a data set, found out before a model is trained or an image embedded."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcahng.data.shards.reader import ShardSet
from gcahng.errors import ConfigError, DataError
from gcahng.training.config import EvalConfig
from gcahng.training.protocols import NO_COARSE_LABEL


class CoarseLabels:
    """Numbers for the values of a column of the classes, the same for every split.

    Args:
        shards: Whose classes.
        column: Name of the column.
    """

    def __init__(self, shards: ShardSet, column: str) -> None:
        self._classes = shards.classes
        self._column = column
        self._numbers: dict[str, int] = {}

    def of(self, class_ids: Tensor) -> Tensor:
        """(n,) int64 coarser labels of (n,) class ids, `NO_COARSE_LABEL` for classes without."""
        distinct, place = class_ids.unique(return_inverse=True)
        return torch.tensor([self._number(class_id) for class_id in distinct.tolist()], dtype=torch.int64)[place]

    def _number(self, class_id: int) -> int:
        value = self._classes[class_id].columns.get(self._column)
        return NO_COARSE_LABEL if value is None else self._numbers.setdefault(value, len(self._numbers))


def gallery_splits(config: EvalConfig) -> tuple[str, ...]:
    """The splits that are searched; none where the queries search each other.

    Raises:
        ConfigError: The protocol needs one, and none is named.
    """
    if config.protocol == "self":
        return ()
    if config.galleries:
        return config.galleries
    if config.gallery_split is None:
        raise ConfigError("`eval.gallery_split` is missing: protocol query_gallery searches a second split.")
    return (config.gallery_split,)


def check_evaluation(shards: ShardSet, config: EvalConfig) -> None:
    """Refuse before training what an evaluation would refuse after an epoch of it.

    Raises:
        DataError: A split does not exist, no query has an image of its class to find, or none has one of its coarser
            label.
        ConfigError: A k exceeds what a query can find, or distractors show classes of the queries.
    """
    query = shards.class_ids(shards.split_samples(config.split))
    strangers = [shards.class_ids(shards.split_samples(name)) for name in config.distractor_splits]
    for name, labels in zip(config.distractor_splits, strangers, strict=True):
        shared = np.intersect1d(query, labels)
        if shared.size:
            raise ConfigError(
                f"`eval.distractor_splits` must show none of the queries' classes: {name!r} and {config.split!r} share "
                f"{shared.size}, the first is {shards.classes[int(shared[0])].name!r}. Search that split as a gallery, "
                "or leave it out."
            )
    more = sum(labels.size for labels in strangers)
    names = gallery_splits(config)
    for name in names or (config.split,):
        gallery = shards.class_ids(shards.split_samples(name)) if names else query
        where = f" in gallery {name!r}" if len(names) > 1 else ""
        check_answerable(
            query, gallery, config, f"split {config.split!r}", excluded=int(not names), more=more, where=where
        )
        if config.coarse_label is not None:
            _check_coarse(shards, config, config.coarse_label, query, gallery)


def check_answerable(
    query: NDArray[np.int64],
    gallery: NDArray[np.int64],
    config: EvalConfig,
    what: str,
    *,
    excluded: int,
    more: int = 0,
    where: str = "",
) -> None:
    """Refuse ks that no query can answer, and queries of which none can.

    Args:
        query: Class ids of the images that search.
        gallery: Class ids of those that are searched, the distractors left out.
        config: ks.
        what: The queries, for messages.
        excluded: Images of the gallery that a query does not find: 1 where it is in it, else 0.
        more: Distractors.
        where: Which gallery, for messages.
    Raises:
        ConfigError, DataError: See `check_evaluation`.
    """
    bound = len(gallery) + more - excluded
    for key, ks in _all_ks(config):
        if ks and ks[-1] > bound:
            raise ConfigError(
                f"`eval.{key}` must not exceed what a query can find{where}: expected at most {bound}, got {ks[-1]}. "
                "Drop the larger ones."
            )
    classes, counts = np.unique(gallery, return_counts=True)
    if not np.isin(query, classes[counts > excluded]).any():
        tars, splits = "--tars, --gallery-tars and --label-field", "eval.split and eval.gallery_split"
        repair = tars if what == "the tars" else splits
        raise DataError(
            f"No image of {what} has another image of its class to find{where}. Check {repair}, or add images."
        )


def _all_ks(config: EvalConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "ks", config.ks
    yield "precision_ks", config.precision_ks
    if config.coarse_label is not None:
        yield "coarse_ks", config.coarse_ks


def _check_coarse(
    shards: ShardSet, config: EvalConfig, column: str, query: NDArray[np.int64], gallery: NDArray[np.int64]
) -> None:
    labels = CoarseLabels(shards, column)
    wanted = labels.of(torch.from_numpy(np.unique(query)))
    found = labels.of(torch.from_numpy(np.unique(gallery)))
    if not bool(torch.isin(wanted[wanted >= 0], found).any()):
        known = sorted(shards.classes[int(query[0])].columns)
        raise DataError(
            f"`eval.coarse_label` {column!r}: no class of split {config.split!r} has that column with a value that the "
            f"gallery has too; the first class has the columns {known}. Name one of them, or set it to null."
        )
