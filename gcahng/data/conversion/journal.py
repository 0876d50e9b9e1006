"""The journal of a conversion: what is finished, so that a killed conversion can go on.

`journal.jsonl` begins with a line for the conversion as a whole (its fingerprint) and gets one line per finished tar.
A line is forced to disk after the files it speaks of; a line that was cut by a crash counts as not written.
`digests.bin` has 16 bytes per image, in the order of the tars (see `gcahng.data.conversion.duplicates`).
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gcahng.data.conversion.duplicates import DIGEST_BYTES
from gcahng.data.shards.disk import disk_errors, sync
from gcahng.data.shards.manifest import ShardInfo

JOURNAL_NAME = "journal.jsonl"
DIGESTS_NAME = "digests.bin"
NEW_JOURNAL_NAME = "journal.jsonl.new"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedTar:
    """One finished tar.

    Attributes:
        shard: The tar and its index.
        items: How many items, in writing order, are in this tar or an earlier one or were left out before its end.
        left_out: Places of those left out since the tar before.
        digests_sha256: Checksum of the tar's part of `digests.bin`.
    """

    shard: ShardInfo
    items: int
    left_out: tuple[int, ...]
    digests_sha256: str


class Journal:
    """The journal in `folder`, as it is on disk.

    Args:
        folder: Where the journal and the digests are.

    Attributes:
        fingerprint: Of the conversion that wrote it; None if there is no journal.
        overwrite: That conversion was to replace a shard folder.
        tars: Finished tars, in order.
        manifest_sha256: Of the manifest, once all is ready to be published.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] | None = None
        self.overwrite = False
        self.tars: list[FinishedTar] = []
        self.manifest_sha256 = ""
        self._read()

    @property
    def digests_path(self) -> Path:
        """Where the digests of the images are."""
        return self.folder / DIGESTS_NAME

    @property
    def num_samples(self) -> int:
        """Images in all finished tars."""
        return sum(tar.shard.num_samples for tar in self.tars)

    def start(self, fingerprint: dict[str, Any], overwrite: bool) -> None:
        """Begin a journal for another conversion; the present one is forgotten."""
        self.fingerprint, self.overwrite = fingerprint, overwrite
        self.keep(0)

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tars, and anything unfinished."""
        self.tars = self.tars[:count]
        self.manifest_sha256 = ""
        header = {"fingerprint": self.fingerprint, "overwrite": self.overwrite}
        lines = [_line(header), *(_line(asdict(tar)) for tar in self.tars)]
        new = self.folder / NEW_JOURNAL_NAME
        with disk_errors(self.folder):
            new.write_bytes(b"".join(lines))
            sync(new)
            new.rename(self.folder / JOURNAL_NAME)
            with self.digests_path.open("ab") as file:
                file.truncate(DIGEST_BYTES * self.num_samples)
            sync(self.folder)

    def add(self, shard: ShardInfo, items: int, left_out: list[int], digests: bytes) -> None:
        """Note a finished tar, whose files are on disk.

        Args:
            shard: The tar.
            items: See `FinishedTar`.
            left_out: See `FinishedTar`.
            digests: Digests of its images, in order.
        """
        assert len(digests) == DIGEST_BYTES * shard.num_samples
        tar = FinishedTar(shard, items, tuple(left_out), hashlib.sha256(digests).hexdigest())
        with disk_errors(self.folder):
            _append(self.digests_path, digests)
            _append(self.folder / JOURNAL_NAME, _line(asdict(tar)))
        self.tars.append(tar)

    def complete(self, manifest_sha256: str) -> None:
        """Note that everything is on disk and only the folder's new name is missing."""
        with disk_errors(self.folder):
            _append(self.folder / JOURNAL_NAME, _line({"manifest_sha256": manifest_sha256}))
        self.manifest_sha256 = manifest_sha256

    def _read(self) -> None:
        try:
            content = (self.folder / JOURNAL_NAME).read_bytes()
        except FileNotFoundError:
            return
        *lines, torn = content.split(b"\n")
        for number, line in enumerate(lines):
            try:
                self._take(number, json.loads(line))
            except (ValueError, TypeError, KeyError):
                log.warning("%s is damaged in line %d: continuing from there.", self.folder / JOURNAL_NAME, number + 1)
                return
        if torn:
            log.info("The last line of %s was cut: its tar is written again.", self.folder / JOURNAL_NAME)

    def _take(self, number: int, line: dict[str, Any]) -> None:
        if number == 0:
            self.fingerprint, self.overwrite = line["fingerprint"], line["overwrite"]
        elif "manifest_sha256" in line:
            self.manifest_sha256 = line["manifest_sha256"]
        else:
            shard = ShardInfo(**line["shard"])
            self.tars.append(FinishedTar(shard, line["items"], tuple(line["left_out"]), line["digests_sha256"]))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
