"""`launch/replay.py`: what it prints, and its exit status."""

import json
from pathlib import Path

import pytest
import torch
from run_cases import train
from safetensors.torch import load_file, save_file

from gcahng.errors import TrainingError


@pytest.fixture(scope="module")
def dump(launch_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose loss overflows in its first step."""
    folder = tmp_path_factory.mktemp("failed") / "run"
    settings = {"graph.enabled": False, "generation.enabled": False, "loss.metric": "fault_cases:Overflow"}
    with pytest.raises(TrainingError, match="The metric loss is inf"):
        train(launch_shards, folder, settings)
    return folder / "faults" / "step-0"


def test_a_step_that_fails_again(command_line, dump: Path) -> None:
    ended = command_line("replay.py", dump, "--trust-components")
    assert ended.status == 1 and ended.err == ""
    said = ended.out.splitlines()
    assert said[0].startswith("The run: Step 0: The metric loss is inf; no parameter was moved")
    assert said[1] == "The metric pass of step 0, fp32 on cpu: not finite again"
    assert said[2:4] == ["  metric_loss: inf", "  total_loss: inf"]
    assert "first module whose output is not finite: metric_loss (Overflow)" in said
    assert any("gradients that are not finite: metric_model." in line and "and" in line for line in said)


def test_as_one_object(command_line, dump: Path) -> None:
    ended = command_line("replay.py", dump, "--trust-components", "--json", "--precision", "bf16", "--device", "cpu")
    found = json.loads(ended.out)
    assert ended.status == 1 and found["reproduced"] is True
    assert (found["precision"], found["losses"]["total_loss"], found["bad_module"]) == ("bf16", "inf", "metric_loss")
    assert found["fault"]["step"] == 0 and found["fault"]["reach"] == "metric"


def test_a_step_that_does_not(command_line, dump: Path, tmp_path: Path) -> None:
    """With another loss of the same parameters: none."""
    healed = tmp_path / "step-0"
    healed.mkdir()
    for file in dump.iterdir():
        (healed / file.name).write_bytes(file.read_bytes())
    config = (healed / "config.yaml").read_text()
    (healed / "config.yaml").write_text(config.replace("fault_cases:Overflow", "n_pair_plus"))
    ended = command_line("replay.py", healed)
    assert ended.status == 0 and "finite this time" in ended.out and "nan" not in ended.out
    state = load_file(healed / "metric_model.safetensors")
    state["head.linear.bias"][0] = torch.nan
    save_file(state, healed / "metric_model.safetensors")
    ended = command_line("replay.py", healed)
    assert ended.status == 1
    assert "1 weights that are not finite: metric_model.head.linear.bias" in ended.out
    assert "8 samples whose embeddings are not finite: 0" in ended.out
    assert "first module whose output is not finite: metric_model.head.linear (Linear)" in ended.out


def test_what_is_refused(command_line, dump: Path, tmp_path: Path) -> None:
    ended = command_line("replay.py", tmp_path)
    assert ended.status == 2 and ended.out == "" and "is no dump" in ended.err
    ended = command_line("replay.py", dump, "--precision", "fp8")
    assert ended.status == 2 and ended.err.startswith("usage: launch/replay.py")
