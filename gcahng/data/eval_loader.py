"""Loads rows for evaluation: every one once over all ranks, in order."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from gcahng.data.dataset import EvalImages, ImageSource
from gcahng.data.images.decode import MAX_PIXELS
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.ranks import rank_part
from gcahng.data.workers import Failure, next_answer, requests_in_flight, worker_loader
from gcahng.errors import DataError, InputError

__all__ = ["EvalLoader", "eval_loader"]

_FOLLOWING_SHARDS = 2


class EvalLoader:
    """Every given row once, in order, as (images uint8 (b, 3, H, W), class ids (b,), rows (b,)).

    Attributes:
        rows: (n,) the rows of this rank.
    """

    def __init__(self, loader: DataLoader[Any], num_batches: int, rows: NDArray[np.int64]) -> None:
        self._loader = loader
        self._num_batches = num_batches
        self.rows = rows

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        answers = iter(self._loader)
        while (answer := next_answer(answers)) is not None:
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
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> EvalLoader:
    """Load `rows` for evaluation; an unreadable image is an error, since a result would be wrong.

    A rank loads one contiguous slice of the rows; sizes differ by at most one and nothing is padded. The slices of the
    ranks, one after the other, are the rows in their order.

    Args:
        shards: Where encoded images come from. If it has `expect` (see `ShardSet`), it is told which shards are read
            now and which come next.
        rows: Sample rows, the same on all ranks; the last batch holds what is left.
        transform: Transforms; the evaluation part is used.
        batch_size: Images per batch.
        num_workers: Worker processes; 0 works in this process.
        rank: Of this process.
        world_size: Number of ranks.
        pin_memory: Put batches into page-locked memory.
        max_pixels: Limit of a decoded image.
    Raises:
        InputError: `batch_size`, `num_workers` or `rank` is impossible.
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` must be at least 1, got {batch_size}. Raise it.")
    rows = np.asarray(rows, dtype=np.int64)
    rows = rows[rank_part(rows.size, rank, world_size)]
    chunks = [rows[start : start + batch_size] for start in range(0, rows.size, batch_size)]
    images = EvalImages(shards, transform, max_pixels)
    requests = _Requests(shards, chunks, requests_in_flight(num_workers))
    return EvalLoader(worker_loader(images, requests, num_workers, pin_memory), len(chunks), rows)


class _Requests:
    """The batches' rows, in order; tells the source which shards they lie in. The sampler of torch's DataLoader."""

    def __init__(self, source: Any, chunks: Sequence[NDArray[np.int64]], in_flight: int) -> None:
        self._source = source
        self._chunks = chunks
        self._in_flight = in_flight

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        if not hasattr(self._source, "expect"):
            yield from self._chunks
            return
        shards = [_distinct(self._source.shard_of(chunk).tolist()) for chunk in self._chunks]
        # Where the shards change: (number of the batch, shard).
        stream = [(place, shard) for place, held in enumerate(shards) for shard in held]
        changes = [new for old, new in zip([(-1, -1), *stream], stream, strict=False) if new[1] != old[1]]
        told: tuple[list[int], list[int]] | None = None
        after = 0
        for place, chunk in enumerate(self._chunks):
            # Workers still read the batches that were asked for before this one.
            asked = shards[max(place + 1 - self._in_flight, 0) : place + 1]
            present = _distinct(shard for held in asked for shard in held)
            while after < len(changes) and changes[after][0] <= place:
                after += 1
            following: list[int] = []
            for _, shard in islice(changes, after, None):
                if len(following) == _FOLLOWING_SHARDS:
                    break
                if shard not in present and shard not in following:
                    following.append(shard)
            if told != (present, following):
                told = (present, following)
                self._source.expect(present, following)
            yield chunk


def _distinct(shards: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(shards))
