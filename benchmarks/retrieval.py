"""Time and memory of exact retrieval metrics against the released code's way, a peer library and the bare product.

    python benchmarks/retrieval.py [--json FILE] [--results FILE] [--device cpu|cuda]
    python benchmarks/retrieval.py --ranks 2                # 2 processes against 1, one thread each
    python benchmarks/retrieval.py --large                  # 100,000 queries x 1,000,000 x 128; GPU: million x million

Made-up embeddings with the size and class sizes of Stanford Online Products' test set. Arms (`retrieval_arms.py`): ours
by `precision="auto"` (`default`) and `"fp32"`; `pytorch-metric-learning`; `released`; `floor`, the product alone. That
they find the same is checked first; then their runs alternate, so that a busy machine slows all.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import graph_memory
import machine
import torch
from rank_processes import on_ranks
from report import Row, write_results, write_rows
from retrieval_arms import (
    FLOOR,
    OURS,
    PEER,
    RELEASED,
    YARDSTICKS,
    Problem,
    Spec,
    Values,
    arm_named,
    check_agreement,
    ranks_timed,
    run_floor,
    run_ours,
    run_split,
)
from retrieval_data import STRUCTURES

PARTS = ("time", "memory")
ITEMS, DIM, QUERIES = 60_502, 512, 8192
LARGE_ITEMS, LARGE_DIM, FLOOR_QUERIES = 1_000_000, 128, 4096
# Float32 products round differently in each arm: of 8192 queries one may find another nearest neighbour.
TOLERANCE = 2e-4
# A rank waits while another one searches alone.
RANKS_TIMEOUT_S, RANKS_LIMIT_S = 1800.0, 7200.0


@dataclass(frozen=True)
class Peak:
    """What a process of its own found.

    Attributes:
        bytes: The most it held, imports and inputs included (CUDA: of torch's allocator); None if it was stopped.
        above: The same beyond imports and inputs.
        seconds: Time of the run.
        floor: Time of the bare product, where asked for, for as many queries as the run had.
        note: Why there are no figures.
    """

    bytes: int | None
    above: int | None = None
    seconds: float | None = None
    floor: float | None = None
    note: str = ""


def label(arm: str, device: str) -> str:
    """An arm's name in rows: the default path says what instructions it had for bfloat16."""
    if arm == "default" and device == "cpu":
        return f"default ({machine.bf16_instructions() or 'no bf16 instructions'})"
    return arm


def why_not(arm: str, device: str) -> str:
    """Why an arm cannot run; empty if it can."""
    if arm == PEER:
        try:
            import faiss
            import pytorch_metric_learning  # noqa: F401
        except ImportError as error:
            return f"not run: {error}; pip install 'gcahng[test]'"
        if device == "cuda" and not hasattr(faiss, "StandardGpuResources"):
            return "not run: this faiss has no GPU code"
    return ""


def scaled_note(arm: str, spec: Spec) -> str:
    """Says that a figure was scaled, empty if it was not."""
    if spec.share(arm) == 1:
        return ""
    return f"{spec.queries} queries scaled to {spec.split or spec.items}"


def time_rows(spec: Spec, repeats: int) -> list[Row]:
    """Median times; ratios are medians over rounds of neighbouring runs.

    Of `pytorch-metric-learning` and `released` the ratio is their time over ours, of `floor` ours over it.
    """
    problem = Problem.of(spec)
    notes = {arm: why_not(arm, spec.device) for arm in YARDSTICKS}
    arms = [*OURS, *(arm for arm in (FLOOR, RELEASED, PEER) if not notes[arm])]
    found = {arm: arm_named(arm)(problem) for arm in arms}
    compared = {arm: values for arm, values in found.items() if values is not None}
    check_agreement(compared, TOLERANCE)
    rounds = []
    for _ in range(repeats):
        times = {}
        for arm in arms:
            gc.collect()
            wall, processor = machine.elapsed(partial(arm_named(arm), problem), spec.device)
            times[arm] = wall * spec.share(arm), processor * spec.share(arm)
        rounds.append(times)
    rows = []
    for ours in OURS:
        median = statistics.median(times[ours][0] for times in rounds)
        note = ", ".join(f"{name} {value:.3f}" for name, value in named(compared[ours]).items())
        rows.append(Row(spec.name(f"ours {label(ours, spec.device)} time"), median, "s", None, note=note))
    for ours in OURS:
        for arm in YARDSTICKS:
            name = spec.name(f"{arm} time, against {label(ours, spec.device)}")
            if notes[arm]:
                rows.append(Row(name, None, "s", None, note=notes[arm]))
                continue
            ratios = [[times[arm][clock] / times[ours][clock] for times in rounds] for clock in (0, 1)]
            wall, processor = (
                statistics.median(1 / one if arm == FLOOR else one for one in clocked) for clocked in ratios
            )
            value = statistics.median(times[arm][0] for times in rounds)
            extra = f"ratio: {'ours over it' if arm == FLOOR else 'it over ours'}; of processor time {processor:.2f}"
            rows.append(Row(name, value, "s", wall, note="; ".join(filter(None, (extra, scaled_note(arm, spec))))))
    return rows


def named(values: Values) -> dict[str, float]:
    """What was found, for a note."""
    recall = {f"R@{k}": share for k, share in values.recall.items()}
    return recall | {"R-Precision": values.r_precision, "MAP@R": values.map_at_r}


def peak_here(spec: Spec, arm: str) -> Peak:
    """In this process: make the data, then run the arm once; of a search with a gallery also the bare product."""
    torch.set_num_threads(spec.threads)
    # Imports and thread pools belong to the process, not to the arm.
    small = replace(spec, items=64, queries=16, split=16 if spec.split else 0)
    _run_once(Problem.of(small), arm)
    problem = Problem.of(spec)
    seconds: list[float] = []
    try:
        above = graph_memory.peak_above(
            lambda: seconds.append(machine.elapsed(lambda: _run_once(problem, arm), spec.device)[0]), spec.device
        )
    except OSError as error:
        return Peak(None, note=f"the system does not set peaks back ({error})")
    except torch.OutOfMemoryError:
        return Peak(None, note="out of memory")
    cuda = spec.device == "cuda"
    most = torch.cuda.max_memory_allocated() if cuda else graph_memory.resident("VmHWM")
    floor = _floor_seconds(problem) if spec.split or cuda else None
    return Peak(most, above, seconds[-1], floor)


def _run_once(problem: Problem, arm: str) -> None:
    if problem.spec.split:
        run_split(problem, OURS[arm])
    elif arm in OURS:
        run_ours(problem, OURS[arm])
    else:
        arm_named(arm)(problem)


def _floor_seconds(problem: Problem) -> float:
    """Time of the bare product for the queries that were searched, from a few of them."""
    spec = problem.spec
    all_queries = spec.queries if spec.split else spec.items
    few = min(FLOOR_QUERIES, all_queries)
    part = Problem(replace(spec, queries=few, split=spec.split or few), problem.embeddings, problem.labels)
    run_floor(part)
    return machine.elapsed(lambda: run_floor(part), spec.device)[0] * all_queries / few


def measure(spec: Spec, arm: str) -> Peak:
    """Start a process that runs an arm, and read its answer.

    Raises:
        RuntimeError: The process failed for another reason than memory.
    """
    machine.release_memory(spec.device)
    command = [sys.executable, __file__, "--child", json.dumps([asdict(spec), arm])]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode == -9:
        return Peak(None, note="stopped by the system, out of memory")
    if found.returncode:
        raise RuntimeError(f"{arm} at {spec.size} failed with exit code {found.returncode}:\n{found.stderr}")
    return Peak(**json.loads(found.stdout.splitlines()[-1]))


def memory_rows(spec: Spec) -> list[Row]:
    """Peak memory of each arm in a process of its own; the ratio is its peak over that of ours by default."""
    rows: list[Row] = []
    own: int | None = None
    for arm in (*OURS, PEER, RELEASED):
        name = spec.name(f"{'ours ' * (arm in OURS)}{label(arm, spec.device)} peak memory")
        note = why_not(arm, spec.device)
        peak = Peak(None, note=note) if note else measure(spec, arm)
        if arm == "default":
            own = peak.bytes
        if peak.bytes is None or peak.above is None:
            rows.append(Row(name, None, "GiB", None, note=peak.note))
            continue
        ratio = peak.bytes / own if own and arm not in OURS else None
        note = f"imports and inputs included; {peak.above / 2**30:.3g} GiB without"
        if spec.share(arm) != 1:
            note += f"; of {spec.queries} queries, not scaled"
        rows.append(Row(name, peak.bytes / 2**30, "GiB", ratio, note=note))
    return rows


def large_rows(spec: Spec) -> list[Row]:
    """Time and peak memory of a large search, each precision in a process of its own, one run; and the bare product."""
    rows = []
    for arm in OURS:
        peak, of = measure(spec, arm), label(arm, spec.device)
        if peak.bytes is None or peak.above is None or peak.seconds is None or peak.floor is None:
            rows.append(Row(spec.name(f"ours {of} time"), None, "s", None, note=peak.note))
            continue
        share, note = spec.share(arm), scaled_note(arm, spec)
        rows.append(Row(spec.name(f"ours {of} time"), peak.seconds * share, "s", None, note=note))
        floor = f"ratio: ours over it; from {min(FLOOR_QUERIES, spec.queries)} queries"
        ratio = peak.seconds / peak.floor
        rows.append(Row(spec.name(f"floor time, against {of}"), peak.floor * share, "s", ratio, note=floor))
        note = f"imports and inputs included; {peak.above / 2**30:.3g} GiB without"
        note += f"; of {spec.queries} queries, not scaled" * (share != 1)
        rows.append(Row(spec.name(f"ours {of} peak memory"), peak.bytes / 2**30, "GiB", None, note=note))
    return rows


def rank_rows(spec: Spec, ranks: list[int], repeats: int) -> list[Row]:
    """Times on W ranks of one thread each; the ratio is one rank's time over W times this one's: 1 is perfect."""
    rows = []
    spec = replace(spec, threads=1)
    for many in ranks:
        limits = {"group_timeout": RANKS_TIMEOUT_S, "time_limit": RANKS_LIMIT_S}
        rounds = on_ranks(many, ranks_timed, asdict(spec), repeats, **limits)[0]
        for arm in OURS:
            alone, together = (statistics.median(times[arm][place] for times in rounds) for place in (0, 1))
            ratio = statistics.median(times[arm][0] / times[arm][1] for times in rounds) / many
            name = spec.name(f"ours {label(arm, spec.device)} time on ranks") + f" W{many}"
            rows.append(Row(name, together, "s", ratio, note=f"one rank {alone:.4g} s; one thread each"))
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--results", type=Path, help="write the rows here with machine, versions, date and command")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, help="default: both; with --large or --ranks none but those named here"
    )
    parser.add_argument("--large", action="store_true", help="100,000 queries x 1,000,000; CUDA: the whole million")
    parser.add_argument("--ranks", nargs="+", type=int, default=[], help="numbers of processes to compare with one")
    parser.add_argument("--items", type=int, help=f"default {ITEMS}; --large {LARGE_ITEMS}, a tenth as many queries")
    parser.add_argument("--dim", type=int, help=f"channels; default {DIM}, --large {LARGE_DIM}")
    parser.add_argument(
        "--queries",
        type=int,
        help=f"rows that stand for all: of the yardsticks (default {QUERIES}), with --large of ours (default: all)",
    )
    parser.add_argument("--tail", action="store_true", help="class sizes that fall like a power, 2 to 1000")
    parser.add_argument("--structure", choices=STRUCTURES, default="trained", help="none: like an untrained network")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each arm")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for name, least in (("items", 50), ("dim", 1), ("queries", 1), ("repeats", 1), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}: got {value}")
    if any(many < 2 for many in options.ranks):
        parser.error(f"--ranks must be at least 2, which are compared with one: got {options.ranks}")
    if options.ranks and options.device == "cuda":
        parser.error("--ranks runs on the CPU: drop --device cuda")
    if options.parts is None:
        options.parts = [] if options.large or options.ranks else list(PARTS)
    return options


def specs_of(options: argparse.Namespace) -> tuple[Spec, Spec]:
    """What the parts search, and what `--large` does."""
    items = options.items or ITEMS
    threads = options.threads or torch.get_num_threads()
    usual = Spec(
        items,
        options.dim or DIM,
        min(options.queries or QUERIES, items),
        options.structure,
        options.tail,
        options.device,
        threads,
        options.seed,
    )
    items = options.items or LARGE_ITEMS
    split = 0 if options.device == "cuda" else items // 10
    queries = min(options.queries or items, split or items)
    large = replace(usual, items=items, dim=options.dim or LARGE_DIM, queries=queries, split=split)
    return usual, large


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print, write."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for name, value in machine.describe(options.device).items():
        print(f"{name}: {value}")
    usual, large = specs_of(options)
    work = {
        "time": lambda: time_rows(usual, options.repeats),
        "memory": lambda: memory_rows(usual),
        "ranks": lambda: rank_rows(usual, options.ranks, options.repeats),
        "large": lambda: large_rows(large),
    }
    chosen = [*options.parts, *(["ranks"] if options.ranks else []), *(["large"] if options.large else [])]
    rows: list[Row] = []
    for part, make in work.items():
        if part in chosen:
            found = make()
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
        values, chosen_arm = json.loads(sys.argv[2])
        print(json.dumps(asdict(peak_here(Spec(**values), chosen_arm))))
        sys.exit(0)
    sys.exit(main())
