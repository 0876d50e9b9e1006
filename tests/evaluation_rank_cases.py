"""Evaluations of several ranks in one process group, and what one process makes of the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from run_cases import make_config

from gcahng.data.shards.reader import ShardSet
from gcahng.distributed import Ranks
from gcahng.distributed.rows import contiguous_rows, rows_on_first
from gcahng.training import embedding
from gcahng.training.config import EvalConfig
from gcahng.training.evaluate_checkpoint import embedding_settings
from gcahng.training.evaluation import Evaluation, TarSets, evaluate, evaluate_tars
from gcahng.training.parts import build_metric_model

# One image at once: an embedding then does not depend on which others came with it, and results are equal in every bit.
SETTINGS = {"model.backbone_args": {"widths": [4]}, "eval.batch_size": 1}
SELF = EvalConfig(split="train", ks=(1, 5), precision_ks=(2,))
AGAINST_TRAIN = EvalConfig(protocol="query_gallery", gallery_split="train", ks=(1, 5))
PROTOCOLS = {
    "self": SELF,
    "self with distractors": replace(SELF, distractor_splits=("elsewhere",)),
    "chains": replace(AGAINST_TRAIN, coarse_label="chain_name", coarse_ks=(1, 3)),
    "galleries with distractors": replace(
        AGAINST_TRAIN, gallery_split=None, galleries=("near", "train"), ks=(1, 2), distractor_splits=("elsewhere",)
    ),
}


def failure(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def plain(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that ranks must have alike, as plain values."""
    found: dict[str, Any] = {}
    for name, result in evaluation.results.items():
        found[name] = {
            key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in vars(result).items()
        }
    return found | {"coarse": {name: vars(coarse) for name, coarse in evaluation.coarse.items()}}


def evaluations(ranks: Ranks, hotels: Path, tars: Path, folder: Path) -> dict[str, Any]:
    """Each protocol on each kind of data; `tars` holds the files that the names below say."""
    torch.set_num_threads(1)
    config = make_config(hotels, folder, SETTINGS)
    torch.manual_seed(0)
    model = build_metric_model(config.model).eval()
    settings = embedding_settings(config)
    shards = ShardSet.open(hotels)
    found: dict[str, Any] = {}
    for name, protocol in PROTOCOLS.items():
        saved = folder / f"{name}-{ranks.size}.npz" if name == "chains" else None
        result = evaluate(
            model,
            shards,
            protocol,
            settings,
            num_neighbours=3,
            save_to=saved,
            keep_embeddings=name == "self",
            ranks=ranks,
        )
        found[name] = plain(result)
        if name == "self":
            found["embeddings"] = {key: tensor.numpy() for key, tensor in result.embeddings.items()}
    query, gallery, strangers = ([str(tars / f"{name}-*.tar")] for name in ("query", "gallery", "strangers"))
    for name, sets in {
        "several tars": TarSets(gallery),
        "one tar, distractors": TarSets(query, distractors=strangers),
        "tars search tars": TarSets(query, gallery),
    }.items():
        protocol = EvalConfig(protocol="self" if sets.gallery is None else "query_gallery", ks=(1,))
        saved = folder / f"tars-{ranks.size}.npz" if sets.gallery is not None else None
        result = evaluate_tars(model, sets, protocol, settings, num_neighbours=2, save_to=saved, ranks=ranks)
        keys = [result.query.key(place) for place in range(len(result.query))]
        found[name] = plain(result) | {"keys": keys, "tars": [result.query.shard(place) for place in range(len(keys))]}
    if ranks.size > 1:
        found["mixed labels"] = failure(
            lambda: evaluate_tars(model, TarSets([str(tars / "mixed-*.tar")]), SELF, settings, ranks=ranks)
        )
        found["crashed"] = failure(lambda: crashed(ranks, model, shards, settings))
        found["rows"] = rows(ranks)
    return found


def crashed(ranks: Ranks, model: Any, shards: ShardSet, settings: Any) -> None:
    """The last rank cannot load its images."""
    loader = embedding.eval_loader

    def broken(*arguments: object, **options: object) -> Any:
        raise MemoryError("a loader process was killed")

    if ranks.rank == ranks.size - 1:
        embedding.eval_loader = broken
    try:
        evaluate(model, shards, SELF, settings, ranks=ranks)
    finally:
        embedding.eval_loader = loader


def rows(ranks: Ranks) -> dict[str, Any]:
    """Seven rows dealt in turn, rank 0 having none of three; and a place that comes twice."""
    everything = torch.arange(14.0).view(7, 2)
    places = torch.randperm(7, generator=torch.Generator().manual_seed(1))[ranks.rank :: ranks.size]
    own = contiguous_rows(everything[places], places, 7, ranks)
    few = torch.empty(0, dtype=torch.int64) if ranks.first else torch.arange(3)[ranks.rank - 1 :: ranks.size - 1]
    part = contiguous_rows(everything[few], few, 3, ranks)
    gathered = rows_on_first(part, ranks)
    return {
        "own": own.tolist(),
        "gathered": None if gathered is None else gathered.tolist(),
        "twice": failure(lambda: contiguous_rows(everything[:1], torch.zeros(1, dtype=torch.int64), 2, ranks)),
    }
