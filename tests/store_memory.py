"""Peak memory of writing and reading an index, in a process of its own: `store_memory.py FOLDER LAYOUT` prints JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from store_files import write_index

from gcahng.search.store import EmbeddingStore

DIM, SIZES = 1 << 12, [96] * 32
BLOCK_BYTES = 2 << 20


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (largest since it was set back) of this process in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) << 10


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that the work held at most, beside what was there before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def peaks(folder: Path, layout: str) -> dict[str, int]:
    """Of writing, of reading by blocks, and of as much memory as the whole store takes."""
    write_index(folder / "small", [96] * 4, DIM, layout)  # imports, and buffers that are kept
    assert len(list(EmbeddingStore.open(folder / "small").blocks(BLOCK_BYTES))) == 3
    written = peak_of(lambda: write_index(folder / "index", SIZES, DIM, layout))
    store = EmbeddingStore.open(folder / "index")
    size = store.count * store.dim * 4
    sums: list[float] = []
    read = peak_of(lambda: sums.extend(float(block.sum()) for _, block in store.blocks(BLOCK_BYTES)))
    assert len(sums) == 24
    return {
        "size": size,
        "written": written,
        "read": read,
        "whole": peak_of(lambda: np.ones(size, dtype=np.uint8)),
    }


if __name__ == "__main__":
    try:
        found: dict[str, object] = dict(peaks(Path(sys.argv[1]), sys.argv[2]))
    except OSError as error:
        found = {"unseen": str(error)}
    print(json.dumps(found))
