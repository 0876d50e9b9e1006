"""`manifest.json`: what a shard folder holds, written last and checked first.

A tar that was cut at a block boundary looks complete to a tar reader, so nothing in a folder is
believed that the manifest does not confirm: sizes and counts at every start, checksums on request.
"""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from gcahng.data.stores.store import is_sha256
from gcahng.errors import DataError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 2
CHECKSUM_KEY = "manifest_sha256"
SHARED_KEY = "classes_shared_with_train"
"""In `Manifest.extra`: how many there are, where a conversion went on in spite of them."""
_MAX_BYTES = 1 << 30
_MAX_SHOWN = 300  # characters of what a file says, in messages
_MAX_NAME_BYTES = 180  # file systems allow 255; a cache puts a checksum in front
_CONVERT_AGAIN = "Convert the data set again with `python -m shards.convert`."

Record = TypeVar("Record", "ShardInfo", "ClassesFile")


@dataclass(frozen=True)
class ShardInfo:
    """One tar file and its index.

    Attributes:
        name: File name of the tar inside the shard folder.
        bytes: Size of the tar in bytes.
        sha256: Checksum of the tar, hexadecimal.
        num_samples: Samples in the tar, at least 1.
        index_name: File name of the index (see `gcahng.data.shards.index`).
        index_sha256: Checksum of the index, hexadecimal.
        split: The split that every sample of this tar belongs to.
    """

    name: str
    bytes: int
    sha256: str
    num_samples: int
    index_name: str
    index_sha256: str
    split: str


@dataclass(frozen=True)
class ClassesFile:
    """The file with one line per class (see `gcahng.data.shards.class_list`).

    Attributes:
        name: File name inside the shard folder.
        count: Classes.
        sha256: Checksum of the file, hexadecimal.
    """

    name: str
    count: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        version: Format version, `MANIFEST_VERSION`.
        source: Name of the source that was converted, for example "glyphs".
        seed: Seed of the conversion.
        window_bytes: Bytes of shards that an epoch plan draws batches from at a time.
        shards: Tars in reading order.
        classes: Where the classes are listed.
        splits: Split name -> {"classes": count, "images": count}.
        extra: What the source and the conversion report beside: options, skipped, dropped and
            merged entries.
    """

    version: int
    source: str
    seed: int
    window_bytes: int
    shards: tuple[ShardInfo, ...]
    classes: ClassesFile
    splits: dict[str, dict[str, int]]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    def digest(self) -> str:
        """Checksum (hexadecimal sha256) of all that decides which bytes a row stands for, and the windows."""
        content = [[s.name, s.sha256, s.index_sha256] for s in self.shards]
        parts = [self.version, self.window_bytes, self.classes.sha256, content]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write `directory/manifest.json`, with its own checksum."""
        content = json.loads(json.dumps(asdict(self)))  # as it will be read: all keys are texts
        content[CHECKSUM_KEY] = own_checksum(content)
        (directory / MANIFEST_NAME).write_bytes(encode_manifest(content))

    @staticmethod
    def load(path: Path | str, where: str | None = None) -> "Manifest":
        """Read and check a manifest.

        Args:
            path: The file, or its folder.
            where: What messages call the file, if it is a copy of another one.

        Raises:
            DataError: The file is missing, is not JSON, has another version, or contradicts itself.
        """
        raw, shown = read_manifest_json(path, where)
        manifest = _from_json(raw, shown)
        _check_consistency(manifest, shown)
        return manifest


def read_manifest_json(path: Path | str, where: str | None = None) -> tuple[dict[str, Any], str]:
    """The JSON object of a manifest of any version, unchecked, and what messages call it.

    Args:
        path: The file, or its folder.
        where: What messages call the file, if it is a copy of another one.

    Raises:
        DataError: The file is missing or is not a JSON object.
    """
    path = Path(path)
    file = path if os.path.isfile(path) else path / MANIFEST_NAME
    shown = where or str(file)
    try:
        raw = json.loads(_small_file(file, shown))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{shown} is missing: expected a folder of shards, got "
            f"{'a folder without a manifest' if path.is_dir() else 'no such folder'}. "
            f"Either the path is wrong or a conversion did not finish. {_CONVERT_AGAIN}"
        ) from None
    except OSError as error:
        raise DataError(f"{shown} cannot be read ({error.strerror}). Check the path and its permissions.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown} is not readable JSON ({error}). {_CONVERT_AGAIN}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{shown}: expected version {MANIFEST_VERSION}, got None. {_CONVERT_AGAIN}")
    return raw, shown


def _small_file(file: Path, shown: str) -> str:
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{shown} is no regular file. {_CONVERT_AGAIN}")
    if found.st_size > _MAX_BYTES:
        raise DataError(f"{shown} is too large: expected at most {_MAX_BYTES} bytes, got {found.st_size}.")
    return file.read_text(encoding="utf-8")


def encode_manifest(raw: Mapping[str, Any]) -> bytes:
    """The bytes of the file, from its JSON object."""
    return json.dumps(raw, indent=1).encode() + b"\n"


def own_checksum(raw: Mapping[str, Any]) -> str:
    """Checksum (hexadecimal sha256) of everything else that a manifest's JSON object says."""
    rest = {name: value for name, value in raw.items() if name != CHECKSUM_KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _from_json(raw: dict[str, Any], where: str) -> Manifest:
    if raw.get("version") != MANIFEST_VERSION:
        got = f"{raw.get('version')!r:.60}"
        raise DataError(f"{where}: expected version {MANIFEST_VERSION}, got {got}. {_CONVERT_AGAIN}")
    expected = {
        "source": str,
        "seed": int,
        "window_bytes": int,
        "shards": list,
        "classes": dict,
        "splits": dict,
        "extra": dict,
    }
    for name, kind in expected.items():
        if type(raw.get(name)) is not kind:
            raise _malformed(where, f"`{name}`", kind.__name__, raw.get(name))
    for split, counts in raw["splits"].items():
        if not isinstance(counts, dict) or not all(type(counts.get(k)) is int for k in ("classes", "images")):
            raise _malformed(where, f"`splits.{split[:60]}`", "{classes: int, images: int}", counts)
    return Manifest(
        version=raw["version"],
        source=raw["source"],
        seed=raw["seed"],
        window_bytes=raw["window_bytes"],
        shards=tuple(_record(ShardInfo, row, "an entry of `shards`", where) for row in raw["shards"]),
        classes=_record(ClassesFile, raw["classes"], "`classes`", where),
        splits=raw["splits"],
        extra=raw["extra"],
    )


def _record(kind: type[Record], row: object, what: str, where: str) -> Record:
    types = {f.name: f.type for f in fields(kind)}
    if not isinstance(row, Mapping) or {name: type(value) for name, value in row.items()} != types:
        wanted = "{" + ", ".join(f"{name}: {getattr(t, '__name__', t)}" for name, t in types.items()) + "}"
        raise _malformed(where, what, wanted, row)
    return kind(**row)


def _malformed(where: str, what: str, expected: str, got: object) -> DataError:
    return DataError(f"{where}: {what} is malformed: expected {expected}, got {str(got)[:200]}. {_CONVERT_AGAIN}")


def _check_consistency(manifest: Manifest, where: str) -> None:
    def require(what: str, expected: object, got: object) -> None:
        if expected != got:
            shown, found = (f"{value!s:.{_MAX_SHOWN}}" for value in (expected, got))
            raise DataError(f"{where} contradicts itself: {what}: expected {shown}, got {found}. {_CONVERT_AGAIN}")

    names = [name for shard in manifest.shards for name in (shard.name, shard.index_name)]
    names += [manifest.classes.name, MANIFEST_NAME]
    # A manifest may come from elsewhere: a name with a path in it would read outside the folder.
    require("file names with a path", [], [n for n in names if not _is_plain(n)])
    # A cache names its copies by their checksums.
    checksums = [text for shard in manifest.shards for text in (shard.sha256, shard.index_sha256)]
    require(
        "checksums other than 64 hexadecimal digits",
        [],
        [text[:100] for text in (*checksums, manifest.classes.sha256) if not is_sha256(text)],
    )
    require("repeated file names", [], sorted(n for n, count in Counter(names).items() if count > 1))
    require("shards without samples", [], [shard.name for shard in manifest.shards if shard.num_samples < 1])
    require("shards without bytes", [], [shard.name for shard in manifest.shards if shard.bytes < 1])
    if manifest.window_bytes < 1:
        require("window_bytes", "at least 1", manifest.window_bytes)
    images: Counter[str] = Counter()
    for shard in manifest.shards:
        images[shard.split] += shard.num_samples
    require(
        "images per split",
        dict(images),
        {name: counts["images"] for name, counts in manifest.splits.items()},
    )
    classes = {name: counts["classes"] for name, counts in manifest.splits.items()}
    count = manifest.classes.count
    require(
        "splits with fewer than 1 or more than all classes", [], [n for n, c in classes.items() if not 0 < c <= count]
    )
    if sum(classes.values()) < count:
        require("classes over all splits", f"at least {count}", sum(classes.values()))


def _is_plain(name: str) -> bool:
    """A file name without any folder, here and on other systems, and nothing a URL would read otherwise."""
    return (
        name not in ("", ".", "..")
        and not set(name) & set("/\\:?#%")
        and name.isprintable()  # no control characters, no halves of pairs
        and len(name.encode(errors="replace")) <= _MAX_NAME_BYTES
    )
