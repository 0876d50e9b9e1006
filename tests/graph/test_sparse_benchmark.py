"""The benchmark of the sparse graph runs, compares equal numbers first, and refuses what it cannot measure."""

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_cases import load_benchmark

SIZES = ["--dense-size", "9x2-D16-L2-N30-H2", "--sizes", "8x2-D16-L1-N30", "16x2-D16-L1-N30"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("sparse_graph")


def spec(benchmark: ModuleType, **changes: object) -> object:
    values = asdict(benchmark.Spec("sparse", "8x2-D16-L1-N30", 2, "cpu", "fp32", "auto", None, 1))
    return benchmark.Spec(**(values | changes))


def test_rows_of_small_sizes(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Peaks are measured in this process: each other one takes seconds to start.
    monkeypatch.setattr(benchmark, "peak_memory", benchmark.peak_here)
    target = tmp_path / "rows.json"
    threads = str(torch.get_num_threads())
    arguments = [*SIZES, "--neighbours", "2", "--repeats", "1", "--threads", threads]
    assert benchmark.main([*arguments, "--json", str(target)]) == 0
    rows = {row["name"]: row for row in json.loads(target.read_text())}
    dense = "dense over sparse, cpu fp32 9x2 D16 L2 N30 k2"
    assert rows[f"sparse graph step time, {dense}"]["ratio"] > 0
    assert rows[f"sparse graph step peak memory, {dense}"]["unit"] == "GiB"
    small, large = (f"cpu fp32 {classes}x2 D16 L1 N30 k2" for classes in (8, 16))
    assert len(rows) == 2 + 2 * 4
    for size in (small, large):
        whole, choice = rows[f"sparse graph step time, {size}"], rows[f"sparse graph choice of the edges, {size}"]
        assert 0 < choice["value"] < whole["value"]
        assert choice["ratio"] == pytest.approx(choice["value"] / whole["value"])
        assert whole["share_of_floor"] == pytest.approx(whole["floor"] / whole["value"])
        assert rows[f"sparse graph step time per listed edge, {size}"]["unit"] == "ns"
        assert rows[f"sparse graph step peak memory per listed edge, {size}"]["unit"] == "bytes"
    assert rows[f"sparse graph step time per listed edge, {small}"]["ratio"] == 1


def test_a_process_of_its_own_tells_its_peak(benchmark: ModuleType) -> None:
    # A buffer of edges in float32 at the least.
    size = "64x2-D64-L1-N64"
    wanted = spec(benchmark, size=size, neighbours=8)
    found = benchmark.peak_memory(wanted)
    rows = wanted.build().plan.num_rows  # type: ignore[attr-defined]
    assert found.bytes > 4 * 64 * rows


def test_bfloat16_agrees_within_its_digits(benchmark: ModuleType) -> None:
    benchmark.check_against_dense(spec(benchmark, precision="bf16"))


def test_numbers_that_differ_from_the_dense_graph_stop_it(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark.check_against_dense(spec(benchmark))
    choose = benchmark.neighbour_plan
    monkeypatch.setattr(benchmark, "neighbour_plan", lambda z, samples, k, **named: choose(z, samples, k - 1, **named))
    with pytest.raises(RuntimeError, match="of sparse is off by"):
        benchmark.check_against_dense(spec(benchmark))


def test_every_run_chooses_its_edges_anew(benchmark: ModuleType) -> None:
    arm = spec(benchmark).build()  # type: ignore[attr-defined]
    first = arm.plan
    arm.run()
    assert arm.plan is not first
    assert arm.plan.edge_count == first.edge_count
    edges, classifier = arm.floor_flop()
    pairs = (first.edge_count + 16) / 2
    assert edges == 2 * (54 - 13) * 16**2 * pairs
    assert classifier == 4 * first.edge_count / 2 * 16 * 30


def test_a_child_that_fails_is_reported(benchmark: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="sparse at 8x2-D16-L1-N7 failed with exit code 1"):
        benchmark.peak_memory(spec(benchmark, size="8x2-D16-L1-N7"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "27x3"], "expected a size like 27x3-D512-L2-N100, got '27x3'"),
        (["--neighbours", "0"], "--neighbours must be at least 1: got 0"),
        (["--edges-per-chunk", "-1"], "--edges-per-chunk must be at least 1: got -1"),
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
