"""The benchmark of the graph step runs, compares equal losses, and refuses what it cannot measure."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_cases import load_benchmark

from gcahng.graph import reference


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("graph_step")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_a_small_size(benchmark: ModuleType, precision: str, tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    original = reference.edge_update
    arguments = ["--sizes", "5x2-D32-L2-N7-H2", "--repeats", "2", "--precision", precision]
    assert benchmark.main([*arguments, "--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    assert [set(row) for row in rows] == [{"name", "value", "unit", "ratio"}] * 2
    for row in rows:
        assert f"cpu {precision} 5x2 D32 L2 N7" in row["name"]
        assert row["unit"] == "s"
        assert row["value"] > 0
        assert math.isfinite(row["ratio"])
    assert "as released" in rows[1]["name"]
    assert reference.edge_update is original


def test_losses_that_differ_stop_it(benchmark: ModuleType) -> None:
    size = benchmark.Size.parse("4x2-D16-L1-N5")
    runs = benchmark.arms(benchmark.Problem.of(size, "cpu", "fp32"))
    losses = {arm: run() for arm, run in runs.items()}
    benchmark.check_agreement(losses, size, 1e-4)
    losses["pairs"]["similarity"] = losses["pairs"]["similarity"] * 1.01
    with pytest.raises(RuntimeError, match="4x2 D16 L1 N5: the similarity loss of pairs is off by"):
        benchmark.check_agreement(losses, size, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "27x3"], "expected a size like 27x3-D512-L2-N100, got '27x3'"),
        (["--sizes", "5x1-D16-L1-N7"], "needs K >= 2, 1 <= P <= N, and H that divides D"),
        (["--sizes", "5x2-D16-L1-N4"], "needs K >= 2, 1 <= P <= N, and H that divides D"),
        (["--repeats", "0"], "--repeats must be at least 1: got 0"),
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
