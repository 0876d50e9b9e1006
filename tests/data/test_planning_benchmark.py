"""The benchmark of planning runs, writes real shard folders, and stops where a guarantee does not hold."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from benchmark_cases import load_benchmark

from gcahng.data.plans.class_table import ClassTable
from gcahng.data.shards.reader import ShardSet


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("planning")


def test_rows_of_a_small_set(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "rows.json"
    arguments = ["--images", "3000", "--classes", "400", "--batches", "8x2", "--limit", "40", "--processes", "1"]
    assert benchmark.main([*arguments, "--glyph-classes", "40", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    assert all(set(row) == {"name", "value", "unit", "ratio"} for row in rows)
    assert [row["unit"] for row in rows] == ["ms", "ms", "ms", "s"] * 2 + ["MB", "ms"]
    for row in rows:
        assert row["value"] > 0 or row["unit"] == "MB"
        limit = {"ms": 5.0, "MB": 500.0}.get(row["unit"])
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(limit / row["value"])
    assert [row["ratio"] is not None for row in rows[:4]] == [True, False, False, False]
    assert rows[0]["name"] == "planning, mean per batch, 3000 images in 400 classes, 8x2, 1 windows"
    assert rows[-1]["name"].startswith("planning, mean per batch, glyphs (")
    assert "hold to every guarantee" in capsys.readouterr().out


def test_the_folder_is_a_whole_data_set_but_for_its_pixels(benchmark: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "SHARD_BYTES", 10_000_000)
    benchmark.write_folder(tmp_path, images=2000, classes=300)
    shards = ShardSet.open(tmp_path)
    assert len(shards) == 2000 and len(shards.classes) == 300
    assert 4 <= len(shards.manifest.shards) <= 10
    table = ClassTable.from_shards(shards, "train")
    assert table.num_classes == 300 and table.scattered.size == 0
    assert table.counts.tolist() == [info.num_samples for info in shards.classes]
    for row in (0, 7, 1999):
        record = shards.record(row)
        assert 10_000 <= record.length < 50_000 and record.key == row
        assert record.meta_offset >= record.offset + record.length


@pytest.mark.parametrize(
    ("labels", "rows", "message"),
    [
        ([0, 0], [[0, 1], [2, 3]], "is not 2x2 of distinct classes"),
        ([0, 1], [[0, 4]], "is not 2x2 of distinct classes"),
        ([0, 1], [[0, 4], [0, 5]], r"Class 0 shows rows \[0, 0\] of its 4 images"),
        ([0, 1], [[0, 4], [1, 2]], r"Class 1 shows rows \[4, 2\] of its 3 images"),
    ],
)
def test_a_batch_that_breaks_a_guarantee_stops_it(benchmark: ModuleType, labels, rows, message) -> None:
    table = ClassTable.build(np.repeat([0, 1], [4, 3]))
    batches = benchmark.Batches(2, 2)
    benchmark._check_batch(np.array([1, 0]), np.array([[4, 1], [6, 3]]), table, batches)
    with pytest.raises(RuntimeError, match=message):
        benchmark._check_batch(np.array(labels), np.array(rows), table, batches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "64"], "expected a batch like 64x2, got '64'"),
        (["--classes", "63"], "needs P <= classes <= images: got 256, 63, 10000000"),
        (["--images", "500"], "needs P <= classes <= images: got 256, 1000000, 500"),
        (["--limit", "0"], "--limit and --epochs must be at least 1: got 0, 3"),
        (["--processes", "65"], "--processes must be from 1 to P (64): got 65"),
    ],
)
def test_arguments_out_of_range(benchmark: ModuleType, arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
