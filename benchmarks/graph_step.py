"""Time, memory and arithmetic of the graph's two passes in one training iteration, against the edge list.

    python benchmarks/graph_step.py [--device cpu|cuda] [--precision fp32|bf16] [--json FILE] [--sizes SIZE ...]

One run = metric pass and generation pass with their losses, forward and backward; the embeddings are a leaf, backbone
and optimisers are left out. Arms (see `graph_arms.py`): `ours`; `R0`, the edge list with the released code's
arithmetic, in float32; `R1`, the same with TF32 (CUDA). That they compute the same losses and gradients is checked
first; then their runs alternate, so that a busy machine slows all.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import graph_memory
import machine
import torch
from graph_arms import Arm, Problem, Size, arm_named
from graph_classifier import classifier_work
from report import Row, write_results, write_rows
from torch import Tensor

DEFAULT_SIZES = {
    "cpu": ("27x3-D512-L2-N100", "40x2-D512-L1-N100", "40x2-D512-L1-N11318"),
    "cuda": ("40x2-D512-L1-N100", "27x3-D512-L2-N100", "320x2-D512-L1-N320", "2048x2-D512-L1-N2048"),
}
CLASSIFIER_SIZES = ("40x2-D512-L1-N11318",)
# The last one is the large batch whose memory has a target of its own. N is the same, so that work per edge is.
GROWTH_SIZES = {
    "cpu": tuple(f"{classes}x2-D512-L1-N320" for classes in (40, 80, 160, 320)),
    "cuda": tuple(f"{classes}x2-D512-L1-N2048" for classes in (320, 640, 1024, 2048)),
}
REPEATS = {"cpu": 7, "cuda": 30}
GROWTH_REPEATS = {"cpu": 3, "cuda": 10}
WARM_UPS = {"cpu": 1, "cuda": 10}
# Relative differences of losses and gradients from R0: sums in another order, TF32 or bfloat16 operands.
AGREEMENT = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 4e-2}
TOO_SMALL = "too small to measure"
OVER_SMALLEST = "ratio: the smallest batch over this one"
PARTS = ("time", "memory", "classifier", "growth")


@dataclass(frozen=True)
class Options:
    """What is common to all rows."""

    device: str
    precision: str
    edge_dropout: str = "tied"
    backend: str = "auto"
    repeats: int = 7

    def name(self, what: str, size: Size | str, extra: str = "") -> str:
        """A row's name: what, device, precision (with the CPU's instructions for bfloat16), size."""
        precision = self.precision
        if self.device == "cpu" and precision == "bf16":
            precision += f" ({machine.bf16_instructions() or 'no instructions for it'})"
        parts = [f"{what}, {self.device} {precision} {size}"]
        parts += [f"backend {self.backend}"] * (self.backend != "auto")
        parts += ["independent edge dropout"] * (self.edge_dropout != "tied")
        parts += [extra] * bool(extra)
        return ", ".join(parts)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def spec(self, arm: str, size: Size, runs: int) -> graph_memory.Spec:
        """What a process of its own measures."""
        return graph_memory.Spec(
            arm,
            size.text,
            self.device,
            self.precision,
            self.edge_dropout,
            self.backend,
            torch.get_num_threads(),
            runs,
        )


def why_not(size: Size, device: str) -> str:
    """Why the reference cannot run at this size; empty if it can."""
    free = machine.free_memory(device)
    if size.reference_bytes <= free:
        return ""
    return f"reference cannot run: it needs about {size.reference_bytes / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def check_agreement(
    arm: str, size: Size, found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, kind: str
) -> None:
    """Stop unless an arm computes what R0 computes.

    The error of a tensor is its difference's norm over its own, the latter at least 1e-2 of the largest among `wanted`.

    Raises:
        RuntimeError: It does not.
    """
    if found.keys() != wanted.keys():
        raise RuntimeError(f"{size}: {arm} has other {kind}s than R0: {sorted(found.keys() ^ wanted.keys())}.")
    least = 1e-2 * max(float(value.double().norm()) for value in wanted.values())
    for name, want in wanted.items():
        difference = float((found[name] - want).double().norm()) / max(float(want.double().norm()), least)
        if not difference <= tolerance:
            raise RuntimeError(
                f"{size}: the {name} {kind} of {arm} is off by {difference:.1e}, more than {tolerance:.0e}."
            )


def run_noted(arm: Arm) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of one run."""
    gradients: dict[str, Tensor] = {}
    return arm.run(gradients), gradients


def agreeing_arms(size: Size, options: Options) -> tuple[list[Arm], str]:
    """The arms that can run, warmed up, after the check that they agree; why the reference cannot, if so."""
    problem = Problem.of(size, options.device, options.edge_dropout)
    ours = arm_named("ours", problem, options.precision, options.backend)
    arms, note = [ours], why_not(size, options.device)
    if not note:
        try:
            reference = arm_named("R0", problem, "fp32")
            want = run_noted(reference)
            arms.append(reference)
        except torch.OutOfMemoryError:
            note = "reference cannot run: out of memory"
    if len(arms) > 1:
        if options.device == "cuda":
            arms.append(arm_named("R1", problem, "fp32"))
        for arm in arms[::2]:
            tolerance = AGREEMENT["tf32" if arm.name == "R1" else options.precision]
            found = run_noted(arm)
            check_agreement(arm.name, size, found[0], want[0], tolerance, "loss")
            check_agreement(arm.name, size, found[1], want[1], tolerance, "gradient")
        del want, found
    for _ in range(WARM_UPS[options.device]):
        for arm in arms:
            arm.run()
    return arms, note


def time_rows(size: Size, options: Options) -> list[Row]:
    """Median time of ours, and how many times as long the edge list takes.

    The ratio is the median over rounds of neighbouring runs, which a load that comes and goes hardly moves; the same
    holds for the share of the floor. Each timed run follows an untimed one of its arm: training runs one of them, time
    after time, and finds caches and memory as it left them, not as the other arm did.
    """
    arms, note = agreeing_arms(size, options)
    rate = machine.MatrixRate(options.device, options.dtype)
    rate.measure()
    rounds = []
    for _ in range(options.repeats):
        times = {}
        for arm in arms:
            arm.run()
            times[arm.name] = machine.elapsed(arm.run, options.device)
        rounds.append((times, size.floor_flop / rate.measure()))
    ours = statistics.median(times["ours"][0] for times, _ in rounds)
    floor = statistics.median(found for _, found in rounds)
    share = statistics.median(found / times["ours"][0] for times, found in rounds)
    rows = []
    for arm in arms[1:]:
        ratio, processor = (
            statistics.median(times[arm.name][clock] / times["ours"][clock] for times, _ in rounds) for clock in (0, 1)
        )
        theirs = statistics.median(times[arm.name][0] for times, _ in rounds)
        extra = f"{arm.name} {theirs:.4g} s; ratio of processor time {processor:.2f}"
        name = options.name("graph step time", size, "" if arm.name == "R0" else arm.name)
        rows.append(Row(name, ours, "s", ratio, floor, share, extra))
    if not rows:
        rows.append(Row(options.name("graph step time", size), ours, "s", None, floor, share, note))
    return rows


def memory_rows(size: Size, options: Options) -> list[Row]:
    """Peak memory of ours, and how many times as much the edge list takes: as released, and as lean as it can be."""
    runs = 2 if size.batch <= 160 else 1
    ours = graph_memory.measure(options.spec("ours", size, runs))
    rows = []
    for arm, extra in (("R0", ""), ("R0 lean", "R0 lean")):
        name, note, ratio = options.name("graph step peak memory", size, extra), why_not(size, options.device), None
        if not note and ours.bytes:
            theirs = graph_memory.measure(options.spec(arm, size, runs))
            note = theirs.note and f"reference cannot run: {theirs.note}"
            if theirs.bytes is not None:
                ratio = theirs.bytes / ours.bytes
                note = f"{arm} {theirs.bytes / 2**30:.3g} GiB"
        value = None if ours.bytes is None else ours.bytes / 2**30
        rows.append(Row(name, value, "GiB", ratio, note=note or ours.note or TOO_SMALL))
        if ratio is None:
            break
    return rows


def classifier_rows(size: Size, options: Options) -> list[Row]:
    """Arithmetic of the classifier on synthetic negatives, and the largest tensor of logits.

    Counted, not timed, so the same on every device; the ratio is ours over R0's (smaller is better).
    """
    ours, reference = (classifier_work(name, size, options.precision, options.backend) for name in ("ours", "R0"))
    arithmetic = options.name("classifier arithmetic", size, "ours / R0")
    rows = options.name("classifier logits", size, "ours / R0")
    return [
        Row(arithmetic, ours.flop / 1e9, "GFLOP", ours.flop / reference.flop, note=f"R0 {reference.flop / 1e9:.4g}"),
        Row(rows, ours.rows, "rows", ours.rows / reference.rows, note=f"R0 {reference.rows} rows of N columns"),
    ]


def growth_time_rows(sizes: list[Size], options: Options) -> list[Row]:
    """Time of ours per ordered edge; the ratio is that of the smallest batch over this one's."""
    arms = {}
    for size in sizes:
        problem = Problem.of(size, options.device, options.edge_dropout)
        arms[size] = arm_named("ours", problem, options.precision, options.backend)
        for _ in range(WARM_UPS[options.device]):
            arms[size].run()
    rounds = [
        {size: machine.elapsed(arm.run, options.device)[0] / size.edges for size, arm in arms.items()}
        for _ in range(min(options.repeats, GROWTH_REPEATS[options.device]))
    ]
    rows = []
    for size in sizes:
        value = statistics.median(each[size] for each in rounds)
        ratio = statistics.median(each[sizes[0]] / each[size] for each in rounds)
        rows.append(
            Row(options.name("graph step time per ordered edge", size), value * 1e9, "ns", ratio, note=OVER_SMALLEST)
        )
    return rows


def growth_memory_rows(sizes: list[Size], options: Options) -> list[Row]:
    """Peak memory of ours per ordered edge, the ratio as for the time; then the largest batch's peak as it is."""
    peaks = [graph_memory.measure(options.spec("ours", size, 1)) for size in sizes]
    rows = []
    for size, peak in zip(sizes, peaks, strict=True):
        name = options.name("graph step peak memory per ordered edge", size)
        if not peak.bytes or not peaks[0].bytes:
            rows.append(Row(name, None, "bytes", None, note=peak.note or TOO_SMALL))
            continue
        value, first = peak.bytes / size.edges, peaks[0].bytes / sizes[0].edges
        rows.append(Row(name, value, "bytes", first / value, note=OVER_SMALLEST))
    last = None if peaks[-1].bytes is None else peaks[-1].bytes / 2**30
    note = peaks[-1].note or why_not(sizes[-1], options.device)
    return [*rows, Row(options.name("graph step peak memory", sizes[-1]), last, "GiB", None, note=note)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of ours; R0 is always fp32")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--results", type=Path, help="write the rows here with machine, versions, date and command")
    parser.add_argument("--sizes", nargs="+", type=Size.parse, help=f"PxK-D-L-N[-H] like {DEFAULT_SIZES['cpu'][0]}")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS[:3], help="kinds of rows; default: no growth"
    )
    parser.add_argument("--backend", choices=("auto", "triton", "compiled", "eager"), default="auto", help="of ours")
    parser.add_argument("--edge-dropout", choices=("tied", "independent"), default="tied", help="of both")
    parser.add_argument("--repeats", type=int, help="timed runs of each arm")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    options = parser.parse_args(arguments)
    for size in options.sizes or ():
        if "classifier" in options.parts and size.training_classes <= size.num_classes:
            parser.error(f"--parts classifier needs more training classes than classes in the batch, N > P: got {size}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for name in ("repeats", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1: got {value}")
    return options


def sizes_of(part: str, given: list[Size] | None, device: str) -> list[Size]:
    """The sizes that a part measures."""
    if given is not None:
        return given
    defaults = {"classifier": CLASSIFIER_SIZES, "growth": GROWTH_SIZES[device]}
    return [Size.parse(text) for text in defaults.get(part, DEFAULT_SIZES[device])]


def part_rows(part: str, sizes: list[Size], options: Options) -> list[Row]:
    """All rows of one part."""
    if options.device == "cpu" and options.precision == "bf16" and not machine.bf16_instructions():
        wanted = " or ".join(machine.BF16_INSTRUCTIONS)
        name = options.name(f"graph step {part}", ", ".join(map(str, sizes)))
        return [Row(name, None, "", None, note=f"not run: the CPU has no {wanted}")]
    if part == "growth":
        return growth_time_rows(sizes, options) + growth_memory_rows(sizes, options)
    make = {"time": time_rows, "memory": memory_rows, "classifier": classifier_rows}[part]
    return [row for size in sizes for row in make(size, options)]


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print, write."""
    parsed = parse(arguments)
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    repeats = REPEATS[parsed.device] if parsed.repeats is None else parsed.repeats
    options = Options(parsed.device, parsed.precision, parsed.edge_dropout, parsed.backend, repeats)
    for name, value in machine.describe(parsed.device).items():
        print(f"{name}: {value}")
    rows: list[Row] = []
    for part in PARTS:
        if part in parsed.parts:
            found = part_rows(part, sizes_of(part, parsed.sizes, parsed.device), options)
            print(*(row.line() for row in found), sep="\n", flush=True)
            rows += found
            # After every part: what was measured outlasts a later failure.
            if parsed.json is not None:
                write_rows(parsed.json, rows)
            if parsed.results is not None:
                write_results(parsed.results, rows, parsed.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
