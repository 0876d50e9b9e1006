"""Small shard folders for tests: real ones with encoded images, and indexes over empty tars for many rows."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gcahng.data.shards.class_list import ClassInfo, encode_classes
from gcahng.data.shards.index import INDEX_DTYPE, encode_index
from gcahng.data.shards.manifest import ClassesFile, Manifest, ShardInfo, encode_manifest, own_checksum
from gcahng.data.shards.writer import Sample, ShardWriter


def picture(seed: int, kind: str) -> bytes:
    """An encoded image of noise."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (24, 20 + seed % 9, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def samples_of(split: str, class_name: str, count: int, seed: int) -> list[Sample]:
    """Samples of one class, JPEG and PNG in turn."""
    kinds = [("JPEG", "jpg"), ("PNG", "png")]
    return [
        Sample(picture(seed + i, kinds[i % 2][0]), kinds[i % 2][1], class_name, split, f"{split}/{class_name}/{i}")
        for i in range(count)
    ]


def write_shards(folder: Path, samples: Sequence[Sample], shard_bytes: int = 8000, **extra: Any) -> Manifest:
    """A whole shard folder."""
    folder.mkdir(parents=True)
    with closing(ShardWriter(folder, shard_bytes)) as writer:
        for sample in samples:
            writer.write(sample)
        return writer.finish("test", 7, extra, window_bytes=30_000)


def write_indexes(folder: Path, class_ids: Sequence[tuple[str, Sequence[int]]], num_classes: int) -> Manifest:
    """Indexes, classes and manifest of a folder whose tars are holes of the right size.

    Args:
        folder: Created.
        class_ids: Split and class id of each sample, for each shard.
        num_classes: All classes.
    """
    folder.mkdir(parents=True)
    shards, key = [], 0
    counts: dict[str, dict[int, int]] = {}
    for number, (split, ids) in enumerate(class_ids):
        table = np.zeros(len(ids), INDEX_DTYPE)
        table["class_id"], table["key"] = ids, np.arange(key, key + len(ids))
        table["block"], table["meta_block"] = 1 + 4 * np.arange(len(ids)), 3 + 4 * np.arange(len(ids))
        table["length"], table["meta_length"] = 500, 90
        key += len(ids)
        content = encode_index(table.tolist())
        (folder / f"{number}.npy").write_bytes(content)
        size = (4 * len(ids) + 2) * 512
        with (folder / f"{number}.tar").open("wb") as file:
            file.truncate(size)
        digest = hashlib.sha256(content).hexdigest()
        shards.append(ShardInfo(f"{number}.tar", size, "0" * 64, len(ids), f"{number}.npy", digest, split))
        for class_id in ids:
            counts.setdefault(split, {}).setdefault(int(class_id), 0)
            counts[split][int(class_id)] += 1
    infos = [
        ClassInfo(
            i,
            f"class {i}",
            next((s for s in counts if i in counts[s]), "train"),
            sum(c.get(i, 0) for c in counts.values()),
        )
        for i in range(num_classes)
    ]
    listed = encode_classes(infos)
    (folder / "classes.jsonl").write_bytes(listed)
    file = ClassesFile("classes.jsonl", num_classes, hashlib.sha256(listed).hexdigest())
    splits = {split: {"classes": len(c), "images": sum(c.values())} for split, c in counts.items()}
    manifest = Manifest(2, "holes", 0, 1 << 20, tuple(shards), file, splits)
    manifest.save(folder)
    return manifest


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Change the JSON of a manifest; signed, its own checksum fits again."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    if sign:
        raw["manifest_sha256"] = own_checksum(raw)
    path.write_bytes(encode_manifest(raw))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)
