"""Freed memory goes back to the machine, where the C library can do that."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

from gcahng.data.plans.freed_memory import LARGE, give_back_freed_memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_below_what_is_in_use_goes_back():
    small = [np.ones(4000) for _ in range(3000)]  # 32 kB each: from the heap, 96 MB together
    last = small[-1]  # keeps the heap from shrinking by itself
    del small
    before = resident_bytes()
    give_back_freed_memory(LARGE - 1)
    assert resident_bytes() > before - 10_000_000, "few classes free too little to look"
    give_back_freed_memory(LARGE)
    assert resident_bytes() < before - 60_000_000 and last.sum() == 4000
