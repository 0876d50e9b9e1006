"""Parts of an unfinished index: each a file that is whole or absent, so that a killed run continues where it was.

A file is one line of JSON (the header), the embeddings as little-endian float32, and one line of JSON per row.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.disk import disk_errors, sync
from gcahng.errors import DataError

log = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 4096


class ImageRow(NamedTuple):
    """What is known of an image beside its embedding.

    Attributes:
        key: Unique in its tar.
        shard: Its tar.
        label: Class id of a shard folder; of plain tars the class as the tar spells it.
    """

    key: str
    shard: str
    label: int | str


@dataclass(frozen=True)
class PartHeader:
    """First line of a part.

    Attributes:
        rows: Images of the part.
        dim: D.
        last: Whether no other part of its unit follows.
        kind: Where labels came from, for messages; "" where there are none.
        rows_bytes: Bytes of the lines that stand after the embeddings.
        sha256: Of all that follows the header.
    """

    rows: int
    dim: int
    last: bool
    kind: str
    rows_bytes: int
    sha256: str


class PartFiles:
    """The parts in a folder, by unit (a split, or one tar) and number.

    Args:
        folder: Where they are.
        dim: D, channels of every part.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder = folder
        self.dim = dim

    def path(self, unit: int, part: int) -> Path:
        """Where a part is."""
        return self.folder / f"part-{unit:06d}-{part:08d}"

    def write(
        self, unit: int, part: int, embeddings: NDArray[np.float32], rows: Sequence[ImageRow], kind: str, last: bool
    ) -> None:
        """Write a part, forced to disk before it gets its name.

        Raises:
            DataError: The disk is full or refuses.
        """
        assert embeddings.shape == (len(rows), self.dim), "one embedding per row"
        content = embeddings.astype("<f4", copy=False).tobytes()
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        digest = hashlib.sha256(content)
        digest.update(lines)
        header = PartHeader(len(rows), self.dim, last, kind, len(lines), digest.hexdigest())
        target = self.path(unit, part)
        partial = target.with_name(f"{target.name}.partial")
        with disk_errors(self.folder):
            with partial.open("wb") as file:
                file.write(json.dumps(asdict(header)).encode() + b"\n")
                file.write(content)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            sync(self.folder)

    def header(self, unit: int, part: int) -> PartHeader | None:
        """First line of a part of the right size; None where there is none."""
        path = self.path(unit, part)
        try:
            with path.open("rb") as file:
                header, _ = self._header(file.readline(_MAX_HEADER_BYTES), path.stat().st_size)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s is damaged (%s): its images are embedded again.", path, error)
            return None
        return header

    def headers(self, unit: int) -> list[PartHeader]:
        """The unit's parts from the first on, as far as they go without a gap."""
        found: list[PartHeader] = []
        while not (found and found[-1].last) and (header := self.header(unit, len(found))) is not None:
            found.append(header)
        return found

    def read(self, unit: int, part: int) -> tuple[NDArray[np.float32], list[ImageRow]]:
        """Embeddings (m, D) and rows of a part.

        Raises:
            DataError: It is missing, or its bytes are not those that were written.
        """
        path = self.path(unit, part)
        try:
            content = path.read_bytes()
            header, start = self._header(content[: content.find(b"\n") + 1], len(content))
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(path, str(error)) from None
        if hashlib.sha256(memoryview(content)[start:]).hexdigest() != header.sha256:
            raise self._damaged(path, "its checksum differs")
        split = start + 4 * header.rows * self.dim
        embeddings = np.frombuffer(content, "<f4", header.rows * self.dim, start).reshape(header.rows, self.dim)
        return embeddings, [ImageRow(*json.loads(line)) for line in content[split:].splitlines()]

    def _header(self, line: bytes, size: int) -> tuple[PartHeader, int]:
        header = PartHeader(**json.loads(line))
        expected = len(line) + 4 * header.rows * header.dim + header.rows_bytes
        if header.dim != self.dim or size != expected:
            raise ValueError(f"expected {expected} bytes of {self.dim} channels, got {size} of {header.dim}")
        return header, len(line)

    @staticmethod
    def _damaged(path: Path, why: str) -> DataError:
        return DataError(f"{path} is damaged ({why}). Remove it and start the command again: it embeds what is absent.")
