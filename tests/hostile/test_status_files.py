"""Run folders of strangers in `launch/status.py`: every file may be anything, and the answer comes in bounded time."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import yaml
from fuzzing import YAML_BOMBS, encode_tree, fuzz, limited, many, mutate_bytes, mutate_tree
from run_cases import base_settings

from gcahng.monitor.heartbeat import STATUS_FILE, plain
from gcahng.monitor.run_folder import CONFIG, MANIFEST, METRICS, RESULTS, STATE, RunStatus, read_status
from gcahng.monitor.status_text import block, table


def make_run(folder: Path) -> Path:
    """One evaluated epoch and a checkpoint, without weights."""
    saved = folder / "step-5"
    saved.mkdir(parents=True)
    evaluated = {"split": "test", "recall_at_1": 0.5, "map_at_r": 0.25, "epoch": 1}
    progress = {"step": 5, "epoch": 1, "batch": 0, "last": {"test": evaluated}, "best": {"test": evaluated}}
    (saved / STATE).write_text(json.dumps({"progress": progress}))
    (saved / MANIFEST).write_text(json.dumps({STATE: {"bytes": (saved / STATE).stat().st_size, "sha256": ""}}))
    (folder / CONFIG).write_text(yaml.safe_dump(base_settings(Path("shards"), folder)))
    step = {"kind": "step", "step": 5, "epoch": 0, "total_loss": 0.5, "step_seconds": 0.1, "data_seconds": 0.01}
    rows = [step, {"kind": "evaluation", "step": 5, **evaluated}]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / RESULTS).write_text(json.dumps({"steps": 5, "last": evaluated}))
    beat = {"state": "running", "activity": "training", "host": "a", "pid": 1, "time": 1.0, "ranks": 2, **progress}
    (folder / STATUS_FILE).write_text(json.dumps(beat | {"step_seconds": 0.1, "losses": {"total_loss": 0.5}}))
    return folder


def shown(run: Path) -> RunStatus:
    """As the command shows it."""
    status = read_status(run)
    text = block(status) + table([status]) + json.dumps(plain(status.as_json()), allow_nan=False)
    assert text.replace("\n", "").isprintable()
    return status


@many(400)
def test_damaged_files(fast_folder: Path, examples: int, record_property: Callable[[str, object], None]) -> None:
    run = make_run(fast_folder / "run")
    files = {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}
    kinds: set[bool] = set()

    def read(draw: Random) -> None:
        changed = draw.choice(sorted(files))
        for file, content in files.items():
            if file != changed:
                file.write_bytes(content)
            elif file.suffix == ".json":
                file.write_bytes(encode_tree(draw, mutate_tree(draw, json.loads(content))))
            elif file.suffix == ".jsonl":
                rows = [mutate_tree(draw, json.loads(line)) for line in content.splitlines()]
                file.write_bytes(b"\n".join(encode_tree(draw, row) for row in rows))
            else:
                tree = mutate_tree(draw, yaml.safe_load(content))
                file.write_bytes(draw.choice((mutate_bytes(draw, content), json.dumps(tree).encode())))
        kinds.add(bool(shown(run).warnings))

    assert fuzz("status of a run", examples, read, record_property).tried >= examples
    assert kinds == {True, False}


@pytest.mark.parametrize("text", [*YAML_BOMBS[:5], "[" * 200_000, "- " * 100_000, "a: " + "b" * 500_000])
def test_a_configuration_that_unpacks_without_end(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run")
    (run / CONFIG).write_text(text)
    with limited():
        status = shown(run)
    assert f"{CONFIG} cannot be read (it " in status.warnings[0] and status.step == 5


@pytest.mark.parametrize("name", [CONFIG, STATUS_FILE, RESULTS, METRICS, f"step-5/{MANIFEST}", f"step-5/{STATE}"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    os.mkfifo(run / name)
    with limited():
        shown(run)


def test_endless_epochs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / STATUS_FILE).unlink()
    shutil.rmtree(run / "step-5")
    (run / CONFIG).write_text(f"train: {{epochs: {10**15}}}\neval: {{every_epochs: 3}}\n")
    with limited():
        status = shown(run)
    assert status.planned_steps == 5 * 10**15
