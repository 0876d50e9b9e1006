"""The job scripts on a real SLURM of two nodes: conversion, training by DDP and DeepSpeed, evaluation, seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import why_not
from job_site import JOB_LIMIT_S, ROOT, SHORTER, SITE_VARIABLES, Site, rows_by_kind, settings_of_run

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def alone(site: Site) -> Path:
    """The run of one process, without launcher and cluster."""
    run_dir = site.folder / "alone"
    subprocess.run(
        [
            sys.executable,
            "launch/train.py",
            "--config",
            "configs/demo.yaml",
            "--quiet",
            *settings_of_run(site, run_dir),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=JOB_LIMIT_S,
        capture_output=True,
    )
    return run_dir


@pytest.mark.parametrize("deepspeed", ["", "launch/deepspeed/zero1.json"], ids=["ddp", "zero1"])
def test_two_nodes_train_as_one_process(site: Site, alone: Path, deepspeed: str) -> None:
    run_dir = site.folder / ("zero1" if deepspeed else "ddp")
    variables = {"GCAHNG_DEEPSPEED": deepspeed} if deepspeed else {}
    site.run("--nodes=2", "slurm/train.sh", "configs/demo.yaml", *settings_of_run(site, run_dir), **variables)

    assert (run_dir / "last" / "manifest.json").is_file()
    assert len(list((run_dir / "slurm").glob("*.log"))) == 2
    want, got = rows_by_kind(alone), rows_by_kind(run_dir)
    assert [row["samples"] for row in got["step"]] == [row["samples"] for row in want["step"]]
    for ours, theirs in zip(got["step"][:5], want["step"][:5], strict=True):
        for name in ("metric_loss", "node_loss", "synthetic_loss", "classifier_loss", "generation_loss", "total_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
    assert got["evaluation"][-1]["map_at_r"] == pytest.approx(want["evaluation"][-1]["map_at_r"], abs=0.01)


def test_an_array_trains_one_run_per_seed_and_evaluates_it(site: Site) -> None:
    run_dir = site.folder / "seeds"
    site.run(
        "--array=3",
        "slurm/train.sh",
        "configs/demo.yaml",
        *settings_of_run(site, run_dir),
        "train.max_steps_per_epoch=1",
    )
    assert "seed: 3\n" in (run_dir / "seed-3" / "config.yaml").read_text()
    printed = site.run("slurm/eval.sh", "--run", str(run_dir / "seed-3"))
    assert printed.count("MAP@R") == 1
    on_two_nodes = site.run("--nodes=2", "slurm/eval.sh", "--run", str(run_dir / "seed-3"))
    assert on_two_nodes.splitlines()[-1] == printed.splitlines()[-1], "another number of queries"
    got, want = (_means(text) for text in (on_two_nodes, printed))
    # Embeddings of other batches round otherwise, which may move a neighbour.
    assert got == pytest.approx(want, abs=1.0) and "MAP@R" in want


def test_a_table_is_an_array_of_runs(site: Site) -> None:
    """`launch/tables.py submit` with the real sbatch; what it prints names the job, what it trained is collected."""
    spec = site.folder / "table.yaml"
    spec.write_text(
        f"{{title: T, config: {ROOT}/configs/demo.yaml, data_sets: [glyphs], metrics: [MAP@R], seeds: [0, 1], rows: ["
        "{name: Baseline, overrides: [graph.enabled=false, generation.enabled=false]}]}"
    )
    settings = [*SHORTER, "train.epochs=1", "train.max_steps_per_epoch=1"]
    options = ["--data", f"glyphs={site.data}", "--set", *settings, "--out", f"{site.folder}/tables"]
    command = [sys.executable, "launch/tables.py"]
    environment = site.cluster.environment | SITE_VARIABLES
    submitted = subprocess.run(
        [*command, "submit", str(spec), *options, "--sbatch", f"--output={site.folder}/table-%a.out"],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    assert submitted.startswith("sbatch --array=0-1 ")
    job = int(submitted.split()[-1])
    for task in (f"{job}_0", f"{job}_1"):
        state = site.cluster.wait(task, JOB_LIMIT_S)
        logs = "".join(file.read_text() for file in sorted(site.folder.glob("tab*/**/*.log")))
        assert state == "COMPLETED", f"{task} {state}\n{logs}"
    collected = subprocess.run(
        [*command, "collect", str(spec), *options, "--json", f"{site.folder}/t.json"],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    assert "not run" not in collected
    (cell,) = json.loads((site.folder / "t.json").read_text())["table"]["cells"]
    assert [run["seed"] for run in cell["runs"]] == [0, 1]


def test_a_missing_configuration_is_one_error(site: Site) -> None:
    with pytest.raises(AssertionError, match="FAILED") as failure:
        site.run("slurm/train.sh", "configs/absent.yaml")
    assert "error: " in str(failure.value)
    assert "absent.yaml" in str(failure.value)


def _means(printed: str) -> dict[str, float]:
    """Percentages by name from the line of an evaluation."""
    words = printed.splitlines()[-2].split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))
