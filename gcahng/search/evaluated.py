"""What else can be said of an evaluation whose embeddings were kept: clusters, and approximate search."""

from dataclasses import asdict
from typing import Any

import torch

from gcahng.search.approximate import ApproximateIndex, check_choice, load_faiss
from gcahng.search.approximate_recall import measured_recall
from gcahng.search.clustering import agreement, clustering_scores
from gcahng.training.protocols import Evaluation

_MEASURED_K, _MEASURED_QUERIES = 10, 1000


def check_libraries(*, clustering: bool, approximate: str | None) -> None:
    """Refuse before anything is embedded what cannot be computed afterwards.

    Raises:
        InputError: A library is not installed, or there is no such kind of index.
    """
    if clustering:
        agreement(torch.arange(2), torch.arange(2))
    if approximate is not None:
        check_choice(approximate)
        load_faiss()


def clustering_row(evaluation: Evaluation) -> dict[str, Any]:
    """NMI and AMI of k-means clusters of the images that search, as log values.

    Args:
        evaluation: With `embeddings`: of rank 0.
    """
    scores = clustering_scores(evaluation.embeddings["query"], evaluation.query.labels)
    return {
        "nmi": scores.nmi,
        "ami": scores.ami,
        "num_clusters": scores.num_clusters,
        "clustering_library": scores.library,
        "clustering_initial": scores.initial,
    }


def approximate_row(evaluation: Evaluation, kind: str) -> dict[str, Any]:
    """Search the first gallery, without distractors, through an approximate index too; what it costs in recall.

    Args:
        evaluation: With `embeddings`: of rank 0.
        kind: Of index, see `gcahng.search.approximate.KINDS`.
    Returns:
        Its kind, `recall_at_1` as it finds it, and `measured`: the share of the 10 nearest that it finds, measured
        against exact search on up to 1,000 queries.
    Raises:
        InputError: The gallery is too small for this kind.
    """
    queries = evaluation.embeddings["query"]
    gallery = evaluation.embeddings.get("gallery")
    is_self = gallery is None
    searched = queries if gallery is None else gallery
    labels = evaluation.query.labels
    first = next(iter(evaluation.galleries.values()))
    gallery_labels = labels if first is None else first.labels
    index = ApproximateIndex.build(searched, kind)
    chosen = torch.linspace(0, len(queries) - 1, min(_MEASURED_QUERIES, len(queries))).long()
    k = min(_MEASURED_K, len(searched) - int(is_self))
    measured = measured_recall(index, queries[chosen], searched, k, exclude=chosen if is_self else None)
    found = index.search(queries, 1, exclude=torch.arange(len(queries)) if is_self else None).indices[:, 0]
    answerable = evaluation.result.num_references > 0
    hits = (found >= 0) & (gallery_labels[found] == labels)
    return {
        "kind": kind,
        "recall_at_1": float(hits[answerable].to(torch.float64).mean()),
        "measured": asdict(measured),
    }
