"""How much memory a process has used."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocator on CUDA, else the peak resident memory of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in kibibytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
