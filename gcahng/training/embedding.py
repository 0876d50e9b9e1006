"""From images to embeddings: rows of a shard folder, or plain tars.

With several ranks each embeds its part and keeps it: no rank ever holds all embeddings.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.images.transforms import normalise
from gcahng.data.shards.reader import ShardSet
from gcahng.data.tars.loader import restore_order, tar_loader
from gcahng.distributed import ONE, Ranks
from gcahng.distributed.agreement import agreed
from gcahng.distributed.rows import contiguous_rows
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
        between_batches: Called before each batch; it takes part in no collective.
    """

    transform: TransformSettings
    batch_size: int
    num_workers: int
    device: torch.device
    matmul_dtype: torch.dtype | None = None
    progress: bool = False
    between_batches: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class EmbeddedTars:
    """Embeddings of the images of plain tars, in the order of the tars.

    Attributes:
        embeddings: (n_r, D) float32, on the CPU: this rank's contiguous part; of one process (n, D).
        labels: (n,) numbers or names, as the tars spell them; the same on every rank, like those below.
        keys: (n,) key of each sample, unique in its tar.
        tars: (n,) path or URL of each sample's tar.
    """

    embeddings: Tensor
    labels: list[int | str]
    keys: list[str]
    tars: list[str]


def embed_rows(
    model: Embedder, shards: ShardSet, rows: NDArray[np.int64], settings: EmbeddingSettings
) -> tuple[Tensor, Tensor]:
    """Embeddings (n, D) float32 and class ids (n,) of the rows, in their order, on the CPU; by this process alone.

    Args:
        model: The metric model.
        shards: Where the images are.
        rows: (n,), at least one.
        settings: How images become embeddings.
    Raises:
        DataError: An image is unreadable.
        TrainingError: An embedding is not finite; the message names the sample.
    """
    labels = torch.from_numpy(np.asarray(shards.class_ids(rows), dtype=np.int64))
    return embed_part(model, shards, rows, settings), labels


def embed_part(
    model: Embedder,
    shards: ShardSet,
    rows: NDArray[np.int64],
    settings: EmbeddingSettings,
    ranks: Ranks = ONE,
) -> Tensor:
    """(n_r, D) float32 embeddings of this rank's contiguous part of the rows, in their order, on the CPU.

    Args:
        model: The metric model, the same on every rank.
        shards: Where the images are.
        rows: (n,) the same on every rank; see `gcahng.data.ranks.rank_part` for the part. It may be empty.
        settings: How images become embeddings.
        ranks: All of them call this.
    Raises:
        DataError: An image is unreadable, on whichever rank.
        TrainingError: An embedding is not finite, on whichever rank; the message names the sample.
    """
    return agreed(ranks, lambda: _own_embeddings(model, shards, rows, settings, ranks))


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
    with evaluating(model):
        for images, _, batch_rows in _shown(loader, settings):
            embeddings.append(embed_batch(model, images, settings, [shards.key(row) for row in batch_rows.tolist()]))
    return torch.cat(embeddings)


class _TarPart(NamedTuple):
    """What one rank found in the tars, without the embeddings."""

    order: Tensor  # (n_r, 2) int64, see `TarBatch.order`
    labels: list[int | str]
    keys: list[str]
    passed_over: Counter[str]


def embed_tars(
    model: Embedder,
    locations: str | Path | Sequence[str | Path],
    settings: EmbeddingSettings,
    label_field: str | None = None,
    *,
    labelled: bool = True,
    ranks: Ranks = ONE,
) -> EmbeddedTars:
    """Embeddings of all images of plain WebDataset tars.

    Args:
        model: The metric model, the same on every rank.
        locations: Paths or URLs, see `gcahng.data.tars.locations.find_tars`.
        settings: How images become embeddings.
        label_field: Field of `.json` that holds the class, see `gcahng.data.tars.labels.read_label`.
        labelled: False looks for no labels: all are 0.
        ranks: All of them call this; each reads its share of the tars.
    Raises:
        DataError: A tar is damaged, an image unreadable, a label missing, labels are numbers and names, or there is
            no image at all, on whichever rank.
        TrainingError: An embedding is not finite; the message names the sample.
    """
    embeddings, part, tars = agreed(
        ranks, lambda: _own_tars(model, locations, settings, label_field, labelled=labelled, ranks=ranks)
    )
    parts = ranks.all_of(part)
    order = torch.cat([found.order for found in parts])
    passed_over = Counter[str]()
    for found in parts:
        passed_over.update(found.passed_over)
    told = ", ".join(f"{n} x {extension}" for extension, n in sorted(passed_over.items()))
    if not len(order):
        raise DataError(
            f"{len(tars)} tars have no images, the first is {tars[0]} (members passed over: {told or 'none'}). Check "
            "the path."
        )
    if told:
        log.info("Members of the tars that were passed over: %s.", told)
    _check_one_kind([label for found in parts for label in found.labels[:1]])
    came, labels, keys = restore_order(
        order,
        torch.arange(len(order)),
        [label for found in parts for label in found.labels],
        [key for found in parts for key in found.keys],
    )
    places = torch.empty_like(came)
    places[came] = torch.arange(len(came))
    own = places.split([len(found.order) for found in parts])[ranks.rank]
    return EmbeddedTars(
        contiguous_rows(embeddings, own, len(order), ranks),
        labels,
        keys,
        [tars[number] for number in order[came, 0].tolist()],
    )


def _own_tars(
    model: Embedder,
    locations: str | Path | Sequence[str | Path],
    settings: EmbeddingSettings,
    label_field: str | None,
    *,
    labelled: bool,
    ranks: Ranks,
) -> tuple[Tensor, _TarPart, list[str]]:
    """Embeddings (n_r, D) of this rank's share, what else is known of it, and where the tars lie."""
    loader = tar_loader(
        locations,
        settings.transform,
        settings.batch_size,
        settings.num_workers,
        rank=ranks.rank,
        world_size=ranks.size,
        label_field=label_field,
        labelled=labelled,
        pin_memory=settings.device.type == "cuda",
    )
    embeddings = [torch.empty(0, model.embedding_dim)]
    order = [torch.empty(0, 2, dtype=torch.int64)]
    labels: list[int | str] = []
    keys: list[str] = []
    with evaluating(model):
        for batch in _shown(loader, settings):
            embeddings.append(embed_batch(model, batch.images, settings, batch.keys))
            order.append(batch.order)
            labels += batch.labels
            keys += batch.keys
    part = _TarPart(torch.cat(order), labels, keys, loader.counts.passed_over)
    return torch.cat(embeddings), part, [tar.location for tar in loader.tars]


def _check_one_kind(first_labels: Sequence[int | str]) -> None:
    """The loader compares the labels of one rank; this, those of all."""
    kinds = {"number" if isinstance(label, int) else "name": label for label in first_labels}
    if len(kinds) > 1:
        raise DataError(
            f"Labels of the tars must be of one kind: got the number {kinds['number']} and the name "
            f"{kinds['name']!r}. Name the field to take (--label-field)."
        )


@contextmanager
def evaluating(model: Embedder) -> Iterator[None]:
    """The model in evaluation mode and without gradients; afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _shown(loader: Any, settings: EmbeddingSettings) -> Iterator[Any]:
    for batch in tqdm(loader, desc="embed", unit="batch", leave=False, disable=not settings.progress):
        if settings.between_batches is not None:
            settings.between_batches()
        yield batch


def embed_batch(model: Embedder, images: Tensor, settings: EmbeddingSettings, keys: Sequence[str]) -> Tensor:
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
