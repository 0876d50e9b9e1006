"""Plain tars in parts: each tar is a unit, streamed once from front to back by one rank; its workers decode."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gcahng.data.images.decode import decode_image
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.images.transforms import eval_transform
from gcahng.data.stores import CacheSettings, open_store
from gcahng.data.tars.labels import NO_LABEL, Label, read_label
from gcahng.data.tars.locations import TarPlace, find_tars
from gcahng.data.tars.members import TarMembers
from gcahng.data.tars.samples import TarSample, image_of, tar_samples
from gcahng.data.workers import Failure, next_answer, worker_loader
from gcahng.errors import DataError
from gcahng.search.image_parts import Job, PartBatch, shown_place
from gcahng.search.part_files import ImageRow, PartFiles
from gcahng.training.embedding import EmbeddingSettings

STREAMED = CacheSettings(mode="direct")  # what is read once needs no copy on this machine


class _Request(NamedTuple):
    """Encoded images of one batch, and what the batch is."""

    contents: list[bytes]
    rows: list[ImageRow]
    kind: str
    part: int
    ends_part: bool
    ends_unit: bool


class TarParts:
    """Plain WebDataset tars.

    Args:
        locations: Paths or URLs, see `gcahng.data.tars.locations.find_tars`.
        label_field: Field of `.json` that holds the class, see `gcahng.data.tars.labels.read_label`.
        labelled: False looks for no labels: all are 0.
    Raises:
        InputError: A location is impossible.
        DataError: There is no such tar.
    """

    count: int | None = None

    def __init__(
        self, locations: Sequence[str | Path], label_field: str | None = None, *, labelled: bool = True
    ) -> None:
        self.tars = find_tars(locations)
        self._label_field = label_field
        self._labelled = labelled
        self.num_units = len(self.tars)
        self._sizes = [open_store(tar.folder, STREAMED).size(tar.name) for tar in self.tars]

    def identity(self) -> dict[str, Any]:
        """Names and sizes of the tars: nobody reads them whole to compare them."""
        tars = [[tar.location, size] for tar, size in zip(self.tars, self._sizes, strict=True)]
        places = [shown_place(tar.location) for tar in self.tars]
        labels = {"label_field": self._label_field, "labelled": self._labelled}
        return {"kind": "tars", "location": places, "tars": tars} | labels

    def missing(self, files: PartFiles, part_rows: int) -> list[Job]:
        """Every tar that is not whole, from its first missing part on."""
        jobs = []
        for unit in range(self.num_units):
            headers = files.headers(unit)
            if not headers or not headers[-1].last:
                jobs.append(Job(unit, len(headers), None))
        return jobs

    def batches(self, job: Job, part_rows: int, settings: EmbeddingSettings) -> Iterator[PartBatch]:
        """See `gcahng.search.image_parts.ImageParts`; an unreadable image is an error."""
        tar = self.tars[job.unit]
        requests = _Requests(tar, self._label, job.start * part_rows, part_rows, settings.batch_size)
        images = _Decoded(settings.transform, tar.location)
        loader = worker_loader(images, requests, settings.num_workers, settings.device.type == "cuda")
        answers = iter(loader)
        while (answer := next_answer(answers)) is not None:
            if isinstance(answer, Failure):
                del answers  # ends the workers
                raise DataError(answer.message)
            pixels, asked = answer
            yield PartBatch(pixels, asked.rows, job.unit, asked.part, asked.kind, asked.ends_part, asked.ends_unit)

    def class_name(self, label: int) -> str:
        """A number is its own name."""
        return str(label) if self._labelled else ""

    def _label(self, sample: TarSample, name: str) -> Label:
        return read_label(sample, self._label_field, name) if self._labelled else NO_LABEL


class _Requests:
    """Reads one tar and gives out its batches, still encoded. The sampler of torch's DataLoader."""

    def __init__(
        self,
        tar: TarPlace,
        read: Callable[[TarSample, str], Label],
        skip: int,
        part_rows: int,
        batch_size: int,
    ) -> None:
        self._tar = tar
        self._read = read
        self._skip = skip
        self._part_rows = part_rows
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[_Request]:
        held: list[tuple[bytes, ImageRow, str]] = []
        done = self._skip
        for image in self._images():
            if len(held) == self._batch_size:  # another image follows: these do not end the tar
                done += len(held)
                yield self._request(held, done, ends_unit=False)
                held = []
            held.append(image)
        yield self._request(held, done + len(held), ends_unit=True)

    def _request(self, held: list[tuple[bytes, ImageRow, str]], done: int, *, ends_unit: bool) -> _Request:
        ends_part = ends_unit or done % self._part_rows == 0
        part = max(done - 1, 0) // self._part_rows
        contents, rows = [image[0] for image in held], [image[1] for image in held]
        return _Request(contents, rows, held[0][2] if held else "", part, ends_part, ends_unit)

    def _images(self) -> Iterator[tuple[bytes, ImageRow, str]]:
        tar, kind = self._tar, ""
        store = open_store(tar.folder, STREAMED)
        try:
            for sample in tar_samples(TarMembers(store, tar.name, location=tar.location)):
                name = f"Tar {tar.location}: sample {sample.key!r}"
                label = self._read(sample, name)
                kind = kind or label.kind
                if label.kind != kind:
                    raise other_kind(name, label.kind, kind)
                content = image_of(sample, name)
                if sample.position >= self._skip:
                    yield content, ImageRow(sample.key, tar.location, label.value), kind
        finally:
            store.close()


def other_kind(where: str, kind: str, before: str) -> DataError:
    """Two kinds of labels cannot be compared."""
    return DataError(
        f"{where} has a {kind}, others have a {before}: expected one kind of label in all tars. Name the field to take "
        "(--label-field)."
    )


class _Decoded(Dataset["tuple[Tensor, _Request] | Failure"]):
    """Answers a request with images uint8 (b, 3, H, W), and what was asked without the encoded ones."""

    def __init__(self, transform: TransformSettings, location: str) -> None:
        self._transform = transform
        self._location = location

    def __getitem__(self, request: _Request) -> "tuple[Tensor, _Request] | Failure":
        images: list[Tensor] = []
        try:
            for content, row in zip(request.contents, request.rows, strict=True):
                name = f"Tar {self._location}: the image of sample {row.key!r}"
                image = decode_image(content, name=name)
                try:
                    images.append(eval_transform(image, self._transform))
                except DataError as error:
                    raise DataError(f"{name}: {error}") from None
        except DataError as error:
            return Failure(str(error))
        side = self._transform.eval_crop
        pixels = torch.stack(images) if images else torch.empty((0, 3, side, side), dtype=torch.uint8)
        return pixels, request._replace(contents=[])
