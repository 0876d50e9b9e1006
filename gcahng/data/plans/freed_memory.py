"""Giving freed memory back to the machine."""

import ctypes

LARGE = 100_000
"""Classes from which setting up a table or a plan frees enough to be worth it: tens of megabytes."""


def give_back_freed_memory(num_classes: int) -> None:
    """Give back what setting up for so many classes took and freed.

    glibc keeps blocks of up to 32 MB for later once such blocks were freed, in each of a machine's
    processes. Other C libraries have no such call, and nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if num_classes >= LARGE else None
    if trim is not None:
        trim(0)
