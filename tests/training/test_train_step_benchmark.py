"""The benchmark of the whole training step runs small and compares what it says."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_cases import load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("train_step")


def test_row_of_a_small_step(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "rows.json"
    arguments = ["--sizes", "4x2-L1", "--pixels", "16", "--repeats", "1", "--threads", "1", "--json", str(target)]
    assert benchmark.main(arguments) == 0
    (row,) = json.loads(target.read_text())
    assert row["name"] == (
        "training step, cpu fp32 small_conv 16 pixels channels_last 4x2 D512 L1 N100, ours / baseline"
    )
    assert row["unit"] == "s"
    assert row["value"] > 0
    # The step with the graph does more.
    assert row["ratio"] > 1
    assert "baseline" in row["note"]
    assert "On a CPU: small_conv at 16 pixels" in capsys.readouterr().out


def test_the_arms_are_what_they_are_called(benchmark: ModuleType) -> None:
    options = benchmark.Options("cpu", "fp32", "small_conv", 16, 1)
    size = benchmark.Size.parse("3x2-L2")
    ours, baseline = (options.step(size, graph=graph)() for graph in (True, False))
    benchmark.check_report("ours", ours)
    benchmark.check_report("baseline", baseline)
    assert set(baseline) == {"metric_loss", "total_loss"}
    with pytest.raises(RuntimeError, match="The step of ours has the losses"):
        benchmark.check_report("ours", baseline)
    with pytest.raises(RuntimeError, match="The step of baseline has the losses"):
        benchmark.check_report("baseline", ours)
    with pytest.raises(RuntimeError, match="The metric_loss of baseline is nan"):
        benchmark.check_report("baseline", baseline | {"metric_loss": torch.tensor(torch.nan)})


def test_both_arms_start_from_the_same_backbone(benchmark: ModuleType) -> None:
    options = benchmark.Options("cpu", "fp32", "small_conv", 16, 1)
    size = benchmark.Size.parse("3x2-L1")
    ours, baseline = (options.step(size, graph=graph)() for graph in (True, False))
    assert torch.equal(ours["metric_loss"], baseline["metric_loss"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "40x2"], "expected a size like 40x2-L1, got '40x2'"),
        (["--sizes", "101x2-L1"], "needs K >= 2, 1 <= P <= 100, L >= 1: got '101x2-L1'"),
        (["--pixels", "0"], "--pixels must be at least 1: got 0"),
    ],
)
def test_arguments_out_of_range(
    benchmark: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
