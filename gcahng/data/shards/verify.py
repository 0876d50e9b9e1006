"""Checks everything that a shard folder holds against everything that is known of it, and lists all faults."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcahng.data.pool_worker import follow_parent
from gcahng.data.shards.class_list import ClassList, load_classes
from gcahng.data.shards.index import key_text
from gcahng.data.shards.manifest import (
    CHECKSUM_KEY,
    MANIFEST_NAME,
    SHARED_KEY,
    Manifest,
    encode_manifest,
    own_checksum,
    read_manifest_json,
)
from gcahng.data.shards.reader import load_manifest
from gcahng.data.shards.skipped import SKIPPED_NAME
from gcahng.data.shards.tar_parts import check_file
from gcahng.data.shards.verify_tar import MAX_FAULTS, TarReport, verify_tar
from gcahng.data.stores import CacheSettings, ShardStore, open_store
from gcahng.errors import DataError, InputError

_TRAIN = "train"


@dataclass(frozen=True)
class VerifyReport:
    """What a check found.

    Attributes:
        location: The shard folder.
        shards: Tars that the manifest names.
        samples: Samples that were read.
        bytes: Bytes of tars that were read.
        decoded: Whether the images were decoded too.
        faults: Sentences that begin with a file name, at most `MAX_FAULTS` per file.
        num_faults: All faults, listed or not.
        warnings: What is odd and does no harm.
    """

    location: str
    shards: int
    samples: int
    bytes: int
    decoded: bool
    faults: tuple[str, ...]
    num_faults: int
    warnings: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether there is no fault."""
        return not self.num_faults

    def as_json(self) -> dict[str, Any]:
        """For a file: all attributes, and "whole"."""
        return {"whole": self.is_whole, **asdict(self)}


def verify(
    location: Path | str,
    *,
    decode: bool = False,
    workers: int = 1,
    store: ShardStore | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Read every byte of a shard folder and compare it with the manifest, the indexes and the classes.

    Args:
        location: Shard folder or URL.
        decode: Decode every image too.
        workers: Processes, each of which reads one tar at a time; with 1 this process does it.
        store: Where files come from; the place that `location` names by default, and no cache of it.
        progress: Called after each tar with its size.

    Raises:
        InputError: `workers` is impossible.
        DataError: The manifest is missing, unreadable or contradicts itself, or a worker was killed.
    """
    if workers < 1:
        raise InputError(f"`workers` must be at least 1, got {workers}.")
    store = store or open_uncached(location)
    manifest = load_manifest(store)
    faults = _Findings()
    faults.add(MANIFEST_NAME, _manifest_faults(store))
    classes = _classes(manifest, store, faults)
    _check_skipped(manifest, store, faults)
    census = _Census(manifest)
    samples = num_bytes = 0
    for position, report in enumerate(_tar_reports(manifest, store, classes, decode, workers)):
        faults.listed += report.faults
        faults.count += report.num_faults
        census.add(position, report)
        samples += len(report.keys)
        num_bytes += report.num_bytes
        if progress:
            progress(manifest.shards[position].bytes)
    census.check(classes, faults)
    faults.warnings += _unlisted_files(manifest, store)
    return VerifyReport(
        store.location,
        len(manifest.shards),
        samples,
        num_bytes,
        decode,
        tuple(faults.listed),
        faults.count,
        tuple(faults.warnings),
    )


def open_uncached(location: Path | str) -> ShardStore:
    """A store that reads shards where they lie: a copy on this machine would hide their damage.

    Raises:
        ConfigError: The location cannot be used.
    """
    return open_store(location, CacheSettings(mode="direct"))


class _Findings:
    """Faults and warnings of the folder."""

    def __init__(self) -> None:
        self.listed: list[str] = []
        self.count = 0
        self.warnings: list[str] = []

    def add(self, name: str, texts: list[str]) -> None:
        """Faults of one file."""
        self.listed += [f"{name}: {text}" for text in texts[:MAX_FAULTS]]
        self.count += len(texts)


class _Census:
    """Counts over all tars: keys, and samples of each class in each split."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        count = manifest.classes.count
        self._keys: list[NDArray[np.uint32]] = []
        self._first: NDArray[np.int64] = np.full(count, -1)  # position of the shard where a class begins
        self._samples = {split: np.zeros(count, np.int64) for split in manifest.splits}
        self._runs = {split: np.zeros(count, np.int64) for split in manifest.splits}
        self._last_class = dict.fromkeys(manifest.splits, -1)
        self._is_complete = True

    def add(self, position: int, report: TarReport) -> None:
        """Count the samples of one tar."""
        shard = self._manifest.shards[position]
        self._keys.append(report.keys)
        known = report.class_ids
        if len(known) != shard.num_samples or (known < 0).any() or (known >= len(self._first)).any():
            self._is_complete = False
            return
        np.add.at(self._samples[shard.split], known, 1)
        starts = known[np.flatnonzero(np.diff(known, prepend=self._last_class[shard.split]))]
        np.add.at(self._runs[shard.split], starts, 1)
        self._last_class[shard.split] = int(known[-1])
        fresh = starts[self._first[starts] < 0]
        self._first[fresh] = position

    def check(self, classes: ClassList | None, faults: _Findings) -> None:
        """Compare the counts with the manifest and the classes."""
        faults.add(MANIFEST_NAME, self._repeated_keys())
        if not self._is_complete:
            faults.warnings.append("samples per class and split were not compared, since samples are missing.")
            return
        faults.add(MANIFEST_NAME, self._split_faults())
        if classes is not None:
            faults.add(self._manifest.classes.name, self._class_faults(classes))
        for split, runs in self._runs.items():
            parted = np.flatnonzero(runs > 1)
            if parted.size:
                faults.warnings.append(
                    f"{parted.size} classes of split {split!r} do not lie together, the first is class {parted[0]}: "
                    "reading them takes longer."
                )

    def _repeated_keys(self) -> list[str]:
        keys = np.sort(np.concatenate(self._keys)) if self._keys else np.empty(0, np.uint32)
        repeated = np.unique(keys[1:][keys[1:] == keys[:-1]])
        texts = []
        for key in repeated[:MAX_FAULTS]:
            holders = [s.name for s, held in zip(self._manifest.shards, self._keys, strict=True) if key in held]
            texts.append(f"key {key_text(int(key))} occurs more than once, in {', '.join(holders)}.")
        return texts + [""] * (repeated.size - len(texts))  # counted, not listed

    def _split_faults(self) -> list[str]:
        texts = []
        for split, samples in self._samples.items():
            found = {"classes": int(np.count_nonzero(samples)), "images": int(samples.sum())}
            expected = {name: self._manifest.splits[split][name] for name in found}
            if found != expected:
                texts.append(f"split {split!r}: expected {_counts(expected)}, got {_counts(found)}.")
        protocol = self._manifest.extra.get("protocol")
        if self._manifest.extra.get(SHARED_KEY) or isinstance(protocol, dict) and protocol.get("test_in_train"):
            return texts
        train = self._samples.get(_TRAIN)
        for split, samples in self._samples.items():
            if train is None or split == _TRAIN:
                continue
            shared = np.flatnonzero((train > 0) & (samples > 0))
            if shared.size:
                listed = ", ".join(map(str, shared[:10])) + (" ..." if shared.size > 10 else "")
                texts.append(f"{shared.size} classes are in {_TRAIN} and in {split}, expected none: class {listed}.")
        return texts

    def _class_faults(self, classes: ClassList) -> list[str]:
        found = np.sum(list(self._samples.values()), axis=0)
        texts = []
        for info in classes:
            if info.num_samples != found[info.class_id]:
                texts.append(
                    f"class {info.class_id} ({info.name!r}): expected {info.num_samples} samples, "
                    f"got {found[info.class_id]}."
                )
            if found[info.class_id]:
                split = self._manifest.shards[self._first[info.class_id]].split
                if info.split != split:
                    texts.append(
                        f"class {info.class_id} ({info.name!r}): expected split {info.split!r}, its first sample is "
                        f"in {split!r}."
                    )
        return texts


def _counts(counts: dict[str, int]) -> str:
    return f"{counts['classes']} classes and {counts['images']} images"


def _manifest_faults(store: ShardStore) -> list[str]:
    path = store.local_copy(MANIFEST_NAME)
    raw, _ = read_manifest_json(path)
    expected, got = raw.get(CHECKSUM_KEY), own_checksum(raw)
    if got != expected:
        return [f"was changed after the conversion: expected {CHECKSUM_KEY} {expected}, got {got}."]
    if path.read_bytes() != encode_manifest(raw):
        return ["was changed after the conversion: it says the same in other bytes (blanks, line ends)."]
    return []


def _classes(manifest: Manifest, store: ShardStore, faults: _Findings) -> ClassList | None:
    """The list of classes, if it is undamaged."""
    file = manifest.classes
    try:
        check_file(store, file.name, file.sha256)
        classes = load_classes(store.local_copy(file.name, file.sha256), file)
        names = Counter(info.name for info in classes)
    except DataError as error:
        faults.add(file.name, [f"{error}"])
        return None
    repeated = sorted(name for name, count in names.items() if count > 1)
    faults.add(file.name, [f"the name {name!r} belongs to {names[name]} classes, expected 1." for name in repeated])
    return classes


def _check_skipped(manifest: Manifest, store: ShardStore, faults: "_Findings") -> None:
    file = manifest.extra.get("skipped_file")
    if file is None:
        return
    try:
        check_file(store, SKIPPED_NAME, str(file.get("sha256")) if isinstance(file, dict) else "")
    except DataError as error:
        faults.add(SKIPPED_NAME, [str(error)])


def _unlisted_files(manifest: Manifest, store: ShardStore) -> list[str]:
    """Files of a local folder that the manifest does not name."""
    folder = Path(store.location)
    if not folder.is_dir():
        return []
    known = {name for shard in manifest.shards for name in (shard.name, shard.index_name)}
    known |= {manifest.classes.name, MANIFEST_NAME}
    if "skipped_file" in manifest.extra:
        known.add(SKIPPED_NAME)
    return [f"{name} is not named by the manifest." for name in sorted(os.listdir(folder)) if name not in known]


def _tar_reports(
    manifest: Manifest, store: ShardStore, classes: ClassList | None, decode: bool, workers: int
) -> Iterator[TarReport]:
    """The report of every tar, in the order of the manifest."""
    check = partial(verify_tar, store, classes=classes, decode=decode)
    workers = min(workers, len(manifest.shards))
    if workers <= 1:
        yield from map(check, manifest.shards)
        return
    # Spawned, not forked: the caller may have threads, and a fork copies their locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), follow_parent)
    try:
        yield from pool.map(check, manifest.shards)
    except BrokenProcessPool:
        raise DataError(
            "A process that checks shards was killed, most likely for want of memory. Pass a smaller --workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
