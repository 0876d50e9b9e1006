"""`index.json` of an index folder: what its embeddings are, what made them, and the checksums of its files.

An index folder of layout `npy` holds

    embeddings.npy    (n, D) float32, to be mapped into memory
    labels.npy        (n,) int64 class ids
    rows.jsonl        one line per row: key, shard, label, class_name
    row_offsets.npy   (n + 1,) int64: where each line of rows.jsonl begins, and its end

and of layout `parquet` one file `embeddings.parquet` with the columns key, shard, label, class_name and embedding.
File names are fixed: none is ever taken from `index.json`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gcahng.errors import DataError

FORMAT = "gcahng-index"
VERSION = 1
INDEX = "index.json"
EMBEDDINGS = "embeddings.npy"
LABELS = "labels.npy"
ROWS = "rows.jsonl"
OFFSETS = "row_offsets.npy"
PARQUET = "embeddings.parquet"
PARTIAL = ".partial"
"""Behind the name of an index folder that is being made."""
LAYOUTS: dict[str, tuple[str, ...]] = {"npy": (EMBEDDINGS, LABELS, ROWS, OFFSETS), "parquet": (PARQUET,)}

_REPAIR = "Restore the folder, or make it again with launch/embed.py."
_MAX_BYTES = 64 << 20
_MAX_DIM = 1 << 20
# Where things lie says nothing of what they are: both may have been moved.
_PLACES = ("checkpoint.path", "data.location")


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and sha256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class IndexInfo:
    """What `index.json` says.

    Attributes:
        layout: `npy` or `parquet`.
        count: n, rows.
        dim: D, channels.
        normalised: Whether every embedding has length 1.
        made_with: All that decides the embeddings: checkpoint, data, transform, precision, batches.
        files: Name -> size and checksum.
    """

    layout: str
    count: int
    dim: int
    normalised: bool
    made_with: Mapping[str, Any]
    files: Mapping[str, FileInfo]

    @property
    def checkpoint(self) -> Mapping[str, Any]:
        """path, step, metric_model_sha256 and model_sha256 of the checkpoint."""
        part: Mapping[str, Any] = self.made_with["checkpoint"]
        return part

    @property
    def data(self) -> Mapping[str, Any]:
        """Which images they are; `kind` is "shards" or "tars"."""
        part: Mapping[str, Any] = self.made_with["data"]
        return part

    def text(self) -> str:
        """The content of the file."""
        return json.dumps({"format": FORMAT, "version": VERSION} | asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def load(folder: Path) -> "IndexInfo":
        """Read and check `index.json`, and the sizes of the files it lists.

        Raises:
            DataError: It is missing, damaged or of another version, or a file is missing or has another size.
        """
        raw = read_json(folder / INDEX, _REPAIR)
        where = folder / INDEX
        if raw.get("format") != FORMAT or raw.get("version") != VERSION:
            raise DataError(
                f"{where}: expected format {FORMAT!r}, version {VERSION}, got {raw.get('format')!r:.60}, version "
                f"{raw.get('version')!r:.20}. {_REPAIR}"
            )
        info = _from_json(raw, where)
        for name, file in info.files.items():
            got = _size(folder / name)
            if got != file.bytes:
                raise DataError(
                    f"{folder / name} is {'missing' if got is None else 'damaged'}: expected {file.bytes} bytes, got "
                    f"{'none' if got is None else got}. {_REPAIR}"
                )
        return info


def is_index(folder: Path) -> bool:
    """Whether a folder says that it is an index, of whatever version."""
    try:
        return read_json(folder / INDEX, "").get("format") == FORMAT
    except DataError:
        return False


def read_json(file: Path, repair: str) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        DataError: It is missing, too large, or holds something else.
    """
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise DataError(f"{file} is too large: expected at most {_MAX_BYTES} bytes, got {size}. {repair}")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}). {repair}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is not readable JSON ({error}). {repair}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{file}: expected a JSON object, got {type(raw).__name__}. {repair}")
    return raw


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What of `made_with` is another thing, one text each; where things lie does not count."""
    old, new = _flat(saved), _flat(wanted)
    names = sorted(name for name in old.keys() | new.keys() if name not in _PLACES and old.get(name) != new.get(name))
    return [f"{name} was {old.get(name)!r:.70}, now {new.get(name)!r:.70}" for name in names]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.loads(json.dumps(value))  # as it is read back: lists, not tuples
    return found


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _from_json(raw: Mapping[str, Any], where: Path) -> IndexInfo:
    """Check types, ranges, and the entries that other code relies on."""

    def fault(what: str) -> DataError:
        return DataError(f"{where}: {what}. {_REPAIR}")

    layout = raw.get("layout")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise fault(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r:.60}")
    for name, high in (("count", 1 << 48), ("dim", _MAX_DIM)):
        if type(raw.get(name)) is not int or not 1 <= raw[name] <= high:
            raise fault(f"`{name}` must be a whole number from 1 to {high}, got {raw.get(name)!r:.60}")
    if type(raw.get("normalised")) is not bool:
        raise fault(f"`normalised` must be true or false, got {raw.get('normalised')!r:.60}")
    made_with, files = raw.get("made_with"), raw.get("files")
    parts = [made_with.get(name) for name in ("checkpoint", "data")] if isinstance(made_with, dict) else [None]
    if not isinstance(made_with, dict) or not all(isinstance(part, dict) for part in parts):
        raise fault("`made_with` must hold `checkpoint` and `data`")
    for name in ("path", "metric_model_sha256", "model_sha256"):
        if not isinstance(made_with["checkpoint"].get(name), str):
            raise fault(f"`made_with.checkpoint.{name}` must be a text")
    if not isinstance(files, dict) or sorted(files) != sorted(LAYOUTS[layout]):
        raise fault(f"`files` must list {', '.join(LAYOUTS[layout])}")
    listed = {}
    for name, entry in files.items():
        held = entry if isinstance(entry, dict) else {}
        if type(held.get("bytes")) is not int or not isinstance(held.get("sha256"), str):
            raise fault(f"`files.{name}` must hold bytes and sha256, got {entry!r:.60}")
        listed[name] = FileInfo(held["bytes"], held["sha256"])
    return IndexInfo(layout, raw["count"], raw["dim"], raw["normalised"], made_with, listed)
