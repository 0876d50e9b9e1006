"""Conversion of a source to a shard folder: list, load in worker processes, write in order."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, get_args

from tqdm import tqdm

from gcahng.data.conversion.image_loading import Loaded, load_all
from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.writer import PartialFolder, Sample, ShardWriter
from gcahng.data.sources.source import TRAIN, Fault, Source, SourceItem, seeded_order
from gcahng.errors import DataError, InputError

OnError = Literal["fail", "skip"]
DEFAULT_SHARD_BYTES = 256 << 20


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
    if on_error not in get_args(OnError):
        raise InputError(f"`on_error` must be fail or skip, got {on_error!r}.")
    for name, value in (("workers", workers), ("shard_bytes", shard_bytes)):
        if value < 1:
            raise InputError(f"`{name}` must be at least 1, got {value}.")
    faults = _Faults(on_error)
    with PartialFolder(Path(out), overwrite) as directory:
        listing = source.listing()
        for fault in listing.faults:
            faults.add(fault)
        items = _writing_order(listing.items, seed)
        with (
            closing(ShardWriter(directory, shard_bytes)) as writer,
            closing(load_all(source, items, workers)) as loaded,
        ):
            bar = tqdm(items, desc=source.name, unit="image", disable=not progress)
            duplicates = _write(writer, zip(bar, loaded, strict=True), faults)
            if not writer.num_samples:
                raise DataError(
                    f"Source {source.name!r} has no readable images: expected at least 1, got "
                    f"{len(faults.skipped)} unreadable ones. Check --source."
                )
            extra = {**listing.extra, "duplicates": duplicates, "skipped": faults.skipped}
            return writer.finish(source.name, seed, extra)


def summary(manifest: Manifest, out: Path | str) -> str:
    """What a conversion made, for people."""
    lines = [
        f"{split}: {counts['classes']} classes, {counts['images']} images" for split, counts in manifest.splits.items()
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


class _Faults:
    """Stops at a fault or collects it, as the user chose."""

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self.skipped: list[dict[str, str]] = []

    def add(self, fault: Fault) -> None:
        if self._on_error == "fail":
            raise DataError(
                f"Cannot convert {fault.source}: {fault.reason} (--on-error skip leaves such "
                "entries out and lists them.)"
            )
        self.skipped.append({"source": fault.source, "reason": fault.reason})


def _write(writer: ShardWriter, results: Iterable[tuple[SourceItem, Loaded | Fault]], faults: _Faults) -> int:
    """Write all images; returns how many repeat an earlier one of their class byte by byte."""
    duplicates, seen, current = 0, set[bytes](), ""
    for item, result in results:
        if isinstance(result, Fault):
            faults.add(result)
            continue
        if item.class_name != current:
            current, seen = item.class_name, set()
        digest = hashlib.blake2b(result.image, digest_size=16).digest()
        duplicates += digest in seen
        seen.add(digest)
        writer.write(Sample(result.image, result.extension, item.class_name, item.split, item.source))
    return duplicates


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
