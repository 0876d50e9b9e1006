"""Rank what was embedded: splits of a shard folder, or plain tars, by the protocol of the configuration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from gcahng.distributed.agreement import agreed
from gcahng.distributed.rows import rows_on_first
from gcahng.errors import ConfigError, DataError
from gcahng.metrics import RetrievalResult
from gcahng.models import Embedder
from gcahng.training.config import EvalConfig
from gcahng.training.embedding import EmbeddedTars, EmbeddingSettings, embed_part, embed_rows, embed_tars
from gcahng.training.evaluation_checks import CoarseLabels, check_answerable, check_evaluation, gallery_splits
from gcahng.training.protocols import EmbeddedSet, Evaluation, search_sets
from gcahng.training.saved_embeddings import NamedEmbeddings, check_target, save_embeddings

__all__ = [
    "EmbeddingSettings",
    "Evaluation",
    "TarSets",
    "as_row",
    "check_evaluation",
    "embed_rows",
    "evaluate",
    "evaluate_tars",
    "recall_at_1",
    "usable_ks",
]


@dataclass(frozen=True)
class TarSets:
    """Plain tars to evaluate.

    Attributes:
        query: Paths or URLs, see `gcahng.data.tars.locations.find_tars`; every image queries all the others.
        gallery: Those that are searched instead, whatever the protocol of the run.
        label_field: Field of `.json` that holds the class, see `gcahng.data.tars.labels.read_label`.
        distractors: Those that are searched as well and show none of the queries' classes; they need no labels.
    """

    query: Sequence[str | Path]
    gallery: Sequence[str | Path] | None = None
    label_field: str | None = None
    distractors: Sequence[str | Path] | None = None


def evaluate(
    model: Embedder,
    shards: ShardSet,
    config: EvalConfig,
    settings: EmbeddingSettings,
    *,
    rows: NDArray[np.int64] | None = None,
    num_neighbours: int = 0,
    save_to: Path | None = None,
    keep_embeddings: bool = False,
    ranks: Ranks = ONE,
) -> Evaluation:
    """Retrieval metrics of a split (or of the given rows, by self-retrieval), ranked on the model's device.

    With several ranks each embeds a part and ranks with it: the same metrics on each, and those of one process.

    Args:
        config: Protocol, splits and ks.
        rows: Rows to search among themselves instead of the configured splits.
        num_neighbours: Nearest neighbours to return per query.
        save_to: Write the embeddings to this file, see `save_embeddings`; on rank 0. Distractors are left out.
        keep_embeddings: Return the embeddings, on rank 0.
        ranks: All of them call this.
    Raises:
        ConfigError: See `check_evaluation`; or the file cannot be written.
        DataError: An image is unreadable.
        TrainingError: An embedding is not finite.
    """
    if save_to is not None:
        _check_saving(save_to, config, ranks)
    split = config.split if rows is None else "rows"
    rows_of = {split: shards.split_samples(config.split) if rows is None else rows}
    if rows is None:
        names = gallery_splits(config)
        rows_of |= {name: shards.split_samples(name) for name in (*names, *config.distractor_splits)}
    else:
        names, config = (), _among_themselves(config, len(rows))
    coarse = None if config.coarse_label is None else CoarseLabels(shards, config.coarse_label)
    sets = {name: _embedded_rows(model, shards, found, settings, coarse, ranks) for name, found in rows_of.items()}
    galleries: dict[str, EmbeddedSet | None] = {name: sets[name] for name in names} or {split: None}
    distractors = [sets[name] for name in config.distractor_splits]
    return _searched(
        sets[split],
        galleries,
        distractors,
        config,
        settings,
        lambda class_id: shards.classes[class_id].name,
        num_neighbours=num_neighbours,
        save_to=save_to,
        keep_embeddings=keep_embeddings,
        ranks=ranks,
    )


def evaluate_tars(
    model: Embedder,
    tars: TarSets,
    config: EvalConfig,
    settings: EmbeddingSettings,
    *,
    num_neighbours: int = 0,
    save_to: Path | None = None,
    keep_embeddings: bool = False,
    ranks: Ranks = ONE,
) -> Evaluation:
    """Retrieval metrics of plain WebDataset tars, which need no manifest and no index.

    Args:
        tars: What to embed.
        config: ks, and whether there must be a gallery (protocol `query_gallery`); its splits and labels are of shard
            folders and play no part.
        num_neighbours: Nearest neighbours to return per query.
        save_to: Write the embeddings to this file, see `save_embeddings`; on rank 0.
        keep_embeddings: Return the embeddings, on rank 0.
        ranks: All of them call this; each reads its share of the tars.
    Raises:
        ConfigError: The protocol asks for a gallery that is missing; or a k exceeds what a query can find.
        DataError: See `embed_tars`; or a tar comes twice, labels of query and gallery are of different kinds, or
            nothing can be found.
    """
    config = replace(config, gallery_split=None, galleries=(), distractor_splits=(), coarse_label=None)
    if save_to is not None:
        _check_saving(save_to, config, ranks)
    if config.protocol == "query_gallery" and tars.gallery is None:
        raise ConfigError(
            "`eval.protocol` is query_gallery: expected a gallery (--gallery-tars) beside the tars. Name it, or let "
            'the tars search each other: eval.protocol=self eval.gallery_split=null "eval.galleries=[]".'
        )
    # A wrong path is found now, and one that would be searched by itself.
    agreed(ranks, lambda: find_tars([*tars.query, *(tars.gallery or ()), *(tars.distractors or ())]))
    query = embed_tars(model, tars.query, settings, tars.label_field, ranks=ranks)
    gallery = None if tars.gallery is None else embed_tars(model, tars.gallery, settings, tars.label_field, ranks=ranks)
    ids, gallery_ids, names = _joint_labels(query, gallery)
    strangers = []
    if tars.distractors is not None:
        found = embed_tars(model, tars.distractors, settings, labelled=False, ranks=ranks)
        strangers.append(_of_tars(found, torch.zeros(len(found.labels), dtype=torch.int64)))
    searched = (ids if gallery_ids is None else gallery_ids).numpy()
    more = sum(map(len, strangers))
    check_answerable(ids.numpy(), searched, config, "the tars", excluded=int(gallery is None), more=more)
    return _searched(
        _of_tars(query, ids),
        {"tars": None if gallery is None or gallery_ids is None else _of_tars(gallery, gallery_ids)},
        strangers,
        config,
        settings,
        str if names is None else names.__getitem__,
        num_neighbours=num_neighbours,
        save_to=save_to,
        keep_embeddings=keep_embeddings,
        ranks=ranks,
    )


def _searched(
    query: EmbeddedSet,
    galleries: Mapping[str, EmbeddedSet | None],
    distractors: Sequence[EmbeddedSet],
    config: EvalConfig,
    settings: EmbeddingSettings,
    class_name: Callable[[int], str],
    *,
    num_neighbours: int,
    save_to: Path | None,
    keep_embeddings: bool,
    ranks: Ranks,
) -> Evaluation:
    """Bring the embeddings to rank 0 where they are wanted, and search."""
    embeddings: dict[str, Tensor] = {}
    if save_to is not None or keep_embeddings:
        for name, images in (("query", query), ("gallery", next(iter(galleries.values())))):
            found = None if images is None else rows_on_first(images.embeddings, ranks)
            if found is not None:
                embeddings[name] = found
    if save_to is not None:
        agreed(ranks, lambda: _save(save_to, query, galleries, embeddings, class_name) if ranks.first else None)
    if not keep_embeddings:
        embeddings = {}
    # Ranked where the model is: only all embeddings together need the memory there.
    results, coarse = search_sets(
        query, galleries, distractors, config, device=settings.device, ranks=ranks, num_neighbours=num_neighbours
    )
    return Evaluation(
        results=results,
        coarse=coarse,
        query=query,
        galleries=dict(galleries),
        class_name=class_name,
        embeddings=embeddings,
    )


def _save(
    path: Path,
    query: EmbeddedSet,
    galleries: Mapping[str, EmbeddedSet | None],
    embeddings: Mapping[str, Tensor],
    class_name: Callable[[int], str],
) -> None:
    gallery = next(iter(galleries.values()))
    named = None if gallery is None else _named(gallery, embeddings["gallery"])
    save_embeddings(path, _named(query, embeddings["query"]), named, class_name)


def _embedded_rows(
    model: Embedder,
    shards: ShardSet,
    rows: NDArray[np.int64],
    settings: EmbeddingSettings,
    coarse: CoarseLabels | None,
    ranks: Ranks,
) -> EmbeddedSet:
    labels = torch.from_numpy(np.asarray(shards.class_ids(rows), dtype=np.int64))
    return EmbeddedSet(
        embed_part(model, shards, rows, settings, ranks),
        labels,
        lambda place: shards.key(int(rows[place])),
        lambda place: shards.shard_name(int(rows[place])),
        None if coarse is None else coarse.of(labels),
    )


def _of_tars(found: EmbeddedTars, ids: Tensor) -> EmbeddedSet:
    return EmbeddedSet(found.embeddings, ids, found.keys.__getitem__, found.tars.__getitem__)


def _named(images: EmbeddedSet, embeddings: Tensor) -> NamedEmbeddings:
    places = range(len(images))
    return NamedEmbeddings(embeddings, images.labels, [*map(images.key, places)], [*map(images.shard, places)])


def _check_saving(save_to: Path, config: EvalConfig, ranks: Ranks) -> None:
    """What the file cannot hold, and where it cannot be."""
    if len(config.galleries) > 1:
        raise ConfigError(
            f"`--save-embeddings` {save_to} holds one gallery, but eval.galleries names {len(config.galleries)}. Give "
            "one: eval.galleries=[NAME]."
        )
    agreed(ranks, lambda: check_target(save_to) if ranks.first else None)


def _among_themselves(config: EvalConfig, count: int) -> EvalConfig:
    """The configuration for given rows: self-retrieval, with the ks that so few images can answer."""
    return replace(
        config,
        ks=usable_ks(config.ks, count - 1),
        precision_ks=tuple(k for k in config.precision_ks if k < count),
        distractor_splits=(),
        coarse_label=None,
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


def usable_ks(ks: tuple[int, ...], candidates: int) -> tuple[int, ...]:
    """The ks that a small validation set can answer; always at least k = 1."""
    return tuple(k for k in ks if k <= candidates) or (1,)


def recall_at_1(evaluation: Evaluation | RetrievalResult) -> float:
    """Share of the answerable queries whose nearest item is of their class, whatever ks were asked for."""
    result = evaluation.result if isinstance(evaluation, Evaluation) else evaluation
    first_hit = result.first_hit_rank[result.num_references > 0]
    return float((first_hit == 1).to(torch.float64).mean())


def as_row(evaluation: Evaluation | RetrievalResult) -> dict[str, Any]:
    """Log values: recall_at_1, ..., precision_at_1, ..., r_precision, map_at_r, mrr, counts.

    With a coarser label also coarse_recall_at_1, ...; with several galleries first the values of the first one, then
    those of each with its name in front, as in "small/recall_at_1".
    """
    if isinstance(evaluation, RetrievalResult):
        return _values(evaluation)
    rows = {name: _values(result) | _coarse_values(evaluation, name) for name, result in evaluation.results.items()}
    first = next(iter(rows.values()))
    if len(rows) == 1:
        return first
    return first | {f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()}


def _values(result: RetrievalResult) -> dict[str, Any]:
    return {
        **{f"recall_at_{k}": value for k, value in result.recall_at_k.items()},
        **{f"precision_at_{k}": value for k, value in result.precision_at_k.items()},
        "r_precision": result.r_precision,
        "map_at_r": result.map_at_r,
        "mrr": result.mrr,
        "num_queries": result.num_queries,
        "num_without_reference": result.num_without_reference,
    }


def _coarse_values(evaluation: Evaluation, name: str) -> dict[str, Any]:
    if name not in evaluation.coarse:
        return {}
    coarse = evaluation.coarse[name]
    recalls = {f"coarse_recall_at_{k}": value for k, value in coarse.recall_at_k.items()}
    return recalls | {"num_coarse_queries": coarse.num_queries}
