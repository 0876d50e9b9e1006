"""What a training step costs each of W ranks: memory and operations of the edges, messages. Counted, then predicted.

    python benchmarks/scaling.py [--json FILE] [--results FILE] [--sizes SIZE ...] [--ranks W ...]
    python benchmarks/scaling.py --predict                  # step times on 8, 64, 512 GPUs; measures nothing

W real processes run a step on the CPU and count; no clock is read. Every count is held against its formula
(`scaling_formulas.py`): the script stops where they differ by more than 2 %.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
from graph_arms import Size
from rank_processes import on_ranks
from report import Row, write_results, write_rows
from scaling_counts import RankCounts, all_counts
from scaling_formulas import Costs, Machine, predict

SIZES = ("27x3-D128-L2-N100", "40x2-D128-L1-N100")
RANKS = (1, 2, 4)
# Everything is kept for the backward pass, or nothing.
KEEP_BYTES = (1 << 40, 0)
TOLERANCE = 0.02
PREDICTED_SIZES = ("40x2-D512-L1-N11318", "512x2-D512-L1-N11318", "2048x2-D512-L1-N11318", "8192x2-D512-L1-N11318")
PREDICTED_RANKS = (1, 8, 64, 512)
# docs/scaling.md says why these.
GPU = Machine(
    edge_flops=250e12,
    node_flops=100e12,
    node_size=8,
    link_inside=200e9,
    link=40e9,
    latency=30e-6,
    latency_per_doubling=10e-6,
)


class FormulaError(RuntimeError):
    """A count is not what its formula says."""


@dataclass(frozen=True)
class Counted:
    """One size on W ranks.

    Attributes:
        size: Of the batch and the graph.
        kept, bare: By rank, with everything kept for the backward pass and with nothing.
        alone: One rank with all pairs and everything kept.
        repeated: Operations that every rank repeats: those of a rank without pairs.
    """

    size: Size
    kept: list[RankCounts]
    bare: list[RankCounts]
    alone: RankCounts
    repeated: float

    @property
    def ranks(self) -> int:
        return len(self.kept)

    @property
    def costs(self) -> Costs:
        size = self.size
        return Costs(size.num_classes, size.num_samples, size.dim, size.layers, size.training_classes, ranks=self.ranks)

    def row(self, what: str, value: float, unit: str, ratio: float | None, formula: float | None, note: str) -> Row:
        """One figure of the rank that has most, held against its formula.

        Raises:
            FormulaError: It is another number.
        """
        name = f"{what}, {self.size} W{self.ranks}"
        if formula is not None:
            if abs(value - formula) > TOLERANCE * abs(formula):
                raise FormulaError(f"{name}: counted {value:.5g} {unit}, the formula says {formula:.5g}.")
            note = f"formula {formula:.4g}" + (f"; {note}" if note else "")
        return Row(name, value, unit, ratio, note=note)

    def share(self, alone: float, value: float) -> float:
        """What W ranks would have each of what one has alone, over what the fullest one has: 1 is perfect."""
        return alone / self.ranks / value if value else 1.0

    def rows(self) -> list[Row]:
        return [*self.edge_rows(), *self.flop_rows(), *self.sent_rows()]

    def edge_rows(self) -> list[Row]:
        costs, most = self.costs, max(one.rows for one in self.kept)
        rows = [
            self.row("edge rows", most, "rows", self.share(self.alone.rows, most), None, f"of {self.alone.rows}"),
        ]
        for what, counts, kept in (("edge buffers", self.kept, True), ("edge buffers, nothing kept", self.bare, False)):
            value = max(one.edge_bytes for one in counts)
            formula, alone = (costs.edge_bytes(n, kept=kept) for n in (most, self.alone.rows))
            rows.append(
                self.row(what, value / 2**20, "MiB", self.share(alone, value), formula / 2**20, "peak of the step")
            )
        value = max(one.peak_bytes for one in self.kept)
        share = self.share(self.alone.peak_bytes, value)
        return [*rows, self.row("all tensors", value / 2**20, "MiB", share, None, "peak; parameters left out")]

    def flop_rows(self) -> list[Row]:
        costs = self.costs
        fullest = max(self.kept, key=lambda one: one.flop)
        own = [max(one.flop for one in counts) - self.repeated for counts in (self.kept, self.bare)]
        alone = self.alone.flop - self.repeated
        judged = costs.judge_flop() * fullest.rows * self.ranks / self.alone.rows
        formulas = [costs.edge_flop(fullest.rows, kept=kept) + judged for kept in (True, False)]
        repeated = costs.node_flop + costs.attention_flop
        share = self.share(alone, own[0])
        whole = self.share(self.alone.flop, fullest.flop)
        return [
            self.row("edge arithmetic", own[0] / 1e9, "GFLOP", share, formulas[0] / 1e9, ""),
            self.row("edge arithmetic, nothing kept", own[1] / 1e9, "GFLOP", None, formulas[1] / 1e9, ""),
            self.row(
                "repeated arithmetic", self.repeated / 1e9, "GFLOP", None, repeated / 1e9, "the same on each rank"
            ),
            self.row("whole arithmetic", fullest.flop / 1e9, "GFLOP", whole, None, "backbone left out"),
        ]

    def sent_rows(self) -> list[Row]:
        costs = self.costs
        fullest = max(self.kept, key=lambda one: one.ring_bytes(self.ranks))
        value = fullest.ring_bytes(self.ranks)
        kinds = ", ".join(f"{kind} {one.calls} x, {one.bytes / 2**20:.3g}" for kind, one in fullest.sent.items())
        note = f"{kinds} MiB; between CPUs {fullest.host.calls} x, {fullest.host.bytes} bytes" if value else ""
        parts = fullest.parameters
        moved = sum(parts.values()) + parts["graph"]
        gradients = costs.gradient_bytes(moved)
        calls = sum(one.calls for one in fullest.sent.values())
        return [
            self.row("collectives", calls, "calls", None, costs.collectives, "one waits for the other"),
            self.row("sent", value / 2**20, "MiB", None, costs.sent_bytes / 2**20, note),
            self.row(
                "sent for the mean of parameter gradients",
                gradients / 2**20,
                "MiB",
                None,
                None,
                f"not counted: {moved} numbers, the graph's twice",
            ),
        ]


def count(sizes: Sequence[Size], ranks: Sequence[int]) -> list[Counted]:
    """Every size on every number of ranks, one group of processes for each number."""
    alone = on_ranks(1, all_counts, list(sizes), list(KEEP_BYTES))[0]
    found = []
    for many in ranks:
        by_rank = [alone] if many == 1 else on_ranks(many, all_counts, list(sizes), list(KEEP_BYTES))
        for number, size in enumerate(sizes):
            kept, bare = ([one[number][each] for one in by_rank] for each in (0, 1))
            found.append(Counted(size, kept, bare, alone[number][0], alone[number][2].flop))
    return found


def predicted_rows(sizes: Sequence[Size], ranks: Sequence[int], gpu: Machine = GPU) -> list[Row]:
    """Step times by the formulas; the ratio is the time of one GPU over W times this one's."""
    rows = []
    for size in sizes:
        alone = None
        for many in ranks:
            costs = Costs(size.num_classes, size.num_samples, size.dim, size.layers, size.training_classes, many)
            if size.num_classes < many:
                continue
            found = predict(costs, gpu)
            alone = alone or found.total
            parts = {"edges": found.edges, "nodes": found.nodes, "sending": found.sending, "latency": found.latency}
            note = ", ".join(f"{name} {1e3 * value:.3g}" for name, value in parts.items())
            ratio = alone / many / found.total
            rows.append(Row(f"predicted graph step, {size} W{many}", 1e3 * found.total, "ms", ratio, note=note))
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--results", type=Path, help="write the rows here with machine, versions, date and command")
    parser.add_argument("--sizes", nargs="+", type=Size.parse, help=f"PxK-D-L-N[-H] like {SIZES[0]}")
    parser.add_argument("--ranks", nargs="+", type=int, help="numbers of processes")
    parser.add_argument("--predict", action="store_true", help="step times on GPUs by the formulas, nothing measured")
    options = parser.parse_args(arguments)
    for many in options.ranks or ():
        if many < 1:
            parser.error(f"--ranks must be at least 1: got {many}")
        for size in options.sizes or ():
            if size.num_classes < many:
                parser.error(f"--ranks {many}: a rank holds whole classes, {size} has {size.num_classes}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Parse, count, print, write."""
    options = parse(arguments)
    sizes = options.sizes or [Size.parse(text) for text in (PREDICTED_SIZES if options.predict else SIZES)]
    ranks = options.ranks or (PREDICTED_RANKS if options.predict else RANKS)
    if options.predict:
        rows = predicted_rows(sizes, ranks)
    else:
        for name, value in machine.describe("cpu").items():
            print(f"{name}: {value}")
        rows = [row for counted in count(sizes, ranks) for row in counted.rows()]
    print(*(row.line() for row in rows), sep="\n")
    if options.json is not None:
        write_rows(options.json, rows)
    if options.results is not None:
        write_results(options.results, rows, "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
