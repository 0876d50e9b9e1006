"""Reads one tar from its first to its last byte and compares it with its index, the manifest and the classes.

A damaged header does not end the walk, as it does in streaming readers: the index tells where the next member begins.
"""

import json
import tarfile
import zlib
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gcahng.data.images.decode import decode_image
from gcahng.data.shards.class_list import CLASSES_NAME, ClassList
from gcahng.data.shards.index import KEY_DIGITS, TAR_BLOCK, key_text, load_index
from gcahng.data.shards.manifest import ShardInfo
from gcahng.data.shards.tar_parts import IndexedMember, IndexedMembers, TarStream, check_file, parse_header
from gcahng.data.stores import FileFacts, ShardStore
from gcahng.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "png")
META_EXTENSION = "json"
MAX_FAULTS = 20
"""Faults of one shard that are listed; all are counted."""

_META_TYPES = {"class_id": int, "class_name": str, "split": str, "source": str}


@dataclass(frozen=True, eq=False)
class TarReport:
    """What was found in one tar.

    Attributes:
        faults: The first `MAX_FAULTS` of them, one sentence each.
        num_faults: All.
        num_bytes: Bytes that were read.
        keys: (n,) uint32, the number in the names of each sample, in tar order.
        class_ids: (n,) int64, the class of each as the index says, or its JSON member without one; -1 for none.
    """

    faults: tuple[str, ...]
    num_faults: int
    num_bytes: int
    keys: NDArray[np.uint32]
    class_ids: NDArray[np.int64]


def verify_tar(store: ShardStore, shard: ShardInfo, classes: ClassList | None, decode: bool) -> TarReport:
    """Compare a tar and its index with everything that is known of them.

    Args:
        store: Where they are.
        shard: What the manifest says.
        classes: The list of classes; None if it is damaged itself.
        decode: Decode every image too.
    """
    faults = _Faults(shard.name)
    walk = _Walk(shard, _index(store, shard, faults), classes, decode, faults)
    stream = None
    try:
        size = store.size(shard.name)
        if size != shard.bytes:
            kind = "is cut" if size < shard.bytes else "is too long"
            faults.add_first(f"{kind}: expected {shard.bytes} bytes, got {size}.")
        else:  # a remote store compares what it fetches with these
            store.announce({shard.name: FileFacts(shard.bytes, shard.sha256)})
        stream = TarStream(store, shard.name, size)
        walk.run(stream)
        if size == shard.bytes and (got := stream.sha256()) != shard.sha256:
            faults.add_first(f"is damaged: expected sha256 {shard.sha256}, got {got}.")
    except DataError as error:
        faults.add_first(f"cannot be read: {error}")
    return TarReport(
        tuple(faults.listed),
        faults.count,
        stream.position if stream else 0,
        np.array(walk.keys, dtype=np.uint32),
        np.array(walk.class_ids, dtype=np.int64),
    )


class _Faults:
    def __init__(self, name: str) -> None:
        self._name = name
        self.count = 0
        self.listed: list[str] = []

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.listed) < MAX_FAULTS:
            self.listed.append(f"{self._name}: {text}")

    def add_first(self, text: str) -> None:
        """Of the file as a whole: listed before those of its members, however many these are."""
        self.count += 1
        self.listed = [f"{self._name}: {text}", *self.listed][:MAX_FAULTS]


class _Member(NamedTuple):
    key: str
    extension: str
    content: bytes
    row: int | None  # of the index


class _Walk:
    """The walk over the members of one tar; `keys` and `class_ids` are what it found."""

    def __init__(
        self,
        shard: ShardInfo,
        table: NDArray[np.void] | None,
        classes: ClassList | None,
        decode: bool,
        faults: _Faults,
    ) -> None:
        self._shard, self._classes, self._decode, self._faults = shard, classes, decode, faults
        self._table = table
        self._places = IndexedMembers(table)
        self._last: _Member | None = None  # the first member of a sample, waiting for its second
        self.keys: array[int] = array("I")
        self.class_ids: array[int] = array("q")

    def run(self, stream: TarStream) -> None:
        """Walk to the end of the archive."""
        while self._step(stream):
            pass
        if self._last is not None:
            self._faults.add(f"sample {self._last.key} has no second member.")
        lost = self._places.until(None)
        if lost:
            self._missing(lost[0], f" (and of {len(lost) - 1} more members after it)" if len(lost) > 1 else "")
        if len(self.keys) != self._shard.num_samples:
            self._faults.add(f"expected {self._shard.num_samples} whole samples, got {len(self.keys)}.")

    def _step(self, stream: TarStream) -> bool:
        """One header and its content; whether there may be another."""
        start = stream.position
        for passed in self._places.until(start):
            self._missing(passed)
        place = self._places.at(start)
        header = stream.take(TAR_BLOCK)
        if len(header) < TAR_BLOCK:
            self._faults.add(f"ends at byte {stream.position} without the two empty blocks that end a tar.")
            return False
        if not any(header) and place is None and self._places.is_done:
            self._end(stream, start)
            return False
        try:
            name, size = parse_header(header)
            if size > stream.size - stream.position:
                raise DataError(f"it says {size} bytes, and {stream.size - stream.position} are left in the tar")
        except DataError as error:
            self._faults.add(f"the header at byte {start}{self._member_name(place)} is damaged: {error}.")
            if place is None:
                return self._go_on(stream)
            name, size = "", place.size
        else:
            if place is None and self._table is not None:
                self._faults.add(f"member {name} at byte {start} is not in the index.")
            elif place is not None and place.size != size:
                self._faults.add(f"member {name}: the index says {place.size} bytes, the tar {size}.")
        return self._content(stream, name, size, place)

    def _content(self, stream: TarStream, name: str, size: int, place: IndexedMember | None) -> bool:
        shown = name or f"at byte {stream.position}"
        content = stream.take(size)
        padding = stream.take(-size % TAR_BLOCK)
        if len(content) < size or len(padding) < -size % TAR_BLOCK:
            self._faults.add(f"ends inside of member {shown}: expected {size} bytes of it, got {len(content)}.")
            return False
        if any(padding):
            self._faults.add(f"the bytes after member {shown}, which fill up its block, are not zero.")
        key, _, extension = name.partition(".")
        if not name and place is not None:  # its header is damaged: believe the index
            key, extension = self._name_from_index(place)
        elif not _is_name(key, extension):
            self._faults.add(
                f"member {shown}: expected a key of {KEY_DIGITS} digits and .{', .'.join(IMAGE_EXTENSIONS)} or "
                f".{META_EXTENSION}."
            )
            return True
        self._pair(_Member(key, extension, content, place.row if place else None))
        return True

    def _name_from_index(self, place: IndexedMember) -> tuple[str, str]:
        assert self._table is not None
        row = self._table[place.row]
        # The members stand in alphabetical order: an image after its JSON member is a PNG.
        image = IMAGE_EXTENSIONS[int(row["block"] > row["meta_block"])]
        return key_text(int(row["key"])), image if place.is_image else META_EXTENSION

    def _pair(self, member: _Member) -> None:
        """Put the two members of a sample together."""
        first, self._last = self._last, None
        if first is not None and first.key != member.key:
            self._faults.add(f"sample {first.key} has no second member.")
            first = None
        if first is None:
            self._last = member
            return
        extensions = [first.extension, member.extension]
        if extensions != sorted(extensions) or extensions.count(META_EXTENSION) != 1:
            self._faults.add(
                f"sample {member.key}: expected an image and a .{META_EXTENSION} in alphabetical order, "
                f"got .{extensions[0]} and .{extensions[1]}."
            )
            return
        image, meta = (first, member) if member.extension == META_EXTENSION else (member, first)
        self._sample(image, meta)

    def _sample(self, image: _Member, meta: _Member) -> None:
        self.keys.append(int(image.key))
        row = self._row(image, meta)
        is_whole = True
        if row is not None:
            got, expected = zlib.crc32(image.content), int(row["crc32"])
            is_whole = got == expected
            if not is_whole:
                self._faults.add(
                    f"the image of sample {image.key} is damaged: expected crc32 {expected:08x}, got {got:08x}."
                )
        if self._decode and is_whole:
            try:
                decode_image(image.content, name=f"the image of sample {image.key}")
            except DataError as error:
                self._faults.add(str(error))
        class_id = self._meta(meta)
        if row is not None and class_id is not None and class_id != int(row["class_id"]):
            self._faults.add(f"sample {meta.key}: the index says class {row['class_id']}, its JSON member {class_id}.")
        if row is not None:  # its checksum was right
            class_id = int(row["class_id"])
        self.class_ids.append(-1 if class_id is None else class_id)

    def _row(self, image: _Member, meta: _Member) -> np.void | None:
        """The row of the index that both members belong to."""
        if self._table is None or image.row is None or meta.row is None:
            return None
        row: np.void = self._table[image.row]
        if image.row != meta.row:
            self._faults.add(f"sample {image.key}: the index gives its two members to different samples.")
            return None
        if int(row["key"]) != int(image.key):
            self._faults.add(f"sample {image.key}: the index calls it {key_text(int(row['key']))}.")
        return row

    def _meta(self, member: _Member) -> int | None:
        """The class that a JSON member says, if it is one."""
        try:
            meta = json.loads(member.content)
        except (ValueError, RecursionError):
            meta = None
        if not _is_meta(meta):
            self._faults.add(
                f"the JSON member of sample {member.key} is damaged: expected {', '.join(_META_TYPES)}, "
                f"got {member.content[:80]!r}."
            )
            return None
        class_id: int = meta["class_id"]
        if meta["split"] != self._shard.split:
            self._faults.add(
                f"sample {member.key}: expected split {self._shard.split!r}, its JSON member says {meta['split']!r}."
            )
        if self._classes is None:
            return class_id
        if not 0 <= class_id < len(self._classes):
            self._faults.add(f"sample {member.key}: expected a class of {len(self._classes)}, got class {class_id}.")
        elif (name := self._classes[class_id].name) != meta["class_name"]:
            self._faults.add(
                f"sample {member.key}: {CLASSES_NAME} calls class {class_id} {name!r}, its JSON member "
                f"{meta['class_name']!r}."
            )
        return class_id

    def _end(self, stream: TarStream, start: int) -> None:
        """The empty blocks after the last member, and nothing more."""
        expected = -(-(start + 2 * TAR_BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        if not stream.pass_to(stream.size):
            self._faults.add(f"has bytes after its last member, which ends at {start}, that are not zero.")
        if stream.size != expected:
            self._faults.add(f"must end at byte {expected}, after its last member and empty blocks: got {stream.size}.")

    def _go_on(self, stream: TarStream) -> bool:
        """After a header that says nothing: where the index has the next member."""
        following = self._places.next_header
        if following is None:
            return False
        stream.pass_to(following)
        return True

    def _missing(self, place: IndexedMember, more: str = "") -> None:
        self._faults.add(f"the header at byte {place.header}{self._member_name(place)} is missing{more}.")

    def _member_name(self, place: IndexedMember | None) -> str:
        if place is None or self._table is None:
            return ""
        kind = "image" if place.is_image else "JSON member"
        return f", of the {kind} of sample {key_text(int(self._table[place.row]['key']))}"


def _index(store: ShardStore, shard: ShardInfo, faults: _Faults) -> NDArray[np.void] | None:
    try:
        check_file(store, shard.index_name, shard.index_sha256)
        return load_index(store.local_copy(shard.index_name, shard.index_sha256), shard)
    except DataError as error:
        faults.add(f"its index is damaged, and the tar was checked without it: {error}")
        return None


def _is_name(key: str, extension: str) -> bool:
    is_key = len(key) == KEY_DIGITS and key.isascii() and key.isdigit()
    return is_key and extension in (*IMAGE_EXTENSIONS, META_EXTENSION)


def _is_meta(meta: Any) -> bool:
    if not isinstance(meta, dict):
        return False
    columns = meta.get("columns", {})
    types = {name: type(value) for name, value in meta.items() if name != "columns"}
    are_texts = isinstance(columns, dict) and all(isinstance(value, str) for value in columns.values())
    return types == _META_TYPES and are_texts
