"""Rank what was embedded: splits of a shard folder, or plain tars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcahng.data.shards.reader import ShardSet
from gcahng.data.tars.labels import label_ids
from gcahng.data.tars.locations import find_tars
from gcahng.distributed import ONE, Ranks
from gcahng.errors import ConfigError, DataError
from gcahng.metrics import RetrievalResult, retrieval
from gcahng.models import Embedder
from gcahng.training.config import EvalConfig
from gcahng.training.embedding import EmbeddedTars, EmbeddingSettings, embed_rows, embed_tars
from gcahng.training.saved_embeddings import NamedEmbeddings, check_target, save_embeddings

__all__ = [
    "EmbeddingSettings",
    "TarSets",
    "as_row",
    "check_evaluation",
    "embed_rows",
    "evaluate",
    "evaluate_tars",
    "recall_at_1",
    "usable_ks",
]

Embedded = tuple[Tensor, Tensor]
"""Embeddings (n, D) and class ids (n,)."""


@dataclass(frozen=True)
class TarSets:
    """Plain tars to evaluate.

    Attributes:
        query: Paths or URLs, see `gcahng.data.tars.locations.find_tars`; every image queries all the others.
        gallery: Those that are searched instead (protocol `query_gallery`).
        label_field: Field of `.json` that holds the class, see `gcahng.data.tars.labels.read_label`.
    """

    query: Sequence[str | Path]
    gallery: Sequence[str | Path] | None = None
    label_field: str | None = None


def evaluate(
    model: Embedder,
    shards: ShardSet,
    config: EvalConfig,
    settings: EmbeddingSettings,
    *,
    rows: NDArray[np.int64] | None = None,
    num_neighbours: int = 0,
    save_to: Path | None = None,
    ranks: Ranks = ONE,
) -> RetrievalResult:
    """Retrieval metrics of a split (or of the given rows, by self-retrieval), ranked on the model's device.

    With several ranks each embeds a part, and every rank ranks all of it: the same result on each.

    Args:
        config: Protocol, split and ks.
        rows: Rows to search among themselves instead of the configured split.
        num_neighbours: Nearest neighbours to return per query.
        save_to: Write the embeddings to this file, see `save_embeddings`; on rank 0.
        ranks: Who embeds.
    """
    if save_to is not None:
        check_target(save_to)
    ks, gallery_rows = config.ks, None
    if rows is not None:
        query_rows = rows
        ks = usable_ks(config.ks, len(rows) - 1)
    else:
        query_rows = shards.split_samples(config.split)
        if config.protocol == "query_gallery":
            gallery_rows = _gallery_rows(shards, config)
    query = embed_rows(model, shards, query_rows, settings, ranks)
    gallery = None if gallery_rows is None else embed_rows(model, shards, gallery_rows, settings, ranks)
    if save_to is not None and ranks.first:
        named = NamedEmbeddings.of_rows(query, shards, query_rows)
        searched = None
        if gallery is not None and gallery_rows is not None:
            searched = NamedEmbeddings.of_rows(gallery, shards, gallery_rows)
        save_embeddings(save_to, named, searched, lambda class_id: shards.classes[class_id].name)
    return _rank(query, gallery, ks, config, settings, num_neighbours)


def evaluate_tars(
    model: Embedder,
    tars: TarSets,
    config: EvalConfig,
    settings: EmbeddingSettings,
    *,
    num_neighbours: int = 0,
    save_to: Path | None = None,
) -> RetrievalResult:
    """Retrieval metrics of plain WebDataset tars, which need no manifest and no index.

    Args:
        tars: What to embed.
        config: Protocol and ks; its splits are of shard folders and play no part.
        num_neighbours: Nearest neighbours to return per query.
        save_to: Write the embeddings to this file, see `save_embeddings`.
    Raises:
        ConfigError: The protocol asks for a gallery that is missing, or has no use for the one given; or a k exceeds
            what a query can find.
        DataError: See `embed_tars`; or labels of query and gallery are of different kinds, or nothing can be found.
    """
    if save_to is not None:
        check_target(save_to)
    if (config.protocol == "query_gallery") != (tars.gallery is not None):
        want = "a gallery (--gallery-tars)" if tars.gallery is None else "no gallery"
        raise ConfigError(
            f"`eval.protocol` is {config.protocol}: expected {want} beside the tars. Change one of them "
            "(eval.protocol=self or eval.protocol=query_gallery)."
        )
    if tars.gallery is not None:
        find_tars(tars.gallery)  # a wrong path is found now, not after the queries
    query = embed_tars(model, tars.query, settings, tars.label_field)
    gallery = None if tars.gallery is None else embed_tars(model, tars.gallery, settings, tars.label_field)
    ids, gallery_ids, names = _joint_labels(query, gallery)
    _check_answerable(ids.numpy(), None if gallery_ids is None else gallery_ids.numpy(), config.ks, "the tars")
    if save_to is not None:
        searched = None
        if gallery is not None and gallery_ids is not None:
            searched = NamedEmbeddings(gallery.embeddings, gallery_ids, gallery.keys, gallery.tars)
        named = NamedEmbeddings(query.embeddings, ids, query.keys, query.tars)
        save_embeddings(save_to, named, searched, str if names is None else names.__getitem__)
    pair = None if gallery is None or gallery_ids is None else (gallery.embeddings, gallery_ids)
    return _rank((query.embeddings, ids), pair, config.ks, config, settings, num_neighbours)


def check_evaluation(shards: ShardSet, config: EvalConfig) -> None:
    """Refuse before training what an evaluation would refuse after an epoch of it.

    Raises:
        DataError: A split does not exist, or no query has an image of its class to find.
        ConfigError: A k exceeds what a query can find.
    """
    query = shards.class_ids(shards.split_samples(config.split))
    gallery = shards.class_ids(_gallery_rows(shards, config)) if config.protocol == "query_gallery" else None
    _check_answerable(query, gallery, config.ks, f"split {config.split!r}")


def _check_answerable(
    query: NDArray[np.int64], gallery: NDArray[np.int64] | None, ks: tuple[int, ...], what: str
) -> None:
    """Class ids of the images that search, and of those that are searched if they are others."""
    searched, excluded = (query, 1) if gallery is None else (gallery, 0)
    if ks[-1] > len(searched) - excluded:
        raise ConfigError(
            f"`eval.ks` must not exceed what a query can find: expected at most {len(searched) - excluded}, got "
            f"{ks[-1]}. Drop the larger ones."
        )
    classes, counts = np.unique(searched, return_counts=True)
    if not np.isin(query, classes[counts > excluded]).any():
        repair = "--tars and --label-field" if what == "the tars" else "eval.split and eval.gallery_split"
        raise DataError(f"No image of {what} has another image of its class to find. Check {repair}, or add images.")


def _rank(
    query: Embedded,
    gallery: Embedded | None,
    ks: tuple[int, ...],
    config: EvalConfig,
    settings: EmbeddingSettings,
    num_neighbours: int,
) -> RetrievalResult:
    """Rank where the model is: only all embeddings together need the memory there."""
    device = settings.device
    return retrieval(
        query[0].to(device),
        query[1].to(device),
        None if gallery is None else gallery[0].to(device),
        None if gallery is None else gallery[1].to(device),
        ks=ks,
        chunk_size=config.chunk_size,
        num_neighbours=num_neighbours,
    )


def _joint_labels(query: EmbeddedTars, gallery: EmbeddedTars | None) -> tuple[Tensor, Tensor | None, list[str] | None]:
    """Class ids of both sets, and the names of classes that have one."""
    others = [] if gallery is None else gallery.labels
    if others and type(others[0]) is not type(query.labels[0]):
        raise DataError(
            "Labels of query and gallery must be of one kind: expected numbers in both or names in both, got "
            f"{query.labels[0]!r} and {others[0]!r}. Name the field to take (--label-field)."
        )
    ids, names = label_ids([*query.labels, *others])
    first, second = torch.from_numpy(ids).split([len(query.labels), len(others)])
    return first, (None if gallery is None else second), names


def _gallery_rows(shards: ShardSet, config: EvalConfig) -> NDArray[np.int64]:
    if config.gallery_split is None:
        raise ConfigError("`eval.gallery_split` is missing: protocol query_gallery searches a second split.")
    return shards.split_samples(config.gallery_split)


def usable_ks(ks: tuple[int, ...], candidates: int) -> tuple[int, ...]:
    """The ks that a small validation set can answer; always at least k = 1."""
    return tuple(k for k in ks if k <= candidates) or (1,)


def recall_at_1(result: RetrievalResult) -> float:
    """Share of the answerable queries whose nearest item is of their class, whatever ks were asked for."""
    first_hit = result.first_hit_rank[result.num_references > 0]
    return float((first_hit == 1).to(torch.float64).mean())


def as_row(result: RetrievalResult) -> dict[str, Any]:
    """A result as log values: recall_at_1, ..., r_precision, map_at_r, counts."""
    recalls: Mapping[str, float] = {f"recall_at_{k}": v for k, v in result.recall_at_k.items()}
    return {
        **recalls,
        "r_precision": result.r_precision,
        "map_at_r": result.map_at_r,
        "num_queries": result.num_queries,
        "num_without_reference": result.num_without_reference,
    }
