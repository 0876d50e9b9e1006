"""Conversion of a source to a shard folder: list, load in worker processes, write in order."""

import hashlib
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from os import _exit
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from gcahng.data.image_file import as_member
from gcahng.data.manifest import Manifest
from gcahng.data.shard_writer import PartialFolder, Sample, ShardWriter
from gcahng.data.sources import TRAIN, Fault, Source, SourceItem, seeded_order
from gcahng.errors import DataError, InputError

OnError = Literal["fail", "skip"]
DEFAULT_SHARD_BYTES = 256 << 20
_CHUNK = 32  # items per message to a worker
_CHUNKS_AHEAD = 4  # per worker: bounds the memory that finished images wait in


@dataclass(frozen=True)
class _Loaded:
    image: bytes
    extension: str


def convert(
    source: Source,
    out: Path | str,
    *,
    seed: int = 0,
    workers: int = 1,
    on_error: OnError = "fail",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Convert a source to the shard folder `out`, which appears only when it is whole.

    The bytes that are written depend on the source and the seed, never on `workers`.

    Args:
        source: What to convert.
        out: Shard folder to create.
        seed: Order in which classes are laid out inside of each split.
        workers: Processes that load and check images; with 1 this process does it.
        on_error: "fail" stops at the first unreadable image or empty class; "skip" leaves it out,
            counts it and lists it in the manifest.
        shard_bytes: A new tar starts once the current one has this many bytes.
        overwrite: Replace a shard folder at `out`.
        progress: Show a progress bar on stderr.

    Raises:
        InputError: An argument is out of range.
        DataError: The source or an image cannot be converted, or `out` is in the way.
    """
    for name, value in (("workers", workers), ("shard_bytes", shard_bytes)):
        if value < 1:
            raise InputError(f"`{name}` must be at least 1, got {value}.")
    with PartialFolder(Path(out), overwrite) as directory:
        listing = source.listing()
        skipped = list(listing.faults)
        if on_error == "fail" and skipped:
            raise _fatal(skipped[0])
        items = _writing_order(listing.items, seed)
        duplicates = _Duplicates()
        with (
            closing(ShardWriter(directory, shard_bytes)) as writer,
            closing(_load_all(source, items, workers)) as loaded,
        ):
            bar = tqdm(items, desc=source.name, unit="image", disable=not progress)
            for item, result in zip(bar, loaded, strict=True):
                if isinstance(result, Fault):
                    if on_error == "fail":
                        raise _fatal(result)
                    skipped.append(result)
                    continue
                duplicates.add(item.class_name, result.image)
                writer.write(
                    Sample(result.image, result.extension, item.class_name, item.split, item.source)
                )
            if not writer.num_samples:
                raise DataError(
                    f"Source {source.name!r} has no readable images: expected at least 1, got "
                    f"{len(skipped)} unreadable ones. Check --source."
                )
            extra: dict[str, Any] = {
                **listing.extra,
                "duplicates": duplicates.count,
                "skipped": [{"source": f.source, "reason": f.reason} for f in skipped],
            }
            return writer.finish(source.name, seed, extra)


def summary(manifest: Manifest, out: Path | str) -> str:
    """What a conversion made, for people."""
    lines = [
        f"{split}: {counts['classes']} classes, {counts['images']} images"
        for split, counts in manifest.splits.items()
    ]
    extra = manifest.extra
    merged = extra.get("merged", {})
    if merged:
        swallowed = sum(len(members) for members in merged.values())
        lines.append(f"merged: {swallowed} characters into {len(merged)} others")
    dropped = extra.get("dropped", {})
    if dropped:
        lines.append("dropped: " + ", ".join(f"{len(v)} {k}" for k, v in dropped.items()))
    if extra.get("ignored_files"):
        lines.append(f"ignored: {extra['ignored_files']} files that are not images")
    lines.append(f"duplicates within a class: {extra.get('duplicates', 0)} (kept)")
    skipped = extra.get("skipped", [])
    lines.append(f"skipped: {len(skipped)}")
    lines += [f"  {entry['source']}: {entry['reason']}" for entry in skipped[:10]]
    size = sum(shard.bytes for shard in manifest.shards)
    lines.append(f"shards: {len(manifest.shards)}, {size / 1e6:.1f} MB")
    lines.append(f"path: {out}")
    return "\n".join(lines)


def _fatal(fault: Fault) -> DataError:
    return DataError(
        f"Cannot convert {fault.source}: {fault.reason} (--on-error skip leaves such entries out "
        "and lists them.)"
    )


def _writing_order(items: Sequence[SourceItem], seed: int) -> list[SourceItem]:
    """Split by split (train first), class by class in seeded order; a class keeps its order."""
    groups: dict[tuple[str, str], list[SourceItem]] = {}
    for item in items:
        groups.setdefault((item.split, item.class_name), []).append(item)
    splits: dict[str, list[str]] = {TRAIN: []}
    for split, class_name in groups:
        splits.setdefault(split, []).append(class_name)
    uses = Counter(class_name for _, class_name in groups)
    for class_name in splits[TRAIN]:
        if uses[class_name] > 1:
            others = sorted(s for s, names in splits.items() if s != TRAIN and class_name in names)
            raise DataError(
                f"Class {class_name!r} is in {TRAIN} and in {' and '.join(others)}: expected "
                "training classes that no other split has, because retrieval is evaluated on "
                "unseen classes. Remove or rename one of them, or give one folder of classes "
                "and let the seed split it."
            )
    return [
        item
        for split, names in splits.items()
        for class_name in seeded_order(names, seed, "order")
        for item in groups[split, class_name]
    ]


class _Duplicates:
    """Counts images that repeat an earlier one of their class byte by byte."""

    def __init__(self) -> None:
        self.count = 0
        self._class_name = ""
        self._seen: set[bytes] = set()

    def add(self, class_name: str, image: bytes) -> None:
        if class_name != self._class_name:
            self._class_name, self._seen = class_name, set()
        digest = hashlib.blake2b(image, digest_size=16).digest()
        self.count += digest in self._seen
        self._seen.add(digest)


def _load(source: Source, item: SourceItem) -> _Loaded | Fault:
    try:
        return _Loaded(*as_member(source.load(item)))
    except OSError as error:
        reason = f"the file cannot be read ({error.strerror or error}). Check its permissions."
        return Fault(item.source, reason)
    except DataError as error:
        return Fault(item.source, str(error))


def _load_all(
    source: Source, items: Sequence[SourceItem], workers: int
) -> Generator[_Loaded | Fault, None, None]:
    """Results in the order of the items, however many processes work on them."""
    if workers == 1:
        for item in items:
            yield _load(source, item)
        return
    chunks = (items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK))
    # Spawned, not forked: the caller may have threads, and a fork copies their locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (source,))
    try:
        pending: deque[Future[list[_Loaded | Fault]]] = deque(
            pool.submit(_load_chunk, chunk) for chunk in islice(chunks, workers * _CHUNKS_AHEAD)
        )
        while pending:
            results = pending.popleft().result()
            pending.extend(pool.submit(_load_chunk, chunk) for chunk in islice(chunks, 1))
            yield from results
    except BrokenProcessPool:
        raise DataError(
            "A conversion worker was killed, most likely for want of memory. Pass a smaller "
            "--workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_source: Source | None = None


def _start_worker(source: Source) -> None:
    global _worker_source
    _worker_source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Without this, workers of a killed conversion would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        _exit(1)


def _load_chunk(items: Sequence[SourceItem]) -> list[_Loaded | Fault]:
    assert _worker_source is not None
    return [_load(_worker_source, item) for item in items]
