"""An index that is being made: begun, continued after an interruption, put together and published.

`OUT.partial/` holds `progress.json` (what is embedded, by what), `parts/` (see `gcahng.search.part_files`) and, at the
end, the index as it is put together; renamed, it is `OUT`.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcahng.data.shards.disk import disk_errors, sync
from gcahng.data.stores.file_lock import LockedFile, lock_file
from gcahng.errors import ConfigError
from gcahng.search.assemble import ASSEMBLE, Parts, load_parquet
from gcahng.search.image_parts import ImageParts, Job
from gcahng.search.index_info import INDEX, LAYOUTS, PARTIAL, IndexInfo, differences, is_index, read_json
from gcahng.search.part_files import PartFiles

log = logging.getLogger(__name__)

PART_IMAGES = 4096
"""Images of a part by default: what is embedded again at most, on each rank, after an interruption."""
PROGRESS = "progress.json"

# Bytes of a row beside its embedding: label, offset, key, shard and class name.
_ROW_BYTES = 200


@dataclass(frozen=True)
class IndexTarget:
    """What is to be written.

    Attributes:
        folder: The index folder.
        layout: `npy` or `parquet`.
        normalised: Scale every embedding to length 1.
        overwrite: Replace an index, or an unfinished one, of another checkpoint or other data.
        part_images: Images of a part; rounded up to whole batches.
    """

    folder: Path
    layout: str = "npy"
    normalised: bool = False
    overwrite: bool = False
    part_images: int = PART_IMAGES

    @property
    def partial(self) -> Path:
        """Where the unfinished index is."""
        return self.folder.with_name(f"{self.folder.name}{PARTIAL}")

    def check(self) -> None:
        """Refuse, before a model is loaded, what cannot be written afterwards.

        Raises:
            ConfigError: The layout is unknown or needs a package, or the folder cannot be made or is no index.
        """
        if self.layout not in LAYOUTS:
            raise ConfigError(f"`--format` must be one of {', '.join(LAYOUTS)}, got {self.layout!r}. Choose one.")
        if self.part_images < 1:
            raise ConfigError(f"`--part-images` must be at least 1, got {self.part_images}. Raise it.")
        if self.folder.name in ("", ".."):
            raise ConfigError(f"`--out` {self.folder}: expected the name of a folder. Give its whole path.")
        if self.layout == "parquet":
            load_parquet()
        parent = self.folder.absolute().parent
        if not parent.is_dir():
            raise ConfigError(f"`--out` {self.folder}: the folder {parent} does not exist. Create it first.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"`--out` {self.folder}: {parent} cannot be written to. Choose another place.")
        if os.path.lexists(self.folder) and not is_index(self.folder):
            raise ConfigError(
                f"`--out` {self.folder} exists and is no index: it is not replaced. Choose another name, or remove it."
            )


def begin(
    target: IndexTarget, origin: Mapping[str, Any], images: ImageParts, files: PartFiles, part_rows: int
) -> tuple[LockedFile | None, list[Job] | None]:
    """Make or continue the unfinished folder; rank 0 does.

    Args:
        target: What to write.
        origin: What decides the embeddings.
        images: What to embed.
        files: The parts.
        part_rows: Images of a part.
    Returns:
        The lock on the folder, and what is missing; None and None where the index is whole already.
    Raises:
        ConfigError: See `gcahng.search.embed.embed_index`.
        DataError: The disk is full.
    """
    target.check()
    if target.folder.exists() and not target.overwrite:
        info = IndexInfo.load(target.folder)
        _check_origin(f"`--out` {target.folder} holds an index", info.made_with, origin)
        _check_origin(f"`--out` {target.folder} holds an index", _form(info), _form_of(target))
        lock = lock_file(target.partial / "lock", wait=False) if target.partial.is_dir() else None
        if lock is not None:  # left by a run that was killed at its very end
            _remove_partial(target)
            lock.close()
        log.info("%s is whole already.", target.folder)
        return None, None
    with disk_errors(target.folder.absolute().parent):
        target.partial.mkdir(exist_ok=True)
        lock = lock_file(target.partial / "lock", wait=False)
    if lock is None:
        raise ConfigError(
            f"Another process is writing `--out` {target.folder} ({target.partial / 'lock'} is locked). Wait for it, "
            "or choose another name."
        )
    try:
        _continue(target, origin, files)
        missing = images.missing(files, part_rows)
        _check_space(target, images.count, files.dim, len(missing) * part_rows)
    except BaseException:
        lock.close()
        raise
    return lock, missing


def _continue(target: IndexTarget, origin: Mapping[str, Any], files: PartFiles) -> None:
    """Go on with parts of the same origin, or begin."""
    progress = target.partial / PROGRESS
    wanted = {"made_with": dict(origin), "form": _form_of(target)}
    if progress.exists():
        saved = read_json(progress, f"Remove {target.partial}.")
        try:
            _check_origin(f"{target.partial} was begun", saved.get("made_with", {}), origin)
            _check_origin(f"{target.partial} was begun", saved.get("form", {}), _form_of(target))
        except ConfigError:
            if not target.overwrite:
                raise
        else:
            log.info("Continuing %s.", target.partial)
            return
    with disk_errors(target.partial):
        progress.unlink(missing_ok=True)  # first: parts without it are nobody's
        shutil.rmtree(files.folder, ignore_errors=True)
        files.folder.mkdir()
        _write_whole(progress, json.dumps(wanted, indent=1, sort_keys=True) + "\n")


def _check_origin(what: str, saved: Any, wanted: Mapping[str, Any]) -> None:
    found = differences(saved if isinstance(saved, dict) else {}, wanted)
    if found:
        raise ConfigError(
            f"{what} with another checkpoint, data or settings: {'; '.join(found[:6])}. Use what it was begun with, "
            "choose another --out, or replace it with --overwrite."
        )


def _form(info: IndexInfo) -> dict[str, Any]:
    return {"format": info.layout, "normalised": info.normalised}


def _form_of(target: IndexTarget) -> dict[str, Any]:
    return {"format": target.layout, "normalised": target.normalised}


def _check_space(target: IndexTarget, count: int | None, dim: int, left: int) -> None:
    """Parts that are left and the files put together of all of them lie side by side at the end."""
    if count is None:
        return
    needed = (min(left, count) + count) * (4 * dim + _ROW_BYTES)
    free = shutil.disk_usage(target.folder.absolute().parent).free
    if needed > free:
        raise ConfigError(
            f"`--out` {target.folder}: {count} embeddings of {dim} channels need about {needed >> 20} MiB until they "
            f"are put together, {free >> 20} MiB are free. Free some space or choose another disk."
        )


def check_shared(target: IndexTarget) -> None:
    """Refuse a folder that only rank 0 sees.

    Raises:
        ConfigError: It is not here.
    """
    if not (target.partial / PROGRESS).is_file():
        raise ConfigError(
            f"{target.partial} cannot be seen here, though rank 0 made it: expected a folder that all ranks share. "
            "Choose --out on a shared file system."
        )


def finish(target: IndexTarget, origin: Mapping[str, Any], images: ImageParts, files: PartFiles) -> IndexInfo:
    """Put the parts together, give the index its name, and return what its `index.json` says.

    Raises:
        DataError: A part is missing or damaged, or the disk is full.
    """
    parts = Parts(files, images.num_units, images.class_name)
    _check_space(target, parts.count, parts.dim, 0)
    whole = target.partial / "index"
    with disk_errors(target.partial):
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        written = ASSEMBLE[target.layout](parts, whole)
        saved = read_json(target.partial / PROGRESS, f"Remove {target.partial}.")
        # As it was begun: places may have been moved since.
        info = IndexInfo(target.layout, parts.count, parts.dim, target.normalised, saved["made_with"], written)
        _write_whole(whole / INDEX, info.text())
        if target.folder.exists():  # --overwrite
            replaced = target.partial / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            target.folder.rename(replaced)
        whole.rename(target.folder)
        sync(target.folder.absolute().parent)
    _remove_partial(target)
    return info


def _remove_partial(target: IndexTarget) -> None:
    shutil.rmtree(target.partial, ignore_errors=True)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)
