"""Writes WebDataset tars with indexes and a manifest; a folder appears only when it is whole.

A shard folder holds:
- `shard-NNNNNN.tar`: plain tars that any WebDataset reader can stream. A sample's key is its number
  with 9 digits, its members are KEY.jpg or KEY.png and KEY.json {class_id, class_name, split,
  source}. All samples of a class lie together, and a tar holds one split.
- `shard-NNNNNN.index.npy`: where each sample lies in that tar (`gcahng.data.shards.index`).
- `manifest.json`: what is whole (`gcahng.data.shards.manifest`).
"""

import hashlib
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from gcahng.data.shards.index import KEY_DIGITS, encode_index, key_text
from gcahng.data.shards.manifest import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    ClassInfo,
    Manifest,
    ShardInfo,
)
from gcahng.errors import DataError

_TAR_BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """One sample to write.

    Attributes:
        image: Encoded image.
        extension: "jpg" or "png".
        class_name: Class, by name.
        split: Split, by name.
        source: Where the image came from.
    """

    image: bytes
    extension: str
    class_name: str
    split: str
    source: str


class PartialFolder:
    """A folder written beside its final place and renamed at the end.

    As a context manager it removes the partial folder on any exception, so that a failed
    conversion leaves nothing. A killed process leaves `OUT.partial`, which no reader accepts: it
    has no manifest.

    Args:
        out: Final place.
        overwrite: Replace a shard folder that exists there, and what a killed conversion left.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out = Path(out)
        self.overwrite = overwrite
        self.path = self.out.with_name(self.out.name + ".partial")

    def __enter__(self) -> Path:
        """Create the partial folder.

        Raises:
            DataError: Something is in the way.
        """
        self._check_out()
        if self.overwrite and self.path.exists():
            shutil.rmtree(self.path)
        if self.path.exists():
            raise DataError(
                f"{self.path} exists: another conversion is writing there or one was killed. "
                "Wait for it, or delete the folder, or pass --overwrite."
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()  # fails if another conversion made it since
        except OSError as error:
            raise DataError(f"Cannot create {self.path} ({error.strerror}). Give another --out.") from None
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        try:
            self._publish()
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def _check_out(self) -> None:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not self.overwrite:
            raise DataError(f"{self.out} exists already. Give another --out, or pass --overwrite to replace it.")
        if not (self.out / MANIFEST_NAME).is_file():
            raise DataError(
                f"{self.out} exists and is not a shard folder (it has no {MANIFEST_NAME}), so "
                "--overwrite does not delete it. Give another --out or delete it yourself."
            )

    def _publish(self) -> None:
        self._check_out()
        old = None
        if self.out.exists():
            old = self.out.with_name(f"{self.out.name}.old-{os.getpid()}")
            self.out.rename(old)
        self.path.rename(self.out)
        _sync(self.out.parent)
        if old is not None:
            shutil.rmtree(old)


class ShardWriter:
    """Writes samples, which come class by class, into tars of about `shard_bytes`.

    A tar holds one split. Class ids count classes in order of appearance.

    Args:
        directory: Existing empty folder.
        shard_bytes: A new tar starts once the current one has this many bytes.
    """

    def __init__(self, directory: Path, shard_bytes: int = 256 << 20) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.num_samples = 0
        self._shards: list[ShardInfo] = []
        self._tar: _TarFile | None = None
        self._class_ids: dict[str, int] = {}
        self._class_splits: list[dict[str, int]] = []

    def write(self, sample: Sample) -> None:
        """Append one sample."""
        class_id = self._class_id(sample)
        tar = self._tar
        if tar is None or tar.split != sample.split or tar.size >= self.shard_bytes:
            self._finish_tar()
            tar = self._tar = _TarFile(self.directory, len(self._shards), sample.split)
        tar.write(self.num_samples, class_id, sample)
        self.num_samples += 1
        splits = self._class_splits[class_id]
        splits[sample.split] = splits.get(sample.split, 0) + 1

    def finish(self, source: str, seed: int, extra: dict[str, Any]) -> Manifest:
        """Write the last tar and the manifest."""
        self._finish_tar()
        classes = [
            ClassInfo(class_id, name, next(iter(splits)), sum(splits.values()))
            for (name, class_id), splits in zip(self._class_ids.items(), self._class_splits, strict=True)
        ]
        counts: dict[str, dict[str, int]] = {}
        for shard in self._shards:
            counts.setdefault(shard.split, {"classes": 0, "images": 0})
        for splits in self._class_splits:
            for split, images in splits.items():
                counts[split]["classes"] += 1
                counts[split]["images"] += images
        manifest = Manifest(MANIFEST_VERSION, source, seed, tuple(self._shards), tuple(classes), counts, extra)
        manifest.save(self.directory)
        _sync(self.directory / MANIFEST_NAME)
        _sync(self.directory)
        return manifest

    def close(self) -> None:
        """Close the open tar without adding it to a manifest (after an error)."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _class_id(self, sample: Sample) -> int:
        class_id = self._class_ids.setdefault(sample.class_name, len(self._class_ids))
        if class_id == len(self._class_splits):
            self._class_splits.append({})
        return class_id

    def _finish_tar(self) -> None:
        if self._tar is not None:
            tar, self._tar = self._tar, None
            self._shards.append(tar.finish())


class _TarFile:
    """One tar under construction, with the rows of its index."""

    def __init__(self, directory: Path, number: int, split: str) -> None:
        import webdataset  # imports torch; readers and worker processes do without

        self.directory = directory
        self.name = f"shard-{number:06d}.tar"
        self.index_name = f"shard-{number:06d}.index.npy"
        self.split = split
        self._file = (directory / self.name).open("wb")
        self._stream = _HashingStream(self._file)
        self._writer = webdataset.TarWriter(self._stream, encoder=False, mtime=0)
        self._rows: list[tuple[int, ...]] = []
        self.size = 0

    def write(self, key: int, class_id: int, sample: Sample) -> None:
        meta = {
            "class_id": class_id,
            "class_name": sample.class_name,
            "split": sample.split,
            "source": sample.source,
        }
        members = {
            sample.extension: sample.image,
            "json": json.dumps(meta).encode(),
        }
        offsets = {}
        for extension in sorted(members):  # the order in which TarWriter writes them
            offsets[extension] = self.size + _TAR_BLOCK
            blocks = -(-len(members[extension]) // _TAR_BLOCK)
            self.size += (1 + blocks) * _TAR_BLOCK
        assert len(key_text(key)) == KEY_DIGITS, "more samples than a key has digits for"
        self._writer.write({"__key__": key_text(key), **members})
        assert self._writer.tarstream.offset == self.size, "a tar header is not one block"
        self._rows.append(
            (
                key,
                class_id,
                zlib.crc32(sample.image),
                offsets[sample.extension],
                len(sample.image),
                offsets["json"],
                len(members["json"]),
            )
        )

    def close(self) -> None:
        self._writer.close()
        self._file.close()

    def finish(self) -> ShardInfo:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = encode_index(self._rows)
        index_path = self.directory / self.index_name
        index_path.write_bytes(index)
        _sync(index_path)
        return ShardInfo(
            name=self.name,
            bytes=self._stream.size,
            sha256=self._stream.digest.hexdigest(),
            num_samples=len(self._rows),
            index_name=self.index_name,
            index_sha256=hashlib.sha256(index).hexdigest(),
            split=self.split,
        )


class _HashingStream:
    """Passes writes on and keeps their checksum, so that no tar is read a second time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self._file.write(content)


def _sync(path: Path) -> None:
    """Force a file or folder to disk: a rename must not be remembered before its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
