"""A source in memory, and folders compared byte by byte."""

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gcahng.data.sources.source import Fault, Listing, Published, SourceItem


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (24, 20)) -> bytes:
    """A noise image of this width and height."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def contents(directory: Path) -> dict[str, bytes]:
    """Everything in a folder, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Pictures:
    """A source of noise images; remembers which were loaded, and some cannot be read."""

    name = "pictures"

    def __init__(self, items: Sequence[SourceItem], **listing: object) -> None:
        self.items = items
        self.parts = listing
        self.unreadable: set[str] = set()
        self.contents: dict[str, bytes] = {}
        self.loaded: list[str] = []

    def listing(self) -> Listing:
        return Listing(self.items, **self.parts)  # type: ignore[arg-type]

    def load(self, item: SourceItem) -> bytes:
        self.loaded.append(item.source)
        if item.source in self.unreadable:
            raise OSError(5, "Input/output error")
        return self.contents.get(item.source) or encoded(zlib.crc32(item.source.encode()))


def pictures(
    classes: Mapping[str, Sequence[str]],
    images: int = 6,
    *,
    faults: Sequence[Fault] = (),
    published: Published | None = None,
) -> Pictures:
    """`images` images of each class of each split; their names are unique: "train/owl/3"."""
    items = [
        SourceItem(name, split, f"{split}/{name}/{i}")
        for split, names in classes.items()
        for name in names
        for i in range(images)
    ]
    return Pictures(items, faults=faults, published=published)
