"""Shards of hotels with chains: training images and test images of the same hotels, galleries, distractors."""

from pathlib import Path

from gcahng.data.shards.writer import Sample, ShardWriter

CHAINS = {"hotel-0": "north", "hotel-1": "north", "hotel-2": "south", "hotel-3": "south", "hotel-4": "alone"}
"""hotel-5 is of no chain."""


def write_hotels(images: Path, folder: Path) -> Path:
    """Six hotels, 4 images each in `train`, 1 in `test`; `near` shows two of them, `elsewhere` 8 other classes.

    Args:
        images: A folder per class, at least 16 of them with 6 images each.
        folder: To write to.
    """
    folder.mkdir()
    writer = ShardWriter(folder)
    classes = sorted(images.iterdir())

    def write(split: str, numbers: range, chosen: slice) -> None:
        for number in numbers:
            for file in sorted(classes[number].iterdir())[chosen]:
                writer.write(Sample(file.read_bytes(), "png", f"hotel-{number}", split, str(file)))

    write("train", range(6), slice(0, 4))
    write("test", range(6), slice(4, 5))
    write("near", range(2), slice(5, 6))
    write("elsewhere", range(8, 16), slice(0, 3))
    columns = {name: {"chain_id": "7", "chain_name": chain} for name, chain in CHAINS.items()}
    writer.finish("hotels", 0, {}, class_columns=columns)
    return folder
