"""Writes a shard folder: WebDataset tars with indexes, a list of classes and a manifest.

A shard folder holds:
- `shard-NNNNNN.tar`: plain tars that any WebDataset reader can stream. A sample's key is its number
  with 9 digits, its members are KEY.jpg or KEY.png and KEY.json {class_id, class_name, split,
  source}, and `columns` where more is known of the image. All samples of a class lie together, and a tar holds one
  split.
- `shard-NNNNNN.index.npy`: where each sample lies in that tar (`gcahng.data.shards.index`).
- `classes.jsonl`: one line per class (`gcahng.data.shards.class_list`).
- `manifest.json`: what is whole (`gcahng.data.shards.manifest`).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gcahng.data.shards.class_list import CLASSES_NAME, ClassInfo, encode_classes
from gcahng.data.shards.disk import disk_errors, sync
from gcahng.data.shards.manifest import MANIFEST_NAME, MANIFEST_VERSION, ClassesFile, Manifest, ShardInfo
from gcahng.data.shards.tar_file import Sample, TarFile

__all__ = ["DEFAULT_SHARD_BYTES", "DEFAULT_WINDOW_BYTES", "Sample", "ShardWriter"]

DEFAULT_SHARD_BYTES = 256 << 20
DEFAULT_WINDOW_BYTES = 8 << 30


class ShardWriter:
    """Writes samples, which come class by class, into tars of about `shard_bytes`.

    A tar holds one split. A new tar starts with a class, once the present one has `shard_bytes`; inside of a class
    only once it has twice as many, so that a class lies in one tar unless it is big itself. Class ids count classes
    in order of appearance.

    Args:
        directory: Existing empty folder.
        shard_bytes: See above.
        on_tar: Called with every finished tar, once it is on disk.

    Attributes:
        num_samples: Samples so far.
    """

    def __init__(
        self,
        directory: Path,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        on_tar: Callable[[ShardInfo], None] | None = None,
    ) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.num_samples = 0
        self._on_tar = on_tar
        self._shards: list[ShardInfo] = []
        self._tar: TarFile | None = None
        self._class_name: str | None = None  # of the last sample
        self._class_ids: dict[str, int] = {}
        self._class_splits: list[dict[str, int]] = []

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """Finished tars."""
        return tuple(self._shards)

    def splits(self) -> dict[str, dict[str, int]]:
        """Split -> {"classes": count, "images": count}, of what has been written."""
        counts: dict[str, dict[str, int]] = {}
        for splits in self._class_splits:
            for split, images in splits.items():
                count = counts.setdefault(split, {"classes": 0, "images": 0})
                count["classes"] += 1
                count["images"] += images
        return counts

    def class_splits(self) -> Iterator[tuple[str, str]]:
        """Every class with every split that it has samples in."""
        for name, splits in zip(self._class_ids, self._class_splits, strict=True):
            yield from ((name, split) for split in splits)

    def resume(self, shards: Sequence[ShardInfo], written: Iterable[tuple[str, str]]) -> None:
        """Go on after tars that are in the folder already.

        Args:
            shards: These tars.
            written: Class name and split of every sample in them, in order.
        """
        assert not self._shards and not self.num_samples, "only a new writer can go on for another"
        for class_name, split in written:
            self._count(class_name, split)
        self._shards = list(shards)
        assert self.num_samples == sum(shard.num_samples for shard in shards)

    def write(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            DataError: The disk does not take it.
        """
        tar = self._tar
        if tar is None or self._is_full(tar, sample):
            self.end_tar()
            tar = self._tar = TarFile(self.directory, len(self._shards), sample.split)
        key = self.num_samples
        tar.write(key, self._count(sample.class_name, sample.split), sample)
        self._class_name = sample.class_name

    def end_tar(self) -> None:
        """Finish the present tar, if there is one."""
        if self._tar is None:
            return
        tar, self._tar = self._tar, None
        try:
            shard = tar.finish()
        finally:
            tar.close()
        self._shards.append(shard)
        if self._on_tar:
            self._on_tar(shard)

    def finish(
        self,
        source: str,
        seed: int,
        extra: dict[str, Any],
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        class_columns: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Manifest:
        """Write the last tar, the list of classes and the manifest.

        Args:
            source: Name of the source.
            seed: Of the conversion.
            extra: See `Manifest`.
            window_bytes: See `Manifest`.
            class_columns: Class name -> what else is known of it.

        Raises:
            DataError: The disk does not take it.
        """
        self.end_tar()
        columns = class_columns or {}
        classes = [
            ClassInfo(class_id, name, next(iter(splits)), sum(splits.values()), columns.get(name, {}))
            for (name, class_id), splits in zip(self._class_ids.items(), self._class_splits, strict=True)
        ]
        listed = encode_classes(classes)
        file = ClassesFile(CLASSES_NAME, len(classes), hashlib.sha256(listed).hexdigest())
        manifest = Manifest(MANIFEST_VERSION, source, seed, window_bytes, self.shards, file, self.splits(), extra)
        with disk_errors(self.directory):
            (self.directory / CLASSES_NAME).write_bytes(listed)
            sync(self.directory / CLASSES_NAME)
            manifest.save(self.directory)
            sync(self.directory / MANIFEST_NAME)
            sync(self.directory)
        return manifest

    def close(self) -> None:
        """Close the open tar without adding it to a manifest (after an error)."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _is_full(self, tar: TarFile, sample: Sample) -> bool:
        limit = self.shard_bytes if sample.class_name != self._class_name else 2 * self.shard_bytes
        return tar.split != sample.split or tar.size >= limit

    def _count(self, class_name: str, split: str) -> int:
        class_id = self._class_ids.setdefault(class_name, len(self._class_ids))
        if class_id == len(self._class_splits):
            self._class_splits.append({})
        splits = self._class_splits[class_id]
        splits[split] = splits.get(split, 0) + 1
        self.num_samples += 1
        return class_id
