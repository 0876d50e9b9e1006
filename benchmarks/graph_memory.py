"""Peak memory of one arm of the graph benchmarks, in a process of its own.

CPU: the largest resident set (VmHWM, set back by writing 5 to /proc/self/clear_refs) above what the process holds after
imports and inputs (embeddings, labels, classifier, graph weights). CUDA: the allocator's peak above the same.

    python benchmarks/graph_memory.py SPEC      # SPEC is JSON, see `Spec`; prints JSON, see `Peak`
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import graph_arms
import machine
import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Spec:
    """What a process measures.

    Attributes:
        arm: Name of the arm.
        size: As `graph_arms.Size.parse` takes it.
        device, precision, edge_dropout, backend: Of the arm.
        threads: CPU threads.
        runs: Runs of the arm; the peak is that of all, the time that of the last.
    """

    arm: str
    size: str
    device: str
    precision: str
    edge_dropout: str
    backend: str
    threads: int
    runs: int = 2


@dataclass(frozen=True)
class Peak:
    """What a process found.

    Attributes:
        bytes: Peak above the inputs; None if it could not be measured.
        seconds: Time of the last run; None if there was none.
        note: Why a figure is missing.
    """

    bytes: int | None
    seconds: float | None
    note: str = ""


def measure(spec: Spec) -> Peak:
    """Start a process that runs the arm, and read its answer.

    Raises:
        RuntimeError: The process failed for another reason than memory.
    """
    machine.release_memory(spec.device)
    command = [sys.executable, __file__, json.dumps(asdict(spec))]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode == -9:
        return Peak(None, None, "stopped by the system, out of memory")
    if found.returncode:
        raise RuntimeError(f"{spec.arm} at {spec.size} failed with exit code {found.returncode}:\n{found.stderr}")
    return Peak(**json.loads(found.stdout.splitlines()[-1]))


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (largest since it was set back) of this process in bytes."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}.")


def peak_above(run: Callable[[], object], device: str) -> int:
    """Bytes that `run` holds at most beyond what is held now.

    Raises:
        OSError: The system does not let a process set its largest resident set back.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def measure_here(spec: Spec) -> Peak:
    """In this process: build the arm, then run it."""
    torch.set_num_threads(spec.threads)
    size = graph_arms.Size.parse(spec.size)
    problem = graph_arms.Problem.of(size, spec.device, spec.edge_dropout)
    arm = graph_arms.arm_named(spec.arm, problem, spec.precision, spec.backend)
    seconds: list[float] = []

    def runs() -> None:
        for _ in range(spec.runs):
            seconds.append(machine.elapsed(arm.run, spec.device)[0])

    try:
        peak = peak_above(runs, spec.device)
    except OSError as error:
        return Peak(None, None, f"the system does not set peaks back ({error})")
    except torch.OutOfMemoryError:
        return Peak(None, None, "out of memory")
    return Peak(peak, seconds[-1])


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(Spec(**json.loads(sys.argv[1]))))))
