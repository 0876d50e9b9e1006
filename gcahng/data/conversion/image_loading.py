"""Loads and checks the images of a source, in this process or in several, always in order."""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

from gcahng.data.conversion.image_file import EncodeSettings, as_member
from gcahng.data.pool_worker import follow_parent
from gcahng.data.sources.source import Fault, Source, SourceItem
from gcahng.errors import DataError

_CHUNK = 16  # items per message to a worker
_CHUNKS_AHEAD = 3  # per worker: bounds the memory that finished images wait in


@dataclass(frozen=True)
class Loaded:
    """An image as it goes into a tar.

    Attributes:
        image: Encoded image.
        extension: "jpg" or "png".
    """

    image: bytes
    extension: str


def load_all(
    source: Source, items: Sequence[SourceItem], workers: int, encode: EncodeSettings | None = None
) -> Generator[Loaded | Fault, None, None]:
    """Load and check all items.

    Args:
        source: Where the items are from.
        items: What to load.
        workers: Processes; with 1 this process does it.
        encode: How images are encoded anew; None keeps their bytes.

    Yields:
        One result per item, in the order of the items, however many processes work on them; a
        fault where the image cannot be read.

    Raises:
        DataError: A worker process was killed.
    """
    if workers == 1:
        for item in items:
            yield _load(source, item, encode)
        return
    chunks = (items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK))
    # Spawned, not forked: the caller may have threads, and a fork copies their locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (source, encode))
    try:
        pending: deque[Future[list[Loaded | Fault]]] = deque(
            pool.submit(_load_chunk, chunk) for chunk in islice(chunks, workers * _CHUNKS_AHEAD)
        )
        while pending:
            results = pending.popleft().result()
            pending.extend(pool.submit(_load_chunk, chunk) for chunk in islice(chunks, 1))
            yield from results
    except BrokenProcessPool:
        raise DataError(
            "A conversion worker was killed, most likely for want of memory. Pass a smaller --workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_source: Source | None = None
_worker_encode: EncodeSettings | None = None


def _start_worker(source: Source, encode: EncodeSettings | None) -> None:
    global _worker_source, _worker_encode
    _worker_source, _worker_encode = source, encode
    follow_parent()


def _load_chunk(items: Sequence[SourceItem]) -> list[Loaded | Fault]:
    assert _worker_source is not None
    return [_load(_worker_source, item, _worker_encode) for item in items]


def _load(source: Source, item: SourceItem, encode: EncodeSettings | None) -> Loaded | Fault:
    try:
        return Loaded(*as_member(source.load(item), encode))
    except OSError as error:
        return Fault(item.source, f"the file cannot be read ({error.strerror or error}). {_repair(error)}")
    except DataError as error:
        return Fault(item.source, str(error))


def _repair(error: OSError) -> str:
    return "Check its permissions." if isinstance(error, PermissionError) else "Restore the file."
