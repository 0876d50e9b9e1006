"""Time and memory of a training iteration's graph passes on the sparse graph: against the dense one, and as B grows.

    python benchmarks/sparse_graph.py [--device cpu|cuda] [--precision fp32|bf16] [--json FILE] [--neighbours K]

One run = choice of the edges, metric pass and generation pass with their losses, forward and backward (see
`graph_arms.py`); the embeddings are a leaf, backbone and optimisers are left out. Before anything is timed, a small
batch in which every class is a neighbour must give the dense graph's losses and gradients.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import graph_memory
import machine
import torch
from graph_arms import Arm, Backend, Ours, Problem, Size
from graph_step import AGREEMENT, OVER_SMALLEST, check_agreement, run_noted
from report import Row, write_results, write_rows
from torch import Tensor

from gcahng.generation import ConstantClassifier
from gcahng.graph import PairPlan
from gcahng.graph.neighbours import neighbour_plan

# Both graphs run at the first size. In the others N is the same, so that work per edge is.
DENSE_SIZE = {"cpu": "256x2-D128-L1-N2048", "cuda": "2048x2-D512-L1-N32768"}
GROWTH_SIZES = {
    "cpu": tuple(f"{classes}x2-D128-L1-N2048" for classes in (512, 1024, 2048)),
    "cuda": tuple(f"{classes}x2-D512-L1-N32768" for classes in (8192, 32768)),
}
NEIGHBOURS = {"cpu": 16, "cuda": 64}
REPEATS = {"cpu": 2, "cuda": 10}
WARM_UPS = {"cpu": 1, "cuda": 3}
PARTS = ("dense", "growth")
DENSE, SPARSE = "dense", "sparse"


@dataclass(frozen=True)
class Spec:
    """One arm, as a process of its own takes it.

    Attributes:
        arm: DENSE or SPARSE.
        size: As `Size.parse` takes it.
        neighbours: k.
        device, precision, backend: Of the arm.
        edges_per_chunk: Of the sparse plan; None: as in training.
        threads: CPU threads.
    """

    arm: str
    size: str
    neighbours: int
    device: str
    precision: str
    backend: Backend
    edges_per_chunk: int | None
    threads: int

    def build(self) -> Arm:
        """The arm with its inputs."""
        problem = Problem.of(Size.parse(self.size), self.device)
        if self.arm == DENSE:
            return Ours(problem, self.precision, self.backend)
        return Sparse(problem, self)

    def name(self, what: str) -> str:
        """A row's name."""
        size = Size.parse(self.size)
        precision = self.precision
        if self.device == "cpu" and precision == "bf16":
            precision += f" ({machine.bf16_instructions() or 'no instructions for it'})"
        backend = "" if self.backend == "auto" else f", backend {self.backend}"
        chunk = "" if self.edges_per_chunk is None else f", {self.edges_per_chunk} edges per chunk"
        return f"sparse graph {what}, {self.device} {precision} {size} k{self.neighbours}{backend}{chunk}"


class Sparse(Ours):
    """This project's graph on the nearest classes, which every run chooses anew."""

    def __init__(self, problem: Problem, spec: Spec) -> None:
        # Not the constructor of `Ours`: the dense plan of a large batch takes memory of its own.
        Arm.__init__(self, SPARSE, problem, problem.graph(spec.backend))
        self.spec = spec
        self.low = torch.bfloat16 if spec.precision == "bf16" else None
        layer = problem.classifier
        self.classifier = ConstantClassifier(layer.weight.detach(), layer.bias.detach(), self.low)
        self.plan = self.choose()

    def choose(self) -> PairPlan:
        """The edges of a step."""
        spec, size = self.spec, self.problem.size
        chunk = spec.edges_per_chunk
        return neighbour_plan(self.problem.z, size.num_samples, spec.neighbours, low=self.low, edges_per_chunk=chunk)

    def run(self, gradients: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        self.plan = self.choose()
        return super().run(gradients)

    def floor_flop(self) -> tuple[float, float]:
        """Operations of the leanest known algebra: edges, and classifier (see `Size.floor_flop`).

        The choice, 2 B² D, is left out: it need not be made by products of all pairs.
        """
        size = self.problem.size
        pairs = (self.plan.edge_count + size.batch) / 2
        edges = 2.0 * (54 * size.layers - 13) * size.dim**2 * pairs
        entries = self.plan.edge_count / size.num_samples
        return edges, 4.0 * entries * size.dim * size.training_classes


def check_against_dense(spec: Spec) -> None:
    """Stop unless a small batch with all classes as neighbours gives what the dense graph gives.

    Raises:
        RuntimeError: It does not.
    """
    size = Size.parse(spec.size)
    small = Size(21, size.num_samples, size.dim, size.layers, max(21, min(size.training_classes, 100)), size.heads)
    specs = [Spec(**(asdict(spec) | {"arm": arm, "size": small.text, "neighbours": 20})) for arm in (DENSE, SPARSE)]
    want, found = (run_noted(one.build()) for one in specs)
    for kind, got, wanted in zip(("loss", "gradient"), found, want, strict=True):
        check_agreement(SPARSE, small, got, wanted, AGREEMENT[spec.precision], kind)


def peak_memory(spec: Spec) -> graph_memory.Peak:
    """Peak of one run above the inputs, in a process of its own.

    Raises:
        RuntimeError: The process failed for another reason than memory.
    """
    command = [sys.executable, __file__, "--child", json.dumps(asdict(spec))]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode == -9:
        return graph_memory.Peak(None, None, "stopped by the system, out of memory")
    if found.returncode:
        raise RuntimeError(f"{spec.arm} at {spec.size} failed with exit code {found.returncode}:\n{found.stderr}")
    return graph_memory.Peak(**json.loads(found.stdout.splitlines()[-1]))


def peak_here(spec: Spec) -> graph_memory.Peak:
    """In this process: build the arm, then run it once."""
    torch.set_num_threads(spec.threads)
    arm = spec.build()
    if isinstance(arm, Sparse):
        # The plan belongs to the run.
        del arm.plan
    try:
        return graph_memory.Peak(graph_memory.peak_above(arm.run, spec.device), None)
    except OSError as error:
        return graph_memory.Peak(None, None, f"the system does not set peaks back ({error})")
    except torch.OutOfMemoryError:
        return graph_memory.Peak(None, None, "out of memory")


def in_turn(arms: list[Arm], device: str, repeats: int) -> list[list[float]]:
    """Seconds of each arm in each round, after the warm-up."""
    for _ in range(WARM_UPS[device]):
        for arm in arms:
            arm.run()
    return [[machine.elapsed(arm.run, device)[0] for arm in arms] for _ in range(repeats)]


def dense_rows(spec: Spec, repeats: int) -> list[Row]:
    """Time and peak memory of the sparse graph; the ratio is the dense graph's over it."""
    dense = Spec(**(asdict(spec) | {"arm": DENSE}))
    arms = [dense.build(), spec.build()]
    rounds = in_turn(arms, spec.device, repeats)
    value = statistics.median(each[1] for each in rounds)
    ratio = statistics.median(each[0] / each[1] for each in rounds)
    assert isinstance(arms[1], Sparse)
    share = arms[1].plan.edge_count / arms[1].problem.size.edges
    rows = [Row(spec.name("step time, dense over sparse"), value, "s", ratio, note=f"{share:.1%} of all edges")]
    del arms
    peaks = [peak_memory(one) for one in (dense, spec)]
    name = spec.name("step peak memory, dense over sparse")
    note = peaks[0].note or peaks[1].note
    return [*rows, Row(name, scaled(peaks[1].bytes, 2**30), "GiB", scaled(peaks[0].bytes, peaks[1].bytes), note=note)]


def scaled(value: float | None, unit: float | None) -> float | None:
    """value / unit; None if either was not measured, or the unit is too small to be."""
    return None if value is None or not unit else value / unit


def growth_rows(specs: list[Spec], repeats: int) -> list[Row]:
    """Time and peak memory, whole and per listed ordered edge.

    The ratio of a row per edge is the smallest batch's figure over this one's, that of the choice its share of the
    whole run.
    """
    arms = [spec.build() for spec in specs]
    rate = machine.MatrixRate(specs[0].device, torch.bfloat16 if specs[0].precision == "bf16" else torch.float32)
    rounds = in_turn(arms, specs[0].device, repeats)
    rows, edges = [], []
    for spec, arm, times in zip(specs, arms, zip(*rounds, strict=True), strict=True):
        assert isinstance(arm, Sparse)
        edges.append(arm.plan.edge_count)
        arm.choose()
        choice = statistics.median(machine.elapsed(arm.choose, spec.device)[0] for _ in range(repeats))
        whole, floors = statistics.median(times), arm.floor_flop()
        floor = sum(floors) / statistics.median(rate.measure() for _ in range(3))
        degree, judged = edges[-1] / arm.problem.size.batch, floors[1] / sum(floors)
        note = f"{degree:.0f} edges per sample; classifier: {judged:.0%} of the arithmetic"
        rows.append(Row(spec.name("step time"), whole, "s", None, floor, floor / whole, note))
        rows.append(Row(spec.name("choice of the edges"), choice, "s", choice / whole, note="ratio: share of the step"))
    for number, spec in enumerate(specs):
        each = [times[number] / edges[number] for times in rounds]
        ratio = statistics.median(times[0] / edges[0] / one for times, one in zip(rounds, each, strict=True))
        rows.append(
            Row(spec.name("step time per listed edge"), statistics.median(each) * 1e9, "ns", ratio, note=OVER_SMALLEST)
        )
    arms.clear()
    peaks = [peak_memory(spec) for spec in specs]
    for spec, peak, count in zip(specs, peaks, edges, strict=True):
        name = spec.name("step peak memory per listed edge")
        value, first = scaled(peak.bytes, count), scaled(peaks[0].bytes, edges[0])
        note = peak.note if peak.bytes is None else f"{peak.bytes / 2**30:.3g} GiB in all; {OVER_SMALLEST}"
        rows.append(Row(name, value, "bytes", scaled(first, value), note=note))
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--results", type=Path, help="write the rows here with machine, versions, date and command")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="kinds of rows")
    parser.add_argument("--dense-size", type=Size.parse, help="where both graphs run, as " + DENSE_SIZE["cpu"])
    parser.add_argument("--sizes", nargs="+", type=Size.parse, help="growing batches, as " + GROWTH_SIZES["cpu"][0])
    parser.add_argument("--neighbours", type=int, help="k; default: 16 on CPU, 64 on CUDA")
    parser.add_argument("--backend", choices=("auto", "triton", "compiled", "eager"), default="auto")
    parser.add_argument("--edges-per-chunk", type=int, help="of the sparse graph; default: as in training")
    parser.add_argument("--repeats", type=int, help="timed runs of each arm")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for name in ("neighbours", "edges_per_chunk", "repeats", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1: got {value}")
    return options


def specs_of(options: argparse.Namespace) -> tuple[Spec, list[Spec]]:
    """The sparse arms of the two parts."""
    device = options.device
    dense = options.dense_size or Size.parse(DENSE_SIZE[device])
    growing = options.sizes or [Size.parse(text) for text in GROWTH_SIZES[device]]
    specs = [
        Spec(
            SPARSE,
            size.text,
            options.neighbours or NEIGHBOURS[device],
            device,
            options.precision,
            options.backend,
            options.edges_per_chunk,
            torch.get_num_threads(),
        )
        for size in (dense, *growing)
    ]
    return specs[0], specs[1:]


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print, write."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    repeats = options.repeats or REPEATS[options.device]
    for name, value in machine.describe(options.device).items():
        print(f"{name}: {value}")
    dense, growing = specs_of(options)
    check_against_dense(dense)
    rows: list[Row] = []
    for part in PARTS:
        if part in options.parts:
            found = dense_rows(dense, repeats) if part == "dense" else growth_rows(growing, repeats)
            print(*(row.line() for row in found), sep="\n", flush=True)
            rows += found
            # After every part: what was measured outlasts a later failure.
            if options.json is not None:
                write_rows(options.json, rows)
            if options.results is not None:
                write_results(options.results, rows, options.device)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(asdict(peak_here(Spec(**json.loads(sys.argv[2]))))))
        sys.exit(0)
    sys.exit(main())
