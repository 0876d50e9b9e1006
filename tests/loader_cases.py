"""Small shard folders of drawn noise, and their batches, for tests of the loaders."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gcahng.data.dataset import Batch
from gcahng.data.images.transforms import transform_settings
from gcahng.data.loader import train_loader
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.writer import Sample, ShardWriter

SETTINGS = transform_settings("gca_hng", image_size=16)
SIZES = {"seed": 5, "num_classes": 3, "num_samples": 2}
COUNTS = [6, 5, 4, 7, 2, 6]


def encode(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (24, 20 + seed % 9, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(directory: Path, broken: tuple[int, ...] = ()) -> ShardSet:
    """Classes of COUNTS images and one test class of 5, tars of about 12 images.

    The images of the rows in `broken` are cut: the shards are whole, what they hold is not.
    """
    directory.mkdir()
    writer = ShardWriter(directory, shard_bytes=20_000)
    row = 0
    for class_number, count in enumerate([*COUNTS, 5]):
        split = "train" if class_number < len(COUNTS) else "test"
        for _ in range(count):
            content = encode(row)[: 200 if row in broken else None]
            writer.write(Sample(content, "png", f"class {class_number}", split, f"{row}.png"))
            row += 1
    writer.finish("test", 0, {})
    return ShardSet.open(directory)


def train_table(shards: ShardSet, **options: object) -> ClassTable:
    return ClassTable.build(shards.class_ids(), shards.split_samples("train"), **options)


def load(shards: ShardSet, num_workers: int = 0, **options: object) -> list[Batch]:
    arguments = SIZES | {"epoch": 1, "transform": SETTINGS} | options
    return list(train_loader(shards, train_table(shards), num_workers=num_workers, **arguments))


def assert_same(got: list[Batch], want: list[Batch]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        for name in ("images", "labels", "rows", "classes"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (a.num_samples, a.skipped, a.problems) == (b.num_samples, b.skipped, b.problems)
        assert a.repaired == b.repaired
