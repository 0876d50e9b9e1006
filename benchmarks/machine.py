"""What a benchmark says about the machine it ran on, and its clocks: time of a run, rate of matrix products."""

import gc
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import psutil
import torch

CPU_INFO = Path("/proc/cpuinfo")
# Instructions that multiply bfloat16 matrices; without one of them bfloat16 on a CPU is emulated.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "triton", "torch_scatter", "timm", "numpy")
# Side of the square matrices whose product gives the machine's rate.
RATE_SIDE = {"cpu": 2048, "cuda": 8192}


def cpu_field(name: str, text: str | None = None) -> str:
    """A field of the first processor in /proc/cpuinfo, empty if the system has none."""
    if text is None:
        text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def bf16_instructions(flags: str | None = None) -> str:
    """The CPU's instructions for bfloat16 matrix products, joined by "+"; empty if it has none.

    Args:
        flags: In place of this machine's, as /proc/cpuinfo lists them.
    """
    known = (cpu_field("flags") if flags is None else flags).split()
    return "+".join(name for name in BF16_INSTRUCTIONS if name in known)


def free_memory(device: str) -> int:
    """Bytes that a new process (CPU) or tensor (CUDA) can have."""
    if device == "cuda":
        release_memory(device)
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def release_memory(device: str) -> None:
    """Give back what torch's allocator keeps for later: another process may need it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def describe(device: str) -> dict[str, object]:
    """Machine and versions, as the result files hold them."""
    facts: dict[str, object] = {
        "cpu": cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": bf16_instructions() or None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return facts | {name: version for name in PACKAGES if (version := package_version(name))}


def package_version(name: str) -> str | None:
    """Version of an installed package, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that holds this file, "-dirty" if files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def elapsed(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Time and processor time of one run in seconds.

    CUDA: between two events on the stream, so that what the host does after the last launch does not count.
    """
    processor = time.process_time()
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, time.process_time() - processor
    wall = time.perf_counter()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


class MatrixRate:
    """The rate of large square matrix products: a ceiling for what is made of matrix products."""

    def __init__(self, device: str, dtype: torch.dtype, side: int | None = None) -> None:
        side = RATE_SIDE[device] if side is None else side
        draw = torch.Generator(device).manual_seed(0)
        self.device = device
        self.left, self.right = (torch.randn(side, side, device=device, generator=draw).to(dtype) for _ in range(2))
        self.flop = 2 * side**3

    def measure(self) -> float:
        """Floating-point operations per second of one product."""
        return self.flop / elapsed(lambda: self.left @ self.right, self.device)[0]
