"""`launch/evaluate.py --released` and `launch/released.py`: the authors' checkpoints from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from released_cases import DIM, SMALL, assert_same_state, small_extractor, small_state
from run_cases import base_settings, with_overrides

from gcahng.data.shards.reader import ShardSet
from gcahng.training.config import load_config
from gcahng.training.evaluate_checkpoint import embedding_settings
from gcahng.training.evaluation import as_row, evaluate
from gcahng.training.trainer import SELECTION_NOTE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(launch_shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(with_overrides(base_settings(launch_shards, tmp_path / "run"), SMALL)))
    return path


@pytest.fixture
def released(tmp_path: Path) -> Path:
    torch.save(small_state(), tmp_path / "bestR_1.pth")
    return tmp_path / "bestR_1.pth"


def wanted(config: Path, shards: Path) -> dict[str, Any]:
    """Metrics of the authors' module on the same images."""
    settings = load_config(config)
    found = evaluate(theirs(), ShardSet.open(str(shards)), settings.eval, embedding_settings(settings))
    return as_row(found)


def theirs() -> Any:
    model = small_extractor()
    model.embedding_dim = DIM  # type: ignore[assignment]
    return model


def test_one_command_evaluates_a_released_file(
    process, command_line, config, released, launch_shards, tmp_path
) -> None:
    want = wanted(config, launch_shards)
    arguments = ("--released", released, "--config", config, "--quiet", "--json", tmp_path / "row.json")
    ended = process(ROOT / "launch" / "evaluate.py", *arguments)
    assert ended.status == 0, ended.err
    assert ended.out.startswith(f"R@1 {100 * want['recall_at_1']:.2f}  R@2 {100 * want['recall_at_2']:.2f}  ")
    assert "in no use: gnn.gnn.0.node_model.layers.0.update_node.bias" in ended.err
    got = json.loads((tmp_path / "row.json").read_text())
    assert {name: got[name] for name in want} == pytest.approx(want)
    assert got["note"] == SELECTION_NOTE  # the authors' code keeps the best epoch on the test classes
    # The same through a checkpoint, on other data and with other settings.
    run = ("--out", tmp_path / "imported")
    ended = command_line("released.py", "--import", released, "--config", config, *run, "eval.batch_size=9")
    assert ended.status == 0 and f"--run {tmp_path / 'imported'}" in ended.out, ended.err
    for source in (("--released", released, "--config", config), ("--run", tmp_path / "imported")):
        row = ("--json", tmp_path / "other.json", "--quiet")
        ended = command_line("evaluate.py", *source, "--data", launch_shards, "eval.ks=[1,2,4]", *row)
        assert ended.status == 0, ended.err
        got = json.loads((tmp_path / "other.json").read_text())
        assert {name: got[name] for name in want} == pytest.approx(want)
        assert got["note"] == SELECTION_NOTE
    ended = command_line("released.py", "--run", tmp_path / "imported", "--out", tmp_path / "back.pth")
    assert ended.status == 0 and ended.out.startswith(f"{tmp_path / 'back.pth'}: 0."), ended.err
    assert_same_state(torch.load(tmp_path / "back.pth", weights_only=True), small_state())


def test_what_is_refused(command_line, config, released, tmp_path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(released.read_bytes()[:5000])
    file, of = ("--released", released), ("--config", config)
    cases: list[tuple[str, tuple[object, ...], str]] = [
        ("evaluate.py", file, "`--released` goes with --config, which is missing"),
        ("evaluate.py", ("--run", tmp_path, *of), "`--config` goes with --released, which is missing"),
        ("evaluate.py", (*file, *of, "--which", "best"), "`--which` best chooses a checkpoint of --run, not of --rel"),
        ("evaluate.py", (*file, "--config", tmp_path / "no.yaml"), "no.yaml"),
        ("evaluate.py", ("--released", cut, *of), "cut.pth` cannot be read"),
        ("evaluate.py", (*file, *of, "model.embedding_dim=4"), "feature_extractor.fc.1.weight (8, 12), the model's (4"),
        ("released.py", ("--import", released, "--out", tmp_path / "x"), "`--import` goes with --config"),
        ("released.py", ("--import", released, *of, "--out", tmp_path), f"`--out` {tmp_path} exists"),
        ("released.py", ("--run", tmp_path, "--out", tmp_path / "x.pth", "eval.ks=[1]"), "settings go with --import"),
        ("released.py", ("--checkpoint", tmp_path, "--out", tmp_path / "x.pth"), "is no checkpoint"),
        ("released.py", ("--run", tmp_path, "--out", tmp_path / "no" / "x.pth"), "the folder does not exist"),
    ]
    for name, arguments, message in cases:
        ended = command_line(name, *arguments)
        assert ended.status == 2 and ended.out == "", arguments
        assert message in ended.err and "Traceback" not in ended.err, ended.err


def test_fp16_and_a_cpu_go_together(command_line, config, released) -> None:
    arguments = ("--released", released, "--config", config, "--quiet", "train.precision=fp16", "train.device=cpu")
    ended = command_line("evaluate.py", *arguments)
    assert ended.status == 0, ended.err
