"""Batches of decoded, transformed images: what one loader worker does for one request.

A request is a few numbers and carries everything that its images depend on, so any process answers
it with the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gcahng.data.images.decode import MAX_PIXELS, decode_image, decode_picture
from gcahng.data.images.picture import Picture
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.images.transforms import eval_transform, train_draws, train_transform
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.shards.reader import ShardSet
from gcahng.data.workers import Failure
from gcahng.errors import DataError, InputError, UnreachableError

OnError = Literal["fail", "skip"]


class ImageSource(Protocol):
    """Encoded images by row, as `ShardSet` has them. Must pickle into loader workers."""

    def class_ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class id of each row."""

    def read(self, row: int) -> bytes:
        """The encoded image; DataError where it is damaged."""

    def key(self, row: int) -> str:
        """The sample's name in messages."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One training batch, group-major: K groups of P samples, classes in the same order in each.

    With several ranks it is one rank's part of the global batch: P stands for the rank's classes, and
    the parts put side by side along the classes, in the order of ranks, are the global batch.

    Attributes:
        images: (B, 3, H, W) uint8; `gcahng.data.images.transforms.normalise` makes them numbers.
        labels: (B,) int64 training labels, `classes` K times over.
        rows: (B,) int64 sample rows as used, replacements included.
        classes: (P,) int64 distinct labels.
        num_samples: K.
        skipped: Unreadable images that others of their class replaced.
        problems: What was wrong with them, one message each.
        repaired: Draws of the sampler that gave way to others, see
            `gcahng.data.plans.batch_plan.BatchPlan`. Those of the global batch are counted in the part
            of rank 0, so that a sum over ranks counts them once.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    classes: Tensor
    num_samples: int
    skipped: int = 0
    problems: tuple[str, ...] = ()
    repaired: int = 0

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            images=move(self.images),
            labels=move(self.labels),
            rows=move(self.rows),
            classes=move(self.classes),
        )


@dataclass(frozen=True, eq=False)
class TrainRequest:
    """The samples of one training batch, or of one rank's part of it.

    Attributes:
        epoch: Counted from 0.
        labels: (P,) training labels.
        rows: (K, P) sample rows.
        positions: (K, P) places of the samples in the epoch over all ranks: crops and flips hang on
            them, and so are the same for any number of ranks.
        repaired: Handed on to the `Batch`.
    """

    epoch: int
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    repaired: int = 0


class TrainImages(Dataset[Batch | Failure]):
    """Answers a `TrainRequest` with a `Batch`.

    Args:
        images: Where encoded images come from.
        table: Training classes; an unreadable image is replaced from here.
        settings: Transforms.
        seed: Seed of the run.
        on_error: "fail" at an unreadable image, or "skip" it: the next image of its class, in the
            order of the table and round its end, that the batch does not hold takes its place. A
            class that has no further readable image repeats one that the batch holds. A
            remote place that cannot be reached says nothing of its images, and ends the run either way.
        max_pixels: Limit of a decoded image.
    """

    def __init__(
        self,
        images: ImageSource,
        table: ClassTable,
        settings: TransformSettings,
        seed: int,
        on_error: OnError,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.images = images
        self.table = table
        self.settings = settings
        self.seed = seed
        self.on_error = on_error
        self.max_pixels = max_pixels

    def __getitem__(self, request: TrainRequest) -> Batch | Failure:
        try:
            return self._batch(request)
        except InputError as error:
            return Failure(str(error))

    def _batch(self, request: TrainRequest) -> Batch:
        rows = request.rows.copy()
        num_samples, num_classes = rows.shape
        size = self.settings.crop
        pixels = torch.empty((num_samples, num_classes, 3, size, size), dtype=torch.uint8)
        problems: list[str] = []
        # Class by class: a replacement must know what the batch holds of its class.
        for place, label in enumerate(request.labels.tolist()):
            for group in range(num_samples):
                read = self._reader(request.epoch, int(request.positions[group, place]))
                try:
                    image = read(int(rows[group, place]))
                except DataError as error:
                    if self.on_error == "fail" or isinstance(error, UnreachableError):
                        raise
                    problems.append(str(error))
                    image = self._replace(rows[:, place], group, label, read, str(error))
                pixels[group, place] = image
        return Batch(
            images=pixels.flatten(0, 1),
            labels=torch.from_numpy(np.tile(request.labels, num_samples)),
            rows=torch.from_numpy(rows.reshape(-1)),
            classes=torch.from_numpy(request.labels.copy()),
            num_samples=num_samples,
            skipped=len(problems),
            problems=tuple(problems),
            repaired=request.repaired,
        )

    def _reader(self, epoch: int, position: int) -> Callable[[int], Tensor]:
        """A function from a row to its transformed image; every call begins the draws anew."""

        def read(row: int) -> Tensor:
            draws = train_draws(self.seed, epoch, position)
            return _read(
                self.images,
                row,
                partial(decode_picture, max_pixels=self.max_pixels),
                lambda picture: train_transform(picture, self.settings, draws),
            )

        return read

    def _replace(
        self,
        column: NDArray[np.int64],
        group: int,
        label: int,
        read: Callable[[int], Tensor],
        problem: str,
    ) -> Tensor:
        """The image that takes the place of `column[group]`; its row is written there."""
        bad = column[group]
        class_rows = self.table.rows_of(label)
        after = np.roll(class_rows, -1 - int(np.searchsorted(class_rows, bad)))
        held = np.isin(after, column)
        for row in np.concatenate([after[~held], after[held & (after != bad)]]).tolist():
            try:
                image = read(row)
            except UnreachableError:
                raise
            except DataError:
                continue
            column[group] = row
            return image
        raise DataError(
            f"Class {self.table.class_ids[label]} has no readable image: expected at least one of "
            f"{class_rows.size}, got errors for all. The first: {problem}"
        )


class EvalImages(Dataset[tuple[Tensor, Tensor, Tensor] | Failure]):
    """Answers an array of rows with (images uint8 (b, 3, H, W), class ids (b,), rows (b,)).

    Args:
        images: Where encoded images come from.
        settings: Transforms.
        max_pixels: Limit of a decoded image.
    """

    def __init__(self, images: ImageSource, settings: TransformSettings, max_pixels: int = MAX_PIXELS) -> None:
        self.images = images
        self.settings = settings
        self.max_pixels = max_pixels

    def __getitem__(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor] | Failure:
        try:
            images = [
                _read(
                    self.images,
                    row,
                    partial(decode_image, max_pixels=self.max_pixels),
                    lambda picture: eval_transform(picture, self.settings),
                )
                for row in rows.tolist()
            ]
        except InputError as error:
            return Failure(str(error))
        class_ids = self.images.class_ids(rows)
        return torch.stack(images), torch.from_numpy(class_ids), torch.from_numpy(rows.copy())


def _read(
    source: ImageSource,
    row: int,
    decode: Callable[..., Picture],
    transform: Callable[[Picture], Tensor],
) -> Tensor:
    content = source.read(row)
    name = _image_name(source, row)
    picture = decode(content, name=name)
    try:
        return transform(picture)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _image_name(source: ImageSource, row: int) -> str:
    sample = f"the image of sample {source.key(row)}"
    if isinstance(source, ShardSet):
        return f"Shard {source.shard_name(row)}: {sample}"
    return sample
