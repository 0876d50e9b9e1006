"""This process among those of its machine: what a heartbeat says so that others can look whether it still lives."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PROC = Path("/proc")


def resident_memory_bytes() -> float:
    """Resident memory of this process now; NaN where the system does not say."""
    try:
        pages = int((_PROC / "self" / "statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return float("nan")
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def this_process() -> dict[str, Any]:
    """Process number, when it was started (clock ticks after the boot), its machine, and that machine's name."""
    pid = os.getpid()
    return {"pid": pid, "pid_started": _started(pid), "machine": this_machine(), "host": socket.gethostname()}


def this_machine() -> str:
    """Where process numbers mean the same: this boot of this machine, and this container."""
    try:
        boot = (_PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self' / 'ns' / 'pid')}"
    except OSError:
        return socket.gethostname()


def lives(process: Mapping[str, Any]) -> bool | None:
    """Whether a process as `this_process` described it is there; None from another machine."""
    if process.get("machine") != this_machine():
        return None
    pid = process["pid"]
    if (started := _started(pid)) is not None:
        return bool(started == process.get("pid_started"))
    if (_PROC / "self").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> int | None:
    """Clock ticks between the boot and the start of a process; None if there is none, or it has ended."""
    try:
        # The name, in brackets, may hold anything.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
