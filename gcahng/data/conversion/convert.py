"""Conversion of a source to a shard folder: list, load in worker processes, write in order.

A conversion that was stopped, killed or failed goes on when the same call is made again, and the result is the same
byte by byte as that of an undisturbed one (`gcahng.data.conversion.partial_folder`, `.journal`, `.resume`).
"""

import logging
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

from gcahng.data.conversion.duplicates import count_duplicates, image_digest
from gcahng.data.conversion.fingerprint import fingerprint
from gcahng.data.conversion.image_file import EncodeSettings
from gcahng.data.conversion.image_loading import load_all
from gcahng.data.conversion.journal import Journal
from gcahng.data.conversion.partial_folder import PartialFolder
from gcahng.data.conversion.protocol import (
    check_protocol,
    classes_shared_with_train,
    count_items,
    unseen_test_classes,
)
from gcahng.data.conversion.resume import take_over
from gcahng.data.conversion.summary import summary
from gcahng.data.conversion.writing_order import without_repeated_names, writing_order
from gcahng.data.shards.manifest import SHARED_KEY, Manifest, ShardInfo
from gcahng.data.shards.protocol_text import protocol_line
from gcahng.data.shards.skipped import skipped_extra
from gcahng.data.shards.tar_file import Sample
from gcahng.data.shards.writer import DEFAULT_SHARD_BYTES, DEFAULT_WINDOW_BYTES, ShardWriter
from gcahng.data.sources.folder import Folder
from gcahng.data.sources.omniglot import Omniglot
from gcahng.data.sources.source import Fault, Listing, Source, SourceItem
from gcahng.errors import DataError, InputError

__all__ = ["DEFAULT_SHARD_BYTES", "DEFAULT_WINDOW_BYTES", "OnError", "convert", "summary"]

OnError = Literal["fail", "skip"]

log = logging.getLogger(__name__)


def convert(
    source: Source,
    out: Path | str,
    *,
    seed: int = 0,
    workers: int = 1,
    on_error: OnError = "fail",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    window_bytes: int = DEFAULT_WINDOW_BYTES,
    overwrite: bool = False,
    progress: bool = False,
    encode: EncodeSettings | None = None,
    allow_mismatch: bool = False,
) -> Manifest:
    """Convert a source to the shard folder `out`, which appears only when it is whole.

    The bytes that are written depend on the source, the seed, the sizes and `encode`, never on `workers` or on how
    often the conversion was interrupted. An interrupted one leaves `OUT.partial`; the same call continues there.

    Args:
        source: What to convert.
        out: Shard folder to create.
        seed: Order in which classes are laid out inside of each split.
        workers: Processes that load and check images; with 1 this process does it.
        on_error: "fail" stops at the first unreadable or repeated image or empty class; "skip" leaves it out,
            counts it and lists it in the manifest.
        shard_bytes: A new tar starts with a class, once the present one has this many bytes.
        window_bytes: Bytes of shards that an epoch plan draws batches from at a time.
        overwrite: Replace a shard folder at `out`, and start anew where an earlier call without it was interrupted.
        progress: Show a progress bar on stderr.
        encode: How images are encoded anew; None keeps their bytes.
        allow_mismatch: Go on where the counts differ from those that the source's authors published.

    Raises:
        InputError: An argument is out of range.
        DataError: The source or an image cannot be converted, `out` is in the way, or the disk is full.
    """
    if on_error not in get_args(OnError):
        raise InputError(f"`on_error` must be fail or skip, got {on_error!r}.")
    for name, value in (("workers", workers), ("shard_bytes", shard_bytes), ("window_bytes", window_bytes)):
        if value < 1:
            raise InputError(f"`{name}` must be at least 1, got {value}.")
    options = _Options(seed, workers, shard_bytes, window_bytes, progress, encode, allow_mismatch)
    if isinstance(source, Folder | Omniglot):
        _require_outside(source.directory, out)
    folder = PartialFolder(Path(out), overwrite)
    try:
        with folder:
            return _convert(source, folder, options, _Faults(on_error))
    except InputError as error:
        if advice := folder.advice():
            raise type(error)(f"{error} {advice}") from error
        raise


def _require_outside(directory: Path, out: Path | str) -> None:
    """A source whose folders are classes would find `out` and `OUT.partial` among them."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(directory)):
        raise InputError(
            f"`out` must not be inside of the source folder, whose folders are classes: got {out} inside of "
            f"{directory}. Give a folder elsewhere."
        )


@dataclass(frozen=True)
class _Options:
    """See `convert`."""

    seed: int
    workers: int
    shard_bytes: int
    window_bytes: int
    progress: bool
    encode: EncodeSettings | None
    allow_mismatch: bool


class _Faults:
    """Stops at a fault or collects it, as the user chose."""

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self.skipped: list[dict[str, str]] = []

    def add(self, fault: Fault, listed: int = 1) -> None:
        if self._on_error == "fail":
            more = f" Faults in the listing: {listed}." if listed > 1 else ""
            raise DataError(
                f"Cannot convert {fault.source}: {fault.reason}{more} (--on-error skip leaves such "
                "entries out and lists them.)"
            )
        self.skipped.append({"source": fault.source, "reason": fault.reason})


class _TarLog:
    """Notes in the journal what a finished tar has; called by the writer."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.place = 0  # of the item at work; when a tar is finished, the first that is not in it
        self.left_out: list[int] = []
        self.digests = bytearray()

    def __call__(self, shard: ShardInfo) -> None:
        self._journal.add(shard, self.place, self.left_out, bytes(self.digests))
        self.left_out.clear()
        self.digests.clear()


def _convert(source: Source, folder: PartialFolder, options: _Options, faults: _Faults) -> Manifest:
    listing = _checked_listing(source, options, faults)
    items = writing_order(listing, options.seed)
    folder.begin(
        fingerprint(
            source,
            listing,
            items,
            seed=options.seed,
            shard_bytes=options.shard_bytes,
            window_bytes=options.window_bytes,
            encode=options.encode,
        )
    )
    if folder.published:
        return Manifest.load(folder.out)
    left_out = take_over(
        source, folder, items, workers=options.workers, encode=options.encode, progress=options.progress
    )
    for fault in left_out.values():
        faults.add(fault)
    tar_log = _TarLog(folder.journal)
    with closing(ShardWriter(folder.shards, options.shard_bytes, tar_log)) as writer:
        tars = folder.journal.tars
        start = tars[-1].items if tars else 0
        written = ((item.class_name, item.split) for i, item in enumerate(items[:start]) if i not in left_out)
        writer.resume([tar.shard for tar in tars], written)
        _write(source, items, start, writer, tar_log, options, faults)
        return _finish(source, listing, folder, writer, options, faults)


def _checked_listing(source: Source, options: _Options, faults: _Faults) -> Listing:
    """The listing without what cannot be written, compared with what was published."""
    listing = source.listing()
    items, repeated = without_repeated_names(listing.items)
    found = (*listing.faults, *repeated)
    for fault in found:
        faults.add(fault, listed=len(found))
    protocol = check_protocol(
        listing.published,
        count_items(items),
        unseen_test_classes((item.class_name, item.split) for item in items),
        allow_mismatch=options.allow_mismatch,
        stage=f"as listed by source {source.name!r}",
    )
    if protocol and not protocol["matches"]:
        log.warning("%s\nGoing on, as --allow-mismatch says.", protocol_line(protocol))
    listing = replace(listing, items=items)
    shared = classes_shared_with_train(listing, allow_mismatch=options.allow_mismatch)
    return replace(listing, extra={**listing.extra, SHARED_KEY: shared}) if shared else listing


def _write(
    source: Source,
    items: Sequence[SourceItem],
    start: int,
    writer: ShardWriter,
    tar_log: _TarLog,
    options: _Options,
    faults: _Faults,
) -> None:
    """Write the items from place `start` on."""
    rest = items[start:]
    bar = tqdm(rest, desc=source.name, unit="image", total=len(items), initial=start, disable=not options.progress)
    with closing(load_all(source, rest, options.workers, options.encode)) as loaded:
        for place, (item, result) in enumerate(zip(bar, loaded, strict=True), start=start):
            tar_log.place = place
            if isinstance(result, Fault):
                faults.add(result)
                tar_log.left_out.append(place)
                continue
            writer.write(Sample(result.image, result.extension, item.class_name, item.split, item.source, item.columns))
            tar_log.digests += image_digest(result.image)
    tar_log.place = len(items)
    writer.end_tar()


def _finish(
    source: Source, listing: Listing, folder: PartialFolder, writer: ShardWriter, options: _Options, faults: _Faults
) -> Manifest:
    skipped = faults.skipped
    if not writer.num_samples:
        raise DataError(
            f"Source {source.name!r} has no readable images: expected at least 1, got "
            f"{len(skipped)} unreadable ones. Check --source."
        )
    extra: dict[str, Any] = {
        **listing.extra,
        "duplicates": count_duplicates(folder.shards, writer.shards, folder.journal.digests_path),
        **skipped_extra(folder.shards, skipped),
    }
    if options.encode:
        extra["encode"] = asdict(options.encode)
    protocol = check_protocol(
        listing.published,
        writer.splits(),
        unseen_test_classes(writer.class_splits()),
        allow_mismatch=options.allow_mismatch,
        stage=f"as written, with {len(skipped)} entries left out,",
    )
    if protocol:
        extra["protocol"] = protocol
    return writer.finish(source.name, options.seed, extra, options.window_bytes, listing.class_columns)
