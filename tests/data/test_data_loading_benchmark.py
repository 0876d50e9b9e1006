"""The benchmark of data loading runs at a small size, checks what the arms deliver, and writes its rows."""

import json
import math
import os
import statistics
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from benchmark_cases import FOLDER, load_benchmark
from PIL import Image

PATH = FOLDER / "data_loading.py"
SMALL = ["--classes", "3", "--images", "6", "--batch", "2x3", "--size", "120x90", "--rounds", "2"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("data_loading")


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_of_a_small_run(workers, tmp_path):
    target = tmp_path / "rows.json"
    command = [sys.executable, str(PATH), *SMALL, "--workers", str(workers), "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())
    assert all(set(row) == {"name", "value", "unit", "ratio"} for row in rows)
    assert all(row["value"] > 0 and math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in rows)
    assert [row["unit"] for row in rows] == ["images/s"] * 4 + ["MiB"] * 2 * workers
    (main,) = (row for row in rows if "imagefolder" in row["name"])
    assert main is rows[0] and main["unit"] == "images/s"
    assert "19 JPEGs of 120 x 90" in done.stdout and "2 batches of 2 x 3" in done.stdout
    assert f"; --workers {workers}, " in done.stdout
    assert done.stdout.count("worker USS") == 4 * workers
    for arm in ("ours ", "ours, normalised ", "imagefolder ", "webdataset "):
        assert f"\n{arm}" in done.stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_the_core_and_the_threads_are_given_back(benchmark):
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with benchmark.one_core() as where:
        assert torch.get_num_threads() == 1
        assert len(os.sched_getaffinity(0)) == 1 and where == f"bound to core {max(cores)}"
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)


def test_ratios_are_medians_of_rounds(benchmark):
    times = {"ours": [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)], "theirs": [(3.0, 2.0), (4.0, 2.0), (9.0, 2.0)]}
    assert benchmark.ratios(times, "ours", "theirs") == (3.0, 2.0)
    assert benchmark.ratios(times, "theirs", "ours")[0] == statistics.median([1 / 3, 1 / 2, 1 / 9])


def test_arms_that_deliver_other_pixels_stop_it(benchmark):
    moments = {"ours": (0.1, 1.0), "imagefolder": (0.0, 1.1)}
    benchmark.check_agreement(moments, images=400)
    with pytest.raises(RuntimeError, match=r"^ours: mean and deviation \(0.1, 2.0\) are not those"):
        benchmark.check_agreement(moments | {"ours": (0.1, 2.0)}, images=400)


def test_an_arm_with_too_few_batches_stops_it(benchmark):
    setting = benchmark.Setting(3, 6, 120, 90, 2, 3, 0)
    batch = torch.zeros(6, 3, 224, 224)
    for batches, message in (([batch], "a pass has 1 batches: expected 2"), ([batch[:5]], "a batch has shape")):
        with pytest.raises(RuntimeError, match=f"^x: {message}"):
            benchmark.check_and_warm_up(benchmark.Arm("x", lambda given=batches: iter(given)), setting)


def test_pictures_are_reproducible_and_of_a_photographs_size(benchmark, tmp_path):
    first = np.asarray(benchmark.picture(5, 500, 375))
    assert np.array_equal(first, benchmark.picture(5, 500, 375))
    assert not np.array_equal(first, benchmark.picture(6, 500, 375))
    sizes = benchmark.write_images(benchmark.Setting(2, 3, 500, 375, 2, 2, 0), tmp_path)
    assert len(sizes) == 7 and 30_000 < statistics.median(sizes) < 60_000
    with Image.open(tmp_path / "train" / "class0001" / "0002.jpg") as image:
        assert image.size == (500, 375)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "500"], "--size and --batch are two numbers, as in 500x375: got 500 and 27x3"),
        (["--batch", "50x2"], "P at most --classes: got P 50, 40"),
        (["--rounds", "0"], "numbers must be at least 1"),
        (["--workers", "2"], "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_refused(benchmark, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
