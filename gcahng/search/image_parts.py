"""Images in parts of a fixed size: a split of a shard folder, or plain tars.

Which images a part holds, and which of them share a batch, is a function of the images, the batch size and the part
size alone. So an embedding does not depend on how many ranks or workers there are, nor on where a killed run stopped.
"""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gcahng.data.eval_loader import eval_loader
from gcahng.data.ranks import rank_part
from gcahng.data.shards.reader import ShardSet
from gcahng.data.stores.urls import redact
from gcahng.search.part_files import ImageRow, PartFiles
from gcahng.training.embedding import EmbeddingSettings

# Parts that one loader reads before it is made anew: what a loader holds per row stays bounded.
_PARTS_PER_LOADER = 16


class PartBatch(NamedTuple):
    """Images of one part.

    Attributes:
        images: (b, 3, H, W) uint8; b may be 0 where a unit has no images.
        rows: What is known of them.
        unit: Which unit.
        part: Which part of it.
        kind: Where the labels came from; "" of a shard folder.
        ends_part: Whether the part is whole with them.
        ends_unit: Whether the unit is, too.
    """

    images: Tensor
    rows: list[ImageRow]
    unit: int
    part: int
    kind: str
    ends_part: bool
    ends_unit: bool


class Job(NamedTuple):
    """Missing parts of one unit, which one rank embeds.

    Attributes:
        unit: Which unit.
        start: First part.
        stop: Behind the last part; None: to the end of the unit, wherever that is.
    """

    unit: int
    start: int
    stop: int | None


class ImageParts(Protocol):
    """Images to embed, in units (in order) of parts (in order)."""

    num_units: int
    count: int | None
    """Images of all units; None if nobody knows before they are read."""

    def identity(self) -> dict[str, Any]:
        """What is embedded, in JSON."""

    def missing(self, files: PartFiles, part_rows: int) -> list[Job]:
        """What is to be embedded yet."""

    def batches(self, job: Job, part_rows: int, settings: EmbeddingSettings) -> Iterator[PartBatch]:
        """The images of a job, in order; `part_rows` is a multiple of the batch size."""

    def class_name(self, label: int) -> str:
        """Name of a class id."""


class ShardParts:
    """A split of a shard folder: one unit.

    Holds a few numbers per shard, none per image.

    Args:
        shards: The folder.
        split: Its split.
    Raises:
        DataError: There is no such split.
    """

    num_units = 1

    def __init__(self, shards: ShardSet, split: str, location: str) -> None:
        self._shards = shards
        self._split = split
        self._location = location
        sizes = np.array([info.num_samples for info in shards.manifest.shards], dtype=np.int64)
        chosen = shards.split_shards(split)
        self._first_rows = (np.cumsum(sizes) - sizes)[chosen]
        self._starts = np.cumsum(sizes[chosen]) - sizes[chosen]
        self.count: int | None = int(sizes[chosen].sum())
        self.class_name = lru_cache(4096)(self._class_name)

    def identity(self) -> dict[str, Any]:
        """Split and checksum of the manifest, which holds those of all shards."""
        return {
            "kind": "shards",
            "location": shown_place(self._location),
            "split": self._split,
            "manifest": self._shards.manifest.digest(),
            "images": self.count,
        }

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows of the shard folder that stand at places `start` to `stop` of the split."""
        places = np.arange(start, stop, dtype=np.int64)
        shard = np.searchsorted(self._starts, places, side="right") - 1
        rows: NDArray[np.int64] = self._first_rows[shard] + places - self._starts[shard]
        return rows

    def missing(self, files: PartFiles, part_rows: int) -> list[Job]:
        """One job for each missing part."""
        assert self.count is not None
        parts = range(-(-self.count // part_rows))
        return [Job(0, part, part + 1) for part in parts if files.header(0, part) is None]

    def batches(self, job: Job, part_rows: int, settings: EmbeddingSettings) -> Iterator[PartBatch]:
        """See `ImageParts`; an unreadable image is an error."""
        assert self.count is not None and job.stop is not None
        done, stop = job.start * part_rows, min(job.stop * part_rows, self.count)
        loader = eval_loader(
            self._shards,
            self.rows(done, stop),
            transform=settings.transform,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
            pin_memory=settings.device.type == "cuda",
        )
        for images, class_ids, numbers in loader:
            rows = [
                ImageRow(self._shards.key(row), self._shards.shard_name(row), class_id)
                for row, class_id in zip(numbers.tolist(), class_ids.tolist(), strict=True)
            ]
            part = done // part_rows
            done += len(rows)
            ends_unit = done == self.count
            yield PartBatch(images, rows, 0, part, "", ends_unit or done % part_rows == 0, ends_unit)

    def _class_name(self, label: int) -> str:
        return self._shards.classes[label].name


def shown_place(location: str | Path) -> str:
    """A path in full, a URL without its secrets."""
    text = str(location)
    return redact(text) if "://" in text else os.path.abspath(text)


def share_of_jobs(jobs: Sequence[Job], rank: int, world_size: int) -> list[Job]:
    """A rank's contiguous part of the jobs; neighbouring parts become one job, up to 16 of them.

    Args:
        jobs: All of them, the same on every rank.
        rank: Of this process.
        world_size: W.
    """
    share: list[Job] = []
    for job in jobs[rank_part(len(jobs), rank, world_size)]:
        last = share[-1] if share else None
        is_next = last is not None and (last.unit, last.stop) == (job.unit, job.start)
        if last is not None and is_next and job.start - last.start < _PARTS_PER_LOADER:
            share[-1] = last._replace(stop=job.stop)
        else:
            share.append(job)
    return share
