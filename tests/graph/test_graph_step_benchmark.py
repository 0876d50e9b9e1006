"""The benchmark of the graph step compares equal losses and gradients, measures, and refuses what it cannot measure."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_cases import load_benchmark
from torch.utils.flop_counter import FlopCounterMode

from gcahng.graph import reference

SMALL = "5x2-D64-L2-N7-H2"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("graph_step")


def rows_of(benchmark: ModuleType, folder: Path, *arguments: str) -> list[dict[str, object]]:
    target = folder / "rows.json"
    assert benchmark.main(["--repeats", "1", "--threads", "1", "--json", str(target), *arguments]) == 0
    return json.loads(target.read_text())


def test_rows_of_a_small_size(benchmark: ModuleType, tmp_path: Path) -> None:
    original = reference.edge_update
    results = tmp_path / "folder" / "results.json"
    time, memory, lean, arithmetic, logits = rows_of(benchmark, tmp_path, "--sizes", SMALL, "--results", str(results))
    assert time["name"] == "graph step time, cpu fp32 5x2 D64 L2 N7"
    assert memory["name"] == "graph step peak memory, cpu fp32 5x2 D64 L2 N7"
    assert lean["name"] == "graph step peak memory, cpu fp32 5x2 D64 L2 N7, R0 lean"
    assert [row["unit"] for row in (time, memory, lean, arithmetic, logits)] == ["s", "GiB", "GiB", "GFLOP", "rows"]
    for row in (time, memory, lean, arithmetic, logits):
        assert set(row) == {"name", "value", "unit", "ratio", "floor", "share_of_floor", "note"}
        assert row["value"] > 0
        assert math.isfinite(row["ratio"])
    assert 0 < time["floor"] < time["value"]
    assert 0 < time["share_of_floor"] < 1
    # With one round a ratio is the yardstick's figure, which the note states, over ours.
    for row, digits, name in ((time, 4, "R0"), (memory, 3, "R0"), (lean, 3, "R0 lean")):
        assert row["note"].startswith(f"{name} ")
        theirs = float(row["note"].removeprefix(name).split()[0])
        assert row["ratio"] == pytest.approx(theirs / row["value"], rel=10.0 ** (1 - digits))
    written = json.loads(results.read_text())
    assert written["rows"][0] == time
    assert written["machine"]["torch"] == torch.__version__.split("+")[0]
    assert written["machine"]["threads"] == 1
    assert reference.edge_update is original


def test_bf16_states_the_instructions(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.machine, "bf16_instructions", lambda: "amx_bf16")
    (row,) = rows_of(benchmark, tmp_path, "--sizes", SMALL, "--precision", "bf16", "--parts", "time")
    assert row["name"] == "graph step time, cpu bf16 (amx_bf16) 5x2 D64 L2 N7"
    assert row["ratio"] > 0


def test_bf16_without_instructions_is_not_run(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark.machine, "bf16_instructions", lambda: "")
    (row,) = rows_of(benchmark, tmp_path, "--sizes", SMALL, "--precision", "bf16", "--parts", "time")
    assert (row["value"], row["ratio"]) == (None, None)
    assert row["note"] == "not run: the CPU has no avx512_bf16 or amx_bf16"


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fpu avx512_bf16 avx512f", "avx512_bf16"),
        ("amx_bf16 amx_tile avx512_bf16", "avx512_bf16+amx_bf16"),
        ("avx512f avx512_bf16_not", ""),
        ("", ""),
    ],
)
def test_bf16_instructions(benchmark: ModuleType, flags: str, found: str) -> None:
    assert benchmark.machine.bf16_instructions(flags) == found


def test_cpu_fields(benchmark: ModuleType) -> None:
    text = "processor\t: 0\nmodel name\t: One: two\nflags\t\t: a b\n\nprocessor\t: 1\nmodel name\t: Other\n"
    assert benchmark.machine.cpu_field("model name", text) == "One: two"
    assert benchmark.machine.cpu_field("flags", text) == "a b"
    assert benchmark.machine.cpu_field("Features", text) == ""


def test_no_room_for_the_reference(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a process of its own takes to start is spared here: the peak of ours may then be too small to see.
    monkeypatch.setattr(benchmark.graph_memory, "measure", benchmark.graph_memory.measure_here)
    monkeypatch.setattr(benchmark.machine, "free_memory", lambda device: 2**19)
    time, memory = rows_of(benchmark, tmp_path, "--sizes", SMALL, "--parts", "time", "memory")
    assert time["value"] > 0
    assert memory["value"] >= 0
    for row in (time, memory):
        assert row["ratio"] is None
        assert row["note"] == "reference cannot run: it needs about 0 GiB, 0 are free"


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_numbers_that_differ_stop_it(benchmark: ModuleType, kind: str) -> None:
    size = benchmark.Size.parse("4x2-D16-L1-N5")
    want = {"one": torch.tensor([3.0, 4.0]), "two": torch.tensor([1.0])}
    found = {name: value.clone() for name, value in want.items()}
    benchmark.check_agreement("ours", size, found, want, 1e-4, kind)
    found["two"] += 2e-4
    with pytest.raises(RuntimeError, match=f"4x2 D16 L1 N5: the two {kind} of ours is off by 2.0e-04, more than 1e-04"):
        benchmark.check_agreement("ours", size, found, want, 1e-4, kind)
    found["two"] = torch.tensor([math.nan])
    with pytest.raises(RuntimeError, match="off by nan"):
        benchmark.check_agreement("ours", size, found, want, 1e-4, kind)
    del found["two"]
    with pytest.raises(RuntimeError, match=f"ours has other {kind}s than R0: \\['two'\\]"):
        benchmark.check_agreement("ours", size, found, want, 1e-4, kind)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("loss", lambda edges: 1.01 * edges), ("gradient", lambda edges: 2 * edges - edges.detach())],
)
def test_an_arm_that_computes_something_else_stops_it(
    benchmark: ModuleType,
    kind: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arms = sys.modules["graph_arms"]
    right = arms.edge_update_per_edge
    monkeypatch.setattr(arms, "edge_update_per_edge", lambda *arguments: change(right(*arguments)))
    with pytest.raises(RuntimeError, match=f"5x2 D64 L2 N7: the .* {kind} of ours is off by"):
        benchmark.agreeing_arms(benchmark.Size.parse(SMALL), benchmark.Options("cpu", "fp32"))


@pytest.mark.parametrize("layers", [1, 2])
def test_the_edge_list_does_the_released_codes_products(benchmark: ModuleType, layers: int) -> None:
    """Per edge and layer: edge to node 1, query 1, two keys, two values, feed-forward 8; the read-out 1 (times D²)."""
    dim, training_classes = 16, 16

    def flop(num_classes: int) -> float:
        size = benchmark.Size.parse(f"{num_classes}x2-D{dim}-L{layers}-N{training_classes}")
        arm = benchmark.arm_named("R0", benchmark.Problem.of(size, "cpu"), "fp32")
        with FlopCounterMode(display=False) as counter:
            arm.run()
        return counter.get_total_flops()

    # B = 8, 16, 32: what is linear in B and what is constant cancel.
    per_edge = (flop(16) - 3 * flop(8) + 2 * flop(4)) / (32**2 - 3 * 16**2 + 2 * 8**2)
    forward = 14 * layers + 1
    # Metric pass: what reaches nodes. Generation pass: all, but no gradient of the first edges.
    backward = 28 * layers - 26 + 28 * layers
    classifier = 3 * training_classes / (2 * dim)
    # Fusing K = 2 interpolations, forward and backward in both passes, and anchors times synthetic negatives.
    fusion, scores = 4 / dim, 3 / (2 * dim)
    assert per_edge / (2 * dim**2) == pytest.approx(2 * forward + backward + classifier + fusion + scores)


@pytest.mark.parametrize("name", ["R0", "R0 lean"])
def test_the_edge_list_leaves_nothing_behind(benchmark: ModuleType, name: str) -> None:
    problem = benchmark.Problem.of(benchmark.Size.parse(SMALL), "cpu")
    arm = benchmark.arm_named(name, problem, "fp32")
    precision = torch.get_float32_matmul_precision()
    arm.run()
    assert problem.classifier.weight.grad is None
    assert all(parameter.grad is None for parameter in arm.graph.parameters())
    assert torch.get_float32_matmul_precision() == precision


def test_a_process_that_fails_says_why(benchmark: ModuleType) -> None:
    memory = benchmark.graph_memory
    with pytest.raises(RuntimeError, match=r"(?s)ours at 5x2 failed with exit code 1:.*expected a size like"):
        memory.measure(memory.Spec("ours", "5x2", "cpu", "fp32", "tied", "auto", 1))


def test_peak_counts_what_is_freed_and_not_what_was_there(benchmark: ModuleType) -> None:
    memory = benchmark.graph_memory
    before = torch.ones(32 << 18)
    peak = memory.peak_above(lambda: torch.ones(64 << 18).sum(), "cpu")
    assert before.sum() > 0
    assert 60 << 20 <= peak <= 80 << 20
    assert memory.peak_above(lambda: None, "cpu") < 8 << 20


def test_classifier_work(benchmark: ModuleType) -> None:
    size = benchmark.Size.parse("6x2-D32-L1-N50")
    unit = 2 * size.batch * 6 * 32 * 50
    found = benchmark.classifier_work("R0", size, "fp32")
    assert found.flop == pytest.approx(3 * unit)
    assert found.rows == size.batch * 6
    ours = benchmark.classifier_work("ours", size, "fp32")
    assert ours.flop <= 2 * unit * (1 + 1e-9)
    with pytest.raises(ValueError, match="N must be larger than P"):
        benchmark.classifier_work("ours", benchmark.Size.parse("6x2-D32-L1-N6"), "fp32")


def test_growth_rows(benchmark: ModuleType) -> None:
    sizes = [benchmark.Size.parse(text) for text in ("4x2-D32-L1-N9", "8x2-D32-L1-N9")]
    options = benchmark.Options("cpu", "fp32", repeats=1)
    first, second = benchmark.growth_time_rows(sizes, options)
    assert first.name == "graph step time per ordered edge, cpu fp32 4x2 D32 L1 N9"
    assert first.ratio == 1
    assert second.ratio == pytest.approx(first.value / second.value)
    each, whole = benchmark.growth_memory_rows(sizes[1:], options)
    assert (each.name, each.ratio) == ("graph step peak memory per ordered edge, cpu fp32 8x2 D32 L1 N9", 1)
    assert each.value * 16**2 == pytest.approx(whole.value * 2**30)
    assert whole.name == "graph step peak memory, cpu fp32 8x2 D32 L1 N9"


def test_floor_and_estimate_of_the_reference(benchmark: ModuleType) -> None:
    size = benchmark.Size.parse("40x2-D512-L1-N11318")
    edge_work = 2 * (54 - 13) * 512**2 * 80 * 81 / 2
    classifier = 2 * 2 * 80 * 40 * 512 * 11318
    assert size.floor_flop == edge_work + classifier
    small = benchmark.Size.parse("40x2-D512-L1-N100")
    assert small.reference_bytes == pytest.approx(82.6 * 6400 * 512 * 4 + 3 * 3200 * 100 * 4)
    assert benchmark.why_not(small, "cpu") == ""
    assert benchmark.Size.parse(size.text) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "27x3"], "expected a size like 27x3-D512-L2-N100, got '27x3'"),
        (["--sizes", "5x1-D16-L1-N7"], "needs K >= 2, 1 <= P <= N, L >= 1, and H that divides D"),
        (["--sizes", "5x2-D16-L1-N4"], "needs K >= 2, 1 <= P <= N, L >= 1, and H that divides D"),
        (["--sizes", "5x2-D16-L0-N7"], "needs K >= 2, 1 <= P <= N, L >= 1, and H that divides D"),
        (["--sizes", "5x2-D16-L1-N7-H0"], "needs K >= 2, 1 <= P <= N, L >= 1, and H that divides D"),
        (
            ["--sizes", "5x2-D16-L1-N5"],
            "--parts classifier needs more training classes than classes in the batch, N > P",
        ),
        (["--repeats", "0"], "--repeats must be at least 1: got 0"),
        (["--threads", "0"], "--threads must be at least 1: got 0"),
    ],
)
def test_arguments_out_of_range(
    benchmark: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_device(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err
