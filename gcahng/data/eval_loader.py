"""Loads rows for evaluation: every one once, in order."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from gcahng.data.dataset import EvalImages, Failure, ImageSource
from gcahng.data.images.decode import MAX_PIXELS
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.workers import worker_loader
from gcahng.errors import DataError, InputError

__all__ = ["EvalLoader", "eval_loader"]


class EvalLoader:
    """Every given row once, in order, as (images uint8 (b, 3, H, W), class ids (b,), rows (b,))."""

    def __init__(self, loader: DataLoader[Any], num_batches: int) -> None:
        self._loader = loader
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        answers = iter(self._loader)
        while (answer := next(answers, None)) is not None:
            if isinstance(answer, Failure):
                del answers  # ends the workers, see TrainLoader
                raise DataError(answer.message)
            yield answer


def eval_loader(
    shards: ImageSource,
    rows: NDArray[np.int64],
    *,
    transform: TransformSettings,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> EvalLoader:
    """Load `rows` for evaluation; an unreadable image is an error, since a result would be wrong.

    Args:
        shards: Where encoded images come from.
        rows: Sample rows; the last batch holds what is left.
        transform: Transforms; the evaluation part is used.
        batch_size: Images per batch.
        num_workers: Worker processes; 0 works in this process.
        pin_memory: Put batches into page-locked memory.
        max_pixels: Limit of a decoded image.
    Raises:
        InputError: `batch_size` or `num_workers` is impossible.
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` must be at least 1, got {batch_size}. Raise it.")
    rows = np.asarray(rows, dtype=np.int64)
    chunks = [rows[start : start + batch_size] for start in range(0, rows.size, batch_size)]
    images = EvalImages(shards, transform, max_pixels)
    return EvalLoader(worker_loader(images, chunks, num_workers, pin_memory), len(chunks))
