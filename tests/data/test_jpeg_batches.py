"""Training batches of JPEGs: the pixels of Pillow and torchvision up to rounding, and nothing cut trains."""

import io

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image

from gcahng.data.dataset import Failure, TrainImages, TrainRequest
from gcahng.data.images import jpeg
from gcahng.data.images.transforms import random_resized_box, train_draws, transform_settings
from gcahng.data.plans.class_table import ClassTable

SETTINGS = transform_settings(image_size=64)


def encode(row: int, kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(row)
    image = Image.fromarray(rng.integers(0, 256, (20, 25, 3), dtype=np.uint8)).resize((250, 187 + row))
    buffer = io.BytesIO()
    image.convert("CMYK" if row == 3 else "RGB").save(buffer, kind)
    return buffer.getvalue()


class Files:
    """Six JPEGs of two classes; the one in row 3 is CMYK."""

    def __init__(self, cut: int | None = None) -> None:
        self.contents = [encode(row) for row in range(6)]
        if cut is not None:
            self.contents[cut] = self.contents[cut][: len(self.contents[cut]) // 2]

    def class_ids(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(rows) // 3

    def read(self, row: int) -> bytes:
        return self.contents[row]

    def key(self, row: int) -> str:
        return f"{row:09d}"


def batch_of(files: Files, on_error: str = "fail"):
    table = ClassTable.build(files.class_ids(np.arange(6)))
    rows = np.array([[0, 3], [1, 4]])
    request = TrainRequest(epoch=2, labels=np.array([0, 1]), rows=rows, positions=np.arange(4).reshape(2, 2) + 8)
    return TrainImages(files, table, SETTINGS, 7, on_error)[request]


def reference(content: bytes, position: int) -> torch.Tensor:
    """Pillow's pixels, torchvision's crop of the box that is drawn, flipped as drawn."""
    image, draws = Image.open(io.BytesIO(content)).convert("RGB"), train_draws(7, 2, position)
    left, top, width, height = random_resized_box(*image.size, SETTINGS.scale, SETTINGS.ratio, draws)
    image = tv.resized_crop(image, top, left, height, width, [64, 64])
    return tv.pil_to_tensor(tv.hflip(image) if draws.random() < SETTINGS.flip else image)


def test_a_batch_holds_the_crops_of_torchvision_up_to_rounding():
    files = Files()
    batch = batch_of(files)
    for place, row in enumerate([0, 3, 1, 4]):
        difference = (batch.images[place].int() - reference(files.read(row), place + 8).int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.1


def test_a_batch_does_not_depend_on_the_decoder_that_is_installed(monkeypatch):
    fast = batch_of(Files())
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert torch.equal(fast.images, batch_of(Files()).images)


@pytest.mark.parametrize("cut", [0, 3])
def test_a_cut_image_never_trains(cut):
    failure = batch_of(Files(cut))
    assert isinstance(failure, Failure)
    assert failure.message.startswith(f"the image of sample {cut:09d} cannot be decoded as JPEG")
    batch = batch_of(Files(cut), on_error="skip")
    assert batch.skipped == 1 and cut not in batch.rows.tolist()
