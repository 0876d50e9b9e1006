"""`manifest.json`: what a shard folder holds, written last and checked first.

A tar that was cut at a block boundary looks complete to a tar reader, so nothing in a folder is
believed that the manifest does not confirm: sizes and counts at every start, checksums on request.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from gcahng.errors import DataError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
_CONVERT_AGAIN = "Convert the data set again with `python -m shards.convert`."

Record = TypeVar("Record", "ShardInfo", "ClassInfo")


@dataclass(frozen=True)
class ShardInfo:
    """One tar file and its index.

    Attributes:
        name: File name of the tar inside the shard folder.
        bytes: Size of the tar in bytes.
        sha256: Checksum of the tar, hexadecimal.
        num_samples: Samples in the tar.
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
class ClassInfo:
    """One class.

    Attributes:
        class_id: Position in `Manifest.classes`; classes of the split "train" come first.
        name: Name given by the source, unique in the folder.
        split: The split of its first sample. "train" shares no class with another split; a query
            and a gallery split may share classes.
        num_samples: Samples over all shards.
    """

    class_id: int
    name: str
    split: str
    num_samples: int


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        version: Format version, `MANIFEST_VERSION`.
        source: Name of the source that was converted, for example "glyphs".
        seed: Seed of the conversion.
        shards: Tars in reading order.
        classes: Classes, `classes[i].class_id == i`.
        splits: Split name -> {"classes": count, "images": count}.
        extra: What the source and the conversion report beside: options, skipped, dropped and
            merged entries.
    """

    version: int
    source: str
    seed: int
    shards: tuple[ShardInfo, ...]
    classes: tuple[ClassInfo, ...]
    splits: dict[str, dict[str, int]]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    def digest(self) -> str:
        """Checksum (hexadecimal sha256) of all that decides which bytes a row stands for."""
        content = [[s.name, s.sha256, s.index_sha256] for s in self.shards]
        return hashlib.sha256(json.dumps([self.version, content]).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write `directory/manifest.json`."""
        text = json.dumps(asdict(self), indent=1)
        (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(directory: Path | str) -> "Manifest":
        """Read and check `directory/manifest.json`.

        Raises:
            DataError: The file is missing, is not JSON, has another version, or contradicts itself.
        """
        path = Path(directory) / MANIFEST_NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{path} is missing: expected a folder of shards, got "
                f"{'a folder without a manifest' if path.parent.is_dir() else 'no such folder'}. "
                f"Either the path is wrong or a conversion did not finish. {_CONVERT_AGAIN}"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not readable JSON ({error}). {_CONVERT_AGAIN}") from None
        manifest = _from_json(raw, path)
        _check_consistency(manifest, path)
        return manifest


def _from_json(raw: object, path: Path) -> Manifest:
    version = raw.get("version") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or version != MANIFEST_VERSION:
        raise DataError(f"{path}: expected version {MANIFEST_VERSION}, got {version!r}. {_CONVERT_AGAIN}")
    expected = {
        "source": str,
        "seed": int,
        "shards": list,
        "classes": list,
        "splits": dict,
        "extra": dict,
    }
    for name, kind in expected.items():
        if not isinstance(raw.get(name), kind):
            raise _malformed(path, f"`{name}`", kind.__name__, raw.get(name))
    for split, counts in raw["splits"].items():
        if not isinstance(counts, dict) or not all(type(counts.get(k)) is int for k in ("classes", "images")):
            raise _malformed(path, f"`splits.{split}`", "{classes: int, images: int}", counts)
    return Manifest(
        version=raw["version"],
        source=raw["source"],
        seed=raw["seed"],
        shards=tuple(_record(ShardInfo, row, path) for row in raw["shards"]),
        classes=tuple(_record(ClassInfo, row, path) for row in raw["classes"]),
        splits=raw["splits"],
        extra=raw["extra"],
    )


def _record(kind: type[Record], row: object, path: Path) -> Record:
    types = {f.name: f.type for f in fields(kind)}
    if not isinstance(row, Mapping) or {name: type(value) for name, value in row.items()} != types:
        wanted = "{" + ", ".join(f"{name}: {getattr(t, '__name__', t)}" for name, t in types.items()) + "}"
        raise _malformed(path, f"an entry of {kind.__name__}", wanted, row)
    return kind(**row)


def _malformed(path: Path, what: str, expected: str, got: object) -> DataError:
    return DataError(f"{path}: {what} is malformed: expected {expected}, got {str(got)[:200]}. {_CONVERT_AGAIN}")


def _check_consistency(manifest: Manifest, path: Path) -> None:
    def require(what: str, expected: object, got: object) -> None:
        if expected != got:
            raise DataError(f"{path} contradicts itself: {what}: expected {expected}, got {got}. {_CONVERT_AGAIN}")

    names = [name for shard in manifest.shards for name in (shard.name, shard.index_name)]
    # A manifest may come from elsewhere: a name with a path in it would read outside the folder.
    require(
        "file names with a path",
        [],
        [n for n in names if Path(n).name != n or n in ("", ".", "..")],
    )
    require("repeated file names", [], sorted(n for n, count in Counter(names).items() if count > 1))
    ids = [info.class_id for info in manifest.classes]
    require(
        "class ids",
        f"0..{len(ids) - 1}",
        f"0..{len(ids) - 1}" if ids == list(range(len(ids))) else ids[:20],
    )
    repeated = sorted(n for n, count in Counter(c.name for c in manifest.classes).items() if count > 1)
    require("repeated class names", [], repeated)
    require("samples of all classes", manifest.num_samples, sum(c.num_samples for c in manifest.classes))
    images: Counter[str] = Counter()
    for shard in manifest.shards:
        images[shard.split] += shard.num_samples
    require(
        "images per split",
        dict(images),
        {name: counts["images"] for name, counts in manifest.splits.items()},
    )
    homes = Counter(info.split for info in manifest.classes)
    require("splits of classes", [], sorted(set(homes) - set(manifest.splits)))
