"""Index folders of random numbers, made by the code that makes real ones, without a model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gcahng.search.assemble import ASSEMBLE, Parts
from gcahng.search.index_info import INDEX, IndexInfo
from gcahng.search.part_files import ImageRow, PartFiles

MADE_WITH = {
    "checkpoint": {"path": "nowhere", "metric_model_sha256": "0" * 64, "model_sha256": "1" * 64},
    "data": {"kind": "shards", "location": "nowhere", "split": "test", "manifest": "2" * 64, "images": 0},
}


def vectors(count: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)


def rows_of(count: int, first: int = 0) -> list[ImageRow]:
    return [ImageRow(f"{i:09d}", f"shard-{i // 7}.tar", i // 3) for i in range(first, first + count)]


def write_index(folder: Path, sizes: Sequence[int], dim: int, layout: str = "npy", kind: str = "") -> IndexInfo:
    """An index of parts of these sizes; part p holds `vectors(sizes[p], dim, p)`."""
    files = PartFiles(folder.with_name(f"{folder.name}-parts"), dim)
    files.folder.mkdir()
    folder.mkdir()
    first = 0
    for part, size in enumerate(sizes):
        rows = rows_of(size, first)
        if kind:  # names of classes, as plain tars have them
            rows = [row._replace(label=f"class {999 - int(row.label):03d}") for row in rows]
        files.write(0, part, vectors(size, dim, part), rows, kind, part == len(sizes) - 1)
        first += size
    parts = Parts(files, 1, lambda label: f"name of {label}")
    info = IndexInfo(layout, parts.count, dim, False, MADE_WITH, ASSEMBLE[layout](parts, folder))
    (folder / INDEX).write_text(info.text())
    return info
