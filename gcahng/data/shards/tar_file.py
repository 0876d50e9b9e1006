"""Writes one WebDataset tar and its index."""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gcahng.data.shards.disk import disk_errors, sync
from gcahng.data.shards.index import KEY_DIGITS, TAR_BLOCK, encode_index, key_text
from gcahng.data.shards.manifest import ShardInfo

_OWNER = "bigdata"  # as webdataset's own writer says


@dataclass(frozen=True)
class Sample:
    """One sample to write.

    Attributes:
        image: Encoded image.
        extension: "jpg" or "png".
        class_name: Class, by name.
        split: Split, by name.
        source: Where the image came from.
        columns: What else is known of the image.
    """

    image: bytes
    extension: str
    class_name: str
    split: str
    source: str
    columns: Mapping[str, str] = field(default_factory=dict)


class TarFile:
    """One tar under construction. The same samples give the same bytes, on any day and machine.

    Args:
        directory: Existing folder; the tar and its index are made there.
        number: Of the tar, from 0; its name has it.
        split: What all samples of the tar belong to.

    Attributes:
        size: Bytes so far.
    """

    def __init__(self, directory: Path, number: int, split: str) -> None:
        self.directory = directory
        self.name = f"shard-{number:06d}.tar"
        self.index_name = f"shard-{number:06d}.index.npy"
        self.split = split
        self.size = 0
        self._rows: list[tuple[int, ...]] = []
        self._sha256 = hashlib.sha256()
        with disk_errors(directory):
            self._file = (directory / self.name).open("wb")

    def write(self, key: int, class_id: int, sample: Sample) -> None:
        """Append one sample.

        Raises:
            DataError: The disk does not take it.
        """
        assert len(key_text(key)) == KEY_DIGITS, "more samples than a key has digits for"
        meta: dict[str, Any] = {
            "class_id": class_id,
            "class_name": sample.class_name,
            "split": sample.split,
            "source": sample.source,
        }
        if sample.columns:
            meta["columns"] = dict(sample.columns)
        members = {sample.extension: sample.image, "json": json.dumps(meta).encode()}
        blocks = {}
        with disk_errors(self.directory):
            for extension, content in sorted(members.items()):
                blocks[extension] = self._write_member(f"{key_text(key)}.{extension}", content)
        lengths = len(sample.image), len(members["json"])
        crc32 = zlib.crc32(sample.image)
        self._rows.append((key, class_id, crc32, blocks[sample.extension], lengths[0], blocks["json"], lengths[1]))

    def finish(self) -> ShardInfo:
        """Force the tar and its index to disk.

        Raises:
            DataError: The disk does not take them.
        """
        index = encode_index(self._rows)
        index_path = self.directory / self.index_name
        with disk_errors(self.directory):
            self._put(b"\0" * (2 * TAR_BLOCK))  # the end of a tar
            self._put(b"\0" * (-self.size % tarfile.RECORDSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            index_path.write_bytes(index)
            sync(index_path)
            sync(self.directory)
        return ShardInfo(
            name=self.name,
            bytes=self.size,
            sha256=self._sha256.hexdigest(),
            num_samples=len(self._rows),
            index_name=self.index_name,
            index_sha256=hashlib.sha256(index).hexdigest(),
            split=self.split,
        )

    def close(self) -> None:
        """Give up: close the file as it is."""
        with suppress(OSError):  # what a full disk refused is refused again
            self._file.close()

    def _write_member(self, name: str, content: bytes) -> int:
        """Append a member; returns the block in which its content begins."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uname, info.gname = len(content), 0o444, _OWNER, _OWNER
        self._put(info.tobuf(tarfile.USTAR_FORMAT))
        block = self.size // TAR_BLOCK
        self._put(content)
        self._put(b"\0" * (-len(content) % TAR_BLOCK))
        return block

    def _put(self, content: bytes) -> None:
        self._sha256.update(content)  # here, so that no tar is read a second time
        self.size += len(content)
        self._file.write(content)
