"""Embed a split and rank it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.images.transforms import normalise
from gcahng.data.shards.reader import ShardSet
from gcahng.errors import ConfigError, DataError, TrainingError
from gcahng.metrics import RetrievalResult, retrieval
from gcahng.models import Embedder
from gcahng.training.config import EvalConfig


@dataclass(frozen=True)
class EmbeddingSettings:
    """How images become embeddings.

    Attributes:
        transform: Image transforms.
        batch_size: Images at once.
        num_workers: Processes that decode.
        device: Where the model is.
        matmul_dtype: Autocast dtype, None for fp32.
        progress: Show a bar.
    """

    transform: TransformSettings
    batch_size: int
    num_workers: int
    device: torch.device
    matmul_dtype: torch.dtype | None = None
    progress: bool = False


@torch.no_grad()
def embed_rows(
    model: Embedder, shards: ShardSet, rows: NDArray[np.int64], settings: EmbeddingSettings
) -> tuple[Tensor, Tensor]:
    """Embeddings (n, D) float32 and class ids (n,) of the rows, in their order, on the CPU.

    Raises:
        DataError: An image is unreadable.
        TrainingError: An embedding is not finite; the message names the sample.
    """
    was_training = model.training
    model.eval()
    loader = eval_loader(
        shards,
        rows,
        transform=settings.transform,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        pin_memory=settings.device.type == "cuda",
    )
    embeddings, labels = [], []
    try:
        for images, class_ids, batch_rows in tqdm(
            loader, desc="embed", unit="batch", leave=False, disable=not settings.progress
        ):
            inputs = normalise(images.to(settings.device, non_blocking=True), settings.transform)
            enabled = settings.matmul_dtype is not None
            with torch.autocast(settings.device.type, dtype=settings.matmul_dtype, enabled=enabled):
                z = model(inputs).float().cpu()
            bad = ~torch.isfinite(z).all(1)
            if bool(bad.any()):
                key = shards.key(int(batch_rows[bad][0]))
                raise TrainingError(
                    f"{int(bad.sum())} embeddings of a batch are not finite, the first of sample {key}. "
                    "The checkpoint diverged, or the image holds no finite values."
                )
            embeddings.append(z)
            labels.append(class_ids)
    finally:
        model.train(was_training)
    return torch.cat(embeddings), torch.cat(labels)


def evaluate(
    model: Embedder,
    shards: ShardSet,
    config: EvalConfig,
    settings: EmbeddingSettings,
    *,
    rows: NDArray[np.int64] | None = None,
    num_neighbours: int = 0,
) -> RetrievalResult:
    """Retrieval metrics of a split (or of the given rows, by self-retrieval), ranked on the model's device.

    Args:
        config: Protocol, split and ks.
        rows: Rows to search among themselves instead of the configured split.
        num_neighbours: Nearest neighbours to return per query.
    """
    if rows is not None or config.protocol == "self":
        chosen = shards.split_samples(config.split) if rows is None else rows
        query, labels = _embed_on_device(model, shards, chosen, settings)
        ks = usable_ks(config.ks, len(query) - 1) if rows is not None else config.ks
        return retrieval(query, labels, ks=ks, chunk_size=config.chunk_size, num_neighbours=num_neighbours)
    gallery_rows = _gallery_rows(shards, config)
    query, labels = _embed_on_device(model, shards, shards.split_samples(config.split), settings)
    gallery, gallery_labels = _embed_on_device(model, shards, gallery_rows, settings)
    return retrieval(
        query,
        labels,
        gallery,
        gallery_labels,
        ks=config.ks,
        chunk_size=config.chunk_size,
        num_neighbours=num_neighbours,
    )


def _embed_on_device(
    model: Embedder, shards: ShardSet, rows: NDArray[np.int64], settings: EmbeddingSettings
) -> tuple[Tensor, Tensor]:
    """`embed_rows`, moved to where the model is: only all of them together need the memory there."""
    embeddings, labels = embed_rows(model, shards, rows, settings)
    return embeddings.to(settings.device), labels.to(settings.device)


def check_evaluation(shards: ShardSet, config: EvalConfig) -> None:
    """Refuse before training what an evaluation would refuse after an epoch of it.

    Raises:
        DataError: A split does not exist, or no query has an image of its class to find.
        ConfigError: A k exceeds what a query can find.
    """
    query = shards.class_id[shards.split_samples(config.split)]
    gallery, excluded = query, 1
    if config.protocol == "query_gallery":
        gallery, excluded = shards.class_id[_gallery_rows(shards, config)], 0
    if config.ks[-1] > len(gallery) - excluded:
        raise ConfigError(
            f"`eval.ks` must not exceed what a query can find: expected at most {len(gallery) - excluded}, got "
            f"{config.ks[-1]}. Drop the larger ones."
        )
    classes, counts = np.unique(gallery, return_counts=True)
    if not np.isin(query, classes[counts > excluded]).any():
        raise DataError(
            f"No image of split {config.split!r} has another image of its class to find. Check eval.split and "
            "eval.gallery_split, or add images."
        )


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
