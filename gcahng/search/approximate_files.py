"""An approximate index on disk: faiss's file, and beside it a small JSON file that says what it is."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gcahng.data.shards.disk import disk_errors, sync
from gcahng.errors import DataError
from gcahng.search.index_info import read_json

FORMAT, VERSION = "gcahng-approximate", 1
_REPAIR = "Build the index again."
_CLASSES = {
    "flat": "IndexFlat",
    "ivf": "IndexIVFFlat",
    "ivf_sq8": "IndexIVFScalarQuantizer",
    "hnsw": "IndexHNSWFlat",
}
_MEASURED = {"effort": int, "recall_at_k": float, "k": int, "num_queries": int}


@dataclass(frozen=True)
class IndexFile:
    """What the JSON file says of the index.

    Attributes:
        kind: As `ApproximateIndex.build` takes it.
        dim: D.
        num_items: G.
        seed: It was built with.
        effort: Of its searches.
    """

    kind: str
    dim: int
    num_items: int
    seed: int
    effort: int


def about_file(path: Path) -> Path:
    """Where the JSON file is."""
    return path.with_name(path.name + ".json")


def write_index(path: Path, faiss: ModuleType, index: Any, about: IndexFile, measured: dict[str, Any]) -> None:
    """Write both files, the index first; in between, the old JSON file is gone.

    Raises:
        DataError: They cannot be written.
    """
    partials = [file.with_name(f"{file.name}.partial") for file in (path, about_file(path))]
    with disk_errors(path.parent):
        try:
            faiss.write_index(index, str(partials[0]))
            size, digest = _size_and_digest(partials[0])
            raw = {"format": FORMAT, "version": VERSION, "normalised": True, "measured": measured}
            raw |= asdict(about) | {"bytes": size, "sha256": digest}
            partials[1].write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
            for partial in partials:
                sync(partial)
            about_file(path).unlink(missing_ok=True)
            os.replace(partials[0], path)
            os.replace(partials[1], about_file(path))
            sync(path.parent)
        except RuntimeError as error:
            raise DataError(
                f"Cannot write {path}: faiss says {_short(error)}. Check the folder and its disk."
            ) from None
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)


def read_index(path: Path, faiss: ModuleType, kinds: tuple[str, ...]) -> tuple[Any, IndexFile, dict[str, Any]]:
    """The faiss index, what it is, and what was measured, after the checksum has been compared.

    Raises:
        DataError: A file is missing or damaged, or the two do not belong together.
    """
    where = about_file(path)
    raw = read_json(where, _REPAIR)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise DataError(
            f"{where}: expected format {FORMAT!r}, version {VERSION}, got {raw.get('format')!r:.60}, version "
            f"{raw.get('version')!r:.20}. {_REPAIR}"
        )
    about = _about(raw, where, kinds)
    measured = _measured(raw.get("measured"), where)
    try:
        size, digest = _size_and_digest(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). {_REPAIR}") from None
    if (size, digest) != (raw.get("bytes"), raw.get("sha256")):
        raise DataError(
            f"{path} is damaged or belongs to another {where.name}: expected {raw.get('bytes')!r:.30} bytes of sha256 "
            f"{raw.get('sha256')!r:.20}..., got {size} of {digest[:18]!r}.... {_REPAIR}"
        )
    try:
        index = faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise DataError(f"{path} is no index that this faiss reads ({_short(error)}). {_REPAIR}") from None
    _check_class(path, faiss, index, about)
    return index, about, measured


def _check_class(path: Path, faiss: ModuleType, index: Any, about: IndexFile) -> None:
    wanted = _CLASSES[about.kind]
    found = f"{type(index).__name__} of {index.ntotal} x {index.d}, metric {index.metric_type}"
    fits = isinstance(index, getattr(faiss, wanted)) and index.metric_type == faiss.METRIC_INNER_PRODUCT
    if not fits or (index.ntotal, index.d) != (about.num_items, about.dim):
        raise DataError(
            f"{path} is another index than {about_file(path).name} says: expected {wanted} of {about.num_items} x "
            f"{about.dim}, metric {faiss.METRIC_INNER_PRODUCT}, got {found}. {_REPAIR}"
        )


def _about(raw: dict[str, Any], where: Path, kinds: tuple[str, ...]) -> IndexFile:
    kind = raw.get("kind")
    if kind not in kinds:
        raise DataError(f"{where}: `kind` must be one of {', '.join(kinds)}, got {kind!r:.60}. {_REPAIR}")
    if raw.get("normalised") is not True:
        raise DataError(f"{where}: `normalised` must be true, got {raw.get('normalised')!r:.60}. {_REPAIR}")
    numbers = {}
    for name in ("dim", "num_items", "seed", "effort"):
        value = raw.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise DataError(f"{where}: `{name}` must be a whole number, got {value!r:.60}. {_REPAIR}")
        numbers[name] = value
    most = 0 if kind == "flat" else numbers["num_items"]
    if not bool(most) <= numbers["effort"] <= most:
        raise DataError(f"{where}: `effort` must be {bool(most):d} to {most}, got {numbers['effort']}. {_REPAIR}")
    return IndexFile(kind, **numbers)


def _measured(raw: Any, where: Path) -> dict[str, Any]:
    if not isinstance(raw, dict) or set(raw) != set(_MEASURED):
        raise DataError(f"{where}: `measured` must hold {', '.join(_MEASURED)}, got {raw!r:.80}. {_REPAIR}")
    for name, kind in _MEASURED.items():
        if name == "recall_at_k" and raw[name] is None:
            continue
        if isinstance(raw[name], bool) or not isinstance(raw[name], kind):
            raise DataError(f"{where}: `measured.{name}` must be {kind.__name__}, got {raw[name]!r:.60}. {_REPAIR}")
    return raw


def _size_and_digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _short(error: BaseException) -> str:
    """Last line of what faiss says, without its source's name."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][-160:]
