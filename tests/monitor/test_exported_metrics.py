"""What real runs export, against docs/monitoring.md; after a resume; on several ranks."""

import logging
import re
import socket
import urllib.error
from pathlib import Path

import pytest
import torch
from monitor_cases import ROOT, Exported, Scraper, free_port, metrics_of_rank, scraped, watched_run
from rank_group import run_ranks
from run_cases import make_trainer, read_metrics

from gcahng.monitor.specs import SPECS

EPOCHS = 2
# All parts, with everything that is exported only where it is asked for.
SETTINGS = {"train.epochs": EPOCHS, "data.validation": 0.25, "eval.precision_ks": [1]}


def documented() -> dict[str, dict[str, str]]:
    """The table's rows by name."""
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8").partition("## Metrics")[2]
    lines = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported") / "run"


@pytest.fixture(scope="module")
def exported(shards: Path, run_dir: Path, port: int) -> Exported:
    """Of a run of two epochs, with its text file beside the run folder."""
    settings = SETTINGS | {"monitor.port": port, "monitor.textfile": str(run_dir.with_name("run.prom"))}
    scraper = Scraper(port)
    watched_run(make_trainer(shards, run_dir, settings), scraper)
    return scraper.exported


def test_the_document_lists_what_is_exported_and_nothing_else(exported: Exported) -> None:
    table = documented()
    here = {name: row for name, row in table.items() if "CUDA" not in row["ranks"] or torch.cuda.is_available()}
    assert set(exported.kinds) == set(here)
    assert exported.kinds == {name: row["type"] for name, row in here.items()}
    labels = {name: set(re.findall(r"`(\w+)`", row["labels"])) for name, row in here.items()}
    assert exported.labels == labels


def test_the_document_says_what_the_help_texts_say() -> None:
    rows = {name: (row["unit"], row["meaning"], row["ranks"]) for name, row in documented().items()}
    ranks = {spec.name: ("each" if spec.each_rank else "0") + (", CUDA" if spec.cuda else "") for spec in SPECS}
    assert rows == {spec.name: (spec.unit, spec.meaning, ranks[spec.name]) for spec in SPECS}
    for spec in SPECS:  # base units, and totals of counters, in the name
        assert spec.unit not in ("seconds", "bytes") or spec.name.endswith(f"_{spec.unit}")
        assert (spec.kind == "counter") == spec.name.endswith("_total")


def test_the_values_are_those_of_the_run(exported: Exported, run_dir: Path) -> None:
    found, rows = exported.values, read_metrics(run_dir, clocks=True)
    step = [row for row in rows if row["kind"] == "step"][-1]
    steps = step["step"]
    assert steps == found["gcahng_steps_total"] == found["gcahng_step"] == found["gcahng_planned_steps"]
    assert found["gcahng_images_total"] == 8 * steps
    assert found["gcahng_epoch"] == found["gcahng_planned_epochs"] == EPOCHS
    assert found["gcahng_step_seconds_count"] == found["gcahng_data_wait_seconds_count"] == steps
    assert 0 < found["gcahng_data_wait_seconds_sum"] < found["gcahng_step_seconds_sum"]
    assert found["gcahng_mean_step_seconds"] == step["step_seconds"]
    losses = {name for name in step if name.endswith("_loss")}
    assert len(losses) == 9
    for name in losses:
        assert found[f'gcahng_loss{{name="{name.removesuffix("_loss")}"}}'] == step[name]
    for part in ("metric_model", "graph", "classifier"):
        assert found[f'gcahng_learning_rate{{part="{part}"}}'] == step[f"lr_{part}"]
    for name in ("pull_factor", "embedding_std", "effective_rank", "mean_negative_distance"):
        assert found[f"gcahng_{name}"] == step[name]
    for split in ("test", "validation"):
        row = [row for row in rows if row.get("split") == split][-1]
        for k in (1, 2, 4):
            assert found[f'gcahng_recall_at_k{{k="{k}",split="{split}"}}'] == row[f"recall_at_{k}"]
        assert found[f'gcahng_map_at_r{{split="{split}"}}'] == row["map_at_r"]
    assert found["gcahng_checkpoint_failures_total"] == found["gcahng_non_finite_steps_total"] == 0
    assert found["gcahng_checkpoint_pause_seconds_count"] >= found["gcahng_checkpoint_seconds_count"] >= EPOCHS
    assert 1e7 < found["gcahng_resident_memory_bytes"] < 1e11
    assert found['gcahng_run_state{state="running"}'] == 1


def test_the_endpoint_ends_with_the_run(exported: Exported, port: int) -> None:
    with pytest.raises(urllib.error.URLError):
        scraped(port)
    with socket.socket() as one:  # nobody holds the port
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", port))
        one.listen()


def test_the_text_file_says_how_the_run_ended(exported: Exported, run_dir: Path) -> None:
    written = Exported()
    written.add(run_dir.with_name("run.prom").read_text())
    assert written.kinds == exported.kinds
    # One scrape of node_exporter brings the files of several runs: no two series may be the same.
    assert all("run" in labels for labels in written.labels.values())
    name = str(run_dir)
    assert written.values[f'gcahng_run_state{{run="{name}",state="finished"}}'] == 1
    assert written.values[f'gcahng_run_state{{run="{name}",state="running"}}'] == 0
    assert written.values[f'gcahng_epoch{{run="{name}"}}'] == EPOCHS


def test_after_a_resume_counters_begin_anew_and_gauges_go_on(
    shards: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And a port that is taken ends no run."""
    constant = {"optim.graph.schedule.name": "constant"}
    folder, textfile = run_dir.with_name("resumed"), run_dir.with_name("resumed.prom")
    make_trainer(shards, folder, constant).run()
    with socket.socket() as other, caplog.at_level(logging.WARNING):
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        settings = {"train.epochs": 2, "train.resume": "auto", "monitor.port": port, "monitor.textfile": str(textfile)}
        make_trainer(shards, folder, constant | settings).run()
    (warning,) = [record.message for record in caplog.records if "endpoint" in record.message]
    assert f"127.0.0.1, port {port} cannot be listened on" in warning and "Address already in use" in warning
    found = Exported()
    found.add(textfile.read_text())
    label = f'{{run="{folder}"}}'
    assert found.values[f"gcahng_steps_total{label}"] == 5
    assert found.values[f"gcahng_images_total{label}"] == 40
    assert found.values[f"gcahng_step{label}"] == found.values[f"gcahng_planned_steps{label}"] == 10


def test_each_rank_shows_its_own_process_and_rank_0_the_run(shards: Path, tmp_path: Path) -> None:
    port = free_port(2)
    settings = {"monitor.port": port, "monitor.each_rank": True, "train.max_steps_per_epoch": 2}
    first, second = run_ranks(2, metrics_of_rank, shards, tmp_path / "run", settings)
    each = {spec.name for spec in SPECS if spec.each_rank and not spec.cuda}
    assert set(second.kinds) == each
    assert set(first.kinds) > each
    assert first.values["gcahng_images_total"] == 16  # of both ranks
    assert "gcahng_images_total" not in second.values
    for rank, found in enumerate((first, second)):
        info = f'gcahng_rank_info{{device="cpu",local_rank="{rank}",rank="{rank}",world_size="2"}}'
        assert found.values[info] == 1
        assert found.values["gcahng_step_seconds_count"] == 2
