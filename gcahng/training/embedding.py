"""From images to embeddings: rows of a shard folder, or plain tars.

With several ranks each embeds its contiguous part of the rows, and all of them get all embeddings.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.images.transforms import normalise
from gcahng.data.ranks import rank_part
from gcahng.data.shards.reader import ShardSet
from gcahng.data.tars.loader import TarBatch, restore_order, tar_loader
from gcahng.distributed import ONE, Ranks
from gcahng.distributed.agreement import agreed
from gcahng.errors import DataError, TrainingError
from gcahng.models import Embedder

log = logging.getLogger(__name__)


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


@dataclass(frozen=True, eq=False)
class EmbeddedTars:
    """Embeddings of the images of plain tars, in the order of the tars.

    Attributes:
        embeddings: (n, D) float32, on the CPU.
        labels: (n,) numbers or names, as the tars spell them.
        keys: (n,) key of each sample, unique in its tar.
        tars: (n,) path or URL of each sample's tar.
    """

    embeddings: Tensor
    labels: list[int | str]
    keys: list[str]
    tars: list[str]


def embed_rows(
    model: Embedder,
    shards: ShardSet,
    rows: NDArray[np.int64],
    settings: EmbeddingSettings,
    ranks: Ranks = ONE,
) -> tuple[Tensor, Tensor]:
    """Embeddings (n, D) float32 and class ids (n,) of the rows, in their order, on the CPU of every rank.

    Args:
        model: The metric model, the same on every rank.
        shards: Where the images are.
        rows: (n,) the same on every rank, at least one.
        settings: How images become embeddings.
        ranks: Who embeds a part of the rows.
    Raises:
        DataError: An image is unreadable, on whichever rank.
        TrainingError: An embedding is not finite, on whichever rank; the message names the sample.
    """
    embeddings = agreed(ranks, lambda: _own_embeddings(model, shards, rows, settings, ranks))
    labels = torch.from_numpy(np.asarray(shards.class_ids(rows), dtype=np.int64))
    return _of_all_ranks(embeddings, len(rows), ranks, model.embedding_dim), labels


def _own_embeddings(
    model: Embedder, shards: ShardSet, rows: NDArray[np.int64], settings: EmbeddingSettings, ranks: Ranks
) -> Tensor:
    """(n_r, D) embeddings of this rank's part of the rows; it may have none."""
    loader = eval_loader(
        shards,
        rows,
        transform=settings.transform,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        rank=ranks.rank,
        world_size=ranks.size,
        pin_memory=settings.device.type == "cuda",
    )
    embeddings = [torch.empty(0, model.embedding_dim)]
    with _evaluating(model):
        for images, _, batch_rows in _shown(loader, settings):
            embeddings.append(_embed(model, images, settings, [shards.key(row) for row in batch_rows.tolist()]))
    return torch.cat(embeddings)


def _of_all_ranks(own: Tensor, count: int, ranks: Ranks, dim: int) -> Tensor:
    """(count, D) all ranks' rows in the order of ranks, exchanged between CPUs; parts differ by one row at most."""
    if ranks.size == 1:
        return own
    parts = [rank_part(count, rank, ranks.size) for rank in range(ranks.size)]
    sizes = [part.stop - part.start for part in parts]
    padded = own.new_zeros(max(sizes), dim)
    padded[: own.shape[0]] = own
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=ranks.host_group)
    return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])


def embed_tars(
    model: Embedder,
    locations: str | Path | Sequence[str | Path],
    settings: EmbeddingSettings,
    label_field: str | None = None,
) -> EmbeddedTars:
    """Embeddings of all images of plain WebDataset tars.

    Args:
        model: The metric model.
        locations: Paths or URLs, see `gcahng.data.tars.locations.find_tars`.
        settings: How images become embeddings.
        label_field: Field of `.json` that holds the class, see `gcahng.data.tars.labels.read_label`.
    Raises:
        DataError: A tar is damaged, an image unreadable, a label missing, or there is no image at all.
        TrainingError: An embedding is not finite; the message names the sample.
    """
    loader = tar_loader(
        locations,
        settings.transform,
        settings.batch_size,
        settings.num_workers,
        rank=0,
        world_size=1,
        label_field=label_field,
        pin_memory=settings.device.type == "cuda",
    )
    embeddings: list[Tensor] = []
    batches: list[TarBatch] = []
    with _evaluating(model):
        for batch in _shown(loader, settings):
            embeddings.append(_embed(model, batch.images, settings, batch.keys))
            batches.append(batch._replace(images=torch.empty(0)))  # the pixels are not needed any more
    passed_over = ", ".join(f"{n} x {extension}" for extension, n in sorted(loader.counts.passed_over.items()))
    if not batches:
        raise DataError(
            f"{len(loader.tars)} tars have no images, the first is {loader.tars[0].location} (members passed over: "
            f"{passed_over or 'none'}). Check the path."
        )
    if passed_over:
        log.info("Members of the tars that were passed over: %s.", passed_over)
    order = torch.cat([batch.order for batch in batches])
    ordered, labels, keys, numbers = restore_order(
        order,
        torch.cat(embeddings),
        [label for batch in batches for label in batch.labels],
        [key for batch in batches for key in batch.keys],
        order[:, 0],
    )
    return EmbeddedTars(ordered, labels, keys, [loader.tars[number].location for number in numbers.tolist()])


@contextmanager
def _evaluating(model: Embedder) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _shown(loader: Any, settings: EmbeddingSettings) -> Any:
    return tqdm(loader, desc="embed", unit="batch", leave=False, disable=not settings.progress)


def _embed(model: Embedder, images: Tensor, settings: EmbeddingSettings, keys: Sequence[str]) -> Tensor:
    """Embeddings (b, D) float32 of a batch, on the CPU; `keys` name its images."""
    inputs = normalise(images.to(settings.device, non_blocking=True), settings.transform)
    with torch.autocast(settings.device.type, dtype=settings.matmul_dtype, enabled=settings.matmul_dtype is not None):
        embeddings: Tensor = model(inputs).float().cpu()
    bad = ~torch.isfinite(embeddings).all(1)
    if bool(bad.any()):
        raise TrainingError(
            f"{int(bad.sum())} embeddings of a batch are not finite, the first of sample "
            f"{keys[int(bad.nonzero()[0])]}. The checkpoint diverged, or the image holds no finite values."
        )
    return embeddings
