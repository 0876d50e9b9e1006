"""Where a conversion that was killed goes on: after the last tar that is whole and still right."""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from gcahng.data.conversion.duplicates import DIGEST_BYTES
from gcahng.data.conversion.image_file import EncodeSettings
from gcahng.data.conversion.image_loading import load_all
from gcahng.data.conversion.journal import FinishedTar
from gcahng.data.conversion.partial_folder import PartialFolder
from gcahng.data.sources.source import Fault, Source, SourceItem

log = logging.getLogger(__name__)


def take_over(
    source: Source,
    folder: PartialFolder,
    items: Sequence[SourceItem],
    *,
    workers: int,
    encode: EncodeSettings | None,
    progress: bool,
) -> dict[int, Fault]:
    """Keep the finished tars of `folder` that are as noted, and drop everything else.

    Images that an earlier run left out are tried again: a disk that failed then may be back. The tar where such an
    image belongs is written again, and so are the later ones.

    Args:
        source: The source.
        folder: Folder of the conversion.
        items: All items in writing order.
        workers: See `convert`.
        encode: See `convert`.
        progress: See `convert`.
    Returns:
        Place of each item that is left out of the tars that were kept, and why.
    """
    tars = folder.journal.tars
    count = _count_intact(folder, progress)
    places = [place for tar in tars[:count] for place in tar.left_out]
    faults: dict[int, Fault] = {}
    with closing(load_all(source, [items[place] for place in places], workers, encode)) as results:
        for place, result in zip(places, results, strict=True):
            if not isinstance(result, Fault):
                count = next(number for number, tar in enumerate(tars) if tar.items > place)
                log.warning(
                    "%s can be read now: going back to %s.", items[place].source, folder.shards / tars[count].shard.name
                )
                break
            faults[place] = result
    folder.keep(count)
    end = tars[count - 1].items if count else 0
    return {place: fault for place, fault in faults.items() if place < end}


def _count_intact(folder: PartialFolder, progress: bool) -> int:
    """How many of the finished tars, counted from the first, are as noted."""
    tars = folder.journal.tars
    place = 0
    for number, tar in enumerate(tqdm(tars, desc="checking", unit="tar", leave=False, disable=not progress)):
        if not _is_intact(folder, tar, place):
            log.warning("%s is damaged: continuing from there.", folder.shards / tar.shard.name)
            return number
        place += tar.shard.num_samples
    return len(tars)


def _is_intact(folder: PartialFolder, tar: FinishedTar, place: int) -> bool:
    shard = tar.shard
    try:
        with folder.journal.digests_path.open("rb") as file:
            file.seek(place * DIGEST_BYTES)
            digests = hashlib.sha256(file.read(shard.num_samples * DIGEST_BYTES)).hexdigest()
        return (
            digests == tar.digests_sha256
            and (folder.shards / shard.name).stat().st_size == shard.bytes
            and _sha256(folder.shards / shard.name) == shard.sha256
            and _sha256(folder.shards / shard.index_name) == shard.index_sha256
        )
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
