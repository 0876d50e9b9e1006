"""Streams the images of plain tars for embedding and evaluation: every one once over all ranks and workers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gcahng.data.images.decode import MAX_PIXELS, decode_image
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.images.transforms import eval_transform
from gcahng.data.ranks import check_rank
from gcahng.data.stores import CacheSettings, open_store
from gcahng.data.tars.deal import Piece, deal_pieces
from gcahng.data.tars.labels import NO_LABEL, Label, read_label
from gcahng.data.tars.locations import TarPlace, find_tars
from gcahng.data.tars.members import MAX_MEMBER_BYTES, TarMembers
from gcahng.data.tars.samples import TarSample, image_of, tar_samples
from gcahng.data.workers import Failure, next_answer, worker_loader
from gcahng.errors import DataError, InputError

_STREAMED = CacheSettings(mode="direct")  # what is read once needs no copy on this machine
_MAX_PROBLEMS_KEPT = 100
_MAX_EXTENSIONS_KEPT = 100


class TarBatch(NamedTuple):
    """Some images of plain tars.

    Attributes:
        images: (b, 3, H, W) uint8.
        labels: Class of each image as its tar spells it, all numbers or all names; see `label_ids`.
        order: (b, 2) int64: place of the image's tar among all tars, place of its sample in that tar.
        keys: Key of each sample, unique in its tar.
    """

    images: Tensor
    labels: list[int | str]
    order: Tensor
    keys: list[str]


@dataclass
class TarCounts:
    """What a pass over tars has seen so far.

    Attributes:
        images: Images given out.
        skipped: Unreadable images left out.
        problems: What was wrong with them, for the first 100.
        passed_over: Members that are not read, by extension; "others" beyond the first 100.
    """

    images: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def add(self, other: "TarCounts") -> None:
        """Count what another reader saw, too."""
        self.images += other.images
        self.skipped += other.skipped
        self.problems = (self.problems + other.problems)[:_MAX_PROBLEMS_KEPT]
        for extension, number in other.passed_over.items():
            self.pass_over(extension, number)

    def pass_over(self, extension: str, number: int = 1) -> None:
        """Count members that are not read."""
        is_known = extension in self.passed_over or len(self.passed_over) < _MAX_EXTENSIONS_KEPT
        self.passed_over[extension if is_known else "others"] += number


class TarLoader:
    """Iterates over `TarBatch`es; can be iterated again. See `tar_loader`.

    Attributes:
        tars: All tars, of all ranks, in the order that `TarBatch.order` counts.
        counts: Of the latest pass; whole once it has ended.
    """

    def __init__(self, tars: Sequence[TarPlace], loader: DataLoader[Any]) -> None:
        self.tars = tars
        self.counts = TarCounts()
        self._loader = loader

    def __iter__(self) -> Iterator[TarBatch]:
        self.counts = TarCounts()
        kind: str | None = None
        answers = iter(self._loader)
        while (answer := next_answer(answers)) is not None:
            problem = answer.message if isinstance(answer, Failure) else None
            if problem is None:
                problem = self._other_kind(answer, kind)
            if problem is not None:
                del answers  # ends the workers, see TrainLoader
                raise DataError(problem)
            self.counts.add(answer.counts)
            if answer.batch is not None:
                kind = kind or answer.kinds[0]
                yield answer.batch

    def _other_kind(self, answer: "_Answer", kind: str | None) -> str | None:
        """A message about the first label of another kind than those before."""
        kind = kind or (answer.kinds[0] if answer.kinds else None)
        for place, other in enumerate(answer.kinds):
            if other != kind:
                assert answer.batch is not None
                tar = self.tars[int(answer.batch.order[place, 0])]
                return (
                    f"Tar {tar.location}: sample {answer.batch.keys[place]!r} has a {other}, others have a {kind}: "
                    "expected one kind of label in all tars. Name the field to take (--label-field)."
                )
        return None


def tar_loader(
    locations: str | Path | Sequence[str | Path],
    transform: TransformSettings,
    batch_size: int,
    num_workers: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    label_field: str | None = None,
    labelled: bool = True,
    on_error: Literal["fail", "skip"] = "fail",
    pin_memory: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_member_bytes: int = MAX_MEMBER_BYTES,
) -> TarLoader:
    """Load the images of plain WebDataset tars, which any tool may have made, for embedding or evaluation.

    Every image comes once over all ranks and workers, without padding; ranks may get unequal numbers, in no promised
    order: `restore_order` brings those of all ranks back into the order of the tars. A tar is read in large parts.

    Args:
        locations: Paths or URLs, see `find_tars`.
        transform: Transforms; the evaluation part is used.
        batch_size: Images per batch; the last ones of each worker hold what is left.
        num_workers: Worker processes; 0 works in this process. Ranks may differ.
        rank: Of this process.
        world_size: Number of ranks.
        label_field: Field of `.json` that holds the class; None looks as `read_label` says.
        labelled: False looks for no label at all: every label is 0.
        on_error: At an image that cannot be decoded or is missing: "fail", or "skip" it and count it. A damaged tar,
            and a sample without a label, are always an error.
        pin_memory: Put images into page-locked memory.
        max_pixels: Limit of a decoded image.
        max_member_bytes: Limit of an encoded image, or a label's member.
    Raises:
        InputError: An argument is impossible; see also `find_tars` and `open_store`.
        DataError: There is no such tar.
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` must be at least 1, got {batch_size}. Raise it.")
    if max_member_bytes < 1:
        raise InputError(f"`max_member_bytes` must be at least 1, got {max_member_bytes}. Raise it.")
    if on_error not in ("fail", "skip"):
        raise InputError(f"`on_error` must be 'fail' or 'skip', got {on_error!r}. Choose one.")
    check_rank(rank, world_size)
    tars = find_tars(locations)
    for folder in dict.fromkeys(tar.folder for tar in tars):
        open_store(folder, _STREAMED)  # a scheme that is refused is found now, not in a worker
    share = deal_pieces([Piece(number, tar) for number, tar in enumerate(tars)], rank, world_size)
    images = _TarImages(
        share,
        transform=transform,
        batch_size=batch_size,
        label_field=label_field,
        labelled=labelled,
        on_error=on_error,
        max_pixels=max_pixels,
        max_member_bytes=max_member_bytes,
    )
    return TarLoader(tars, worker_loader(images, None, num_workers, pin_memory))


def restore_order(order: Tensor, *columns: Any) -> tuple[Any, ...]:
    """Rows of all ranks and workers in the order of the tars.

    Args:
        order: (n, 2), `TarBatch.order` of all batches, in any order.
        columns: Whatever else is known of the n images: tensors, arrays, lists.
    Returns:
        The columns, sorted.
    Raises:
        InputError: A column has another length, or an image comes twice.
    """
    keys = order.numpy()
    places = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[places]
    repeated = np.flatnonzero((ordered[1:] == ordered[:-1]).all(1))
    if repeated.size:
        raise InputError(f"`order` holds {ordered[repeated[0]].tolist()} twice: expected every image once.")
    for number, column in enumerate(columns):
        if len(column) != len(keys):
            raise InputError(f"Column {number} must have one entry per image: expected {len(keys)}, got {len(column)}.")
    return tuple(
        [column[place] for place in places.tolist()] if isinstance(column, list) else column[places]
        for column in columns
    )


class _Answer(NamedTuple):
    """From a worker to the loader; tuples, so that torch finds the images to pin."""

    batch: TarBatch | None
    kinds: list[str]
    counts: TarCounts


class _Image(NamedTuple):
    pixels: Tensor
    label: Label
    order: tuple[int, int]
    key: str


class _TarImages(IterableDataset["_Answer | Failure"]):
    """The share of one rank; its workers deal it out among themselves."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        transform: TransformSettings,
        batch_size: int,
        label_field: str | None,
        labelled: bool,
        on_error: str,
        max_pixels: int,
        max_member_bytes: int,
    ) -> None:
        self.pieces = pieces
        self.transform = transform
        self.batch_size = batch_size
        self.label_field = label_field
        self.labelled = labelled
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.max_member_bytes = max_member_bytes

    def __iter__(self) -> Iterator[_Answer | Failure]:
        worker = get_worker_info()
        pieces = self.pieces if worker is None else deal_pieces(self.pieces, worker.id, worker.num_workers)
        return _Reader(self, pieces).answers()


class _Reader:
    """One worker's pass over its pieces."""

    def __init__(self, settings: _TarImages, pieces: Sequence[Piece]) -> None:
        self._settings = settings
        self._pieces = pieces
        self._counts = TarCounts()

    def answers(self) -> Iterator[_Answer | Failure]:
        images: list[_Image] = []
        try:
            for image in self._images():
                images.append(image)
                if len(images) == self._settings.batch_size:
                    yield self._answer(images)
                    images = []
            yield self._answer(images)
        except InputError as error:
            yield Failure(str(error))

    def _answer(self, images: list[_Image]) -> _Answer:
        counts, self._counts = self._counts, TarCounts()
        if not images:
            return _Answer(None, [], counts)
        batch = TarBatch(
            torch.stack([image.pixels for image in images]),
            [image.label.value for image in images],
            torch.tensor([image.order for image in images], dtype=torch.int64),
            [image.key for image in images],
        )
        return _Answer(batch, [image.label.kind for image in images], counts)

    def _images(self) -> Iterator[_Image]:
        for piece in self._pieces:
            tar = piece.tar
            store = open_store(tar.folder, _STREAMED)
            try:
                limit = self._settings.max_member_bytes
                members = TarMembers(store, tar.name, location=tar.location, max_member_bytes=limit)
                # All sharers of a tar see what is passed over; one counts it.
                passed_over = self._pass_over if piece.part == 0 else None
                for sample in tar_samples(members, piece.part, piece.parts, passed_over):
                    image = self._image(sample, piece)
                    if image is not None:
                        yield image
            finally:
                store.close()

    def _pass_over(self, extension: str) -> None:
        self._counts.pass_over(extension)

    def _image(self, sample: TarSample, piece: Piece) -> _Image | None:
        tar = f"Tar {piece.tar.location}:"
        label = NO_LABEL
        if self._settings.labelled:
            label = read_label(sample, self._settings.label_field, f"{tar} sample {sample.key!r}")
        try:
            content = image_of(sample, f"{tar} sample {sample.key!r}")
            pixels = self._pixels(content, f"{tar} the image of sample {sample.key!r}")
        except DataError as error:
            if self._settings.on_error == "fail":
                raise
            self._counts.add(TarCounts(skipped=1, problems=[str(error)]))
            return None
        self._counts.images += 1
        return _Image(pixels, label, (piece.number, sample.position), sample.key)

    def _pixels(self, content: bytes, name: str) -> Tensor:
        image = decode_image(content, name=name, max_pixels=self._settings.max_pixels)
        try:
            return eval_transform(image, self._settings.transform)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
