"""Configurations of checkpoints, runs and dumps that name code: nothing of it is imported without the user's word."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_cases import ALONE, base_settings, convert_patterns, draw_patterns, read_metrics, train, with_overrides

from gcahng.errors import ConfigError
from gcahng.export import ExportSettings, export_checkpoint
from gcahng.monitor.run_folder import read_status
from gcahng.report.build import read_runs
from gcahng.report.embedded import embed_run
from gcahng.report.synthetic import training_batch
from gcahng.search.embed import embed_checkpoint
from gcahng.search.lookup import load_query_model
from gcahng.search.unfinished import IndexTarget
from gcahng.training import checkpoint
from gcahng.training.config import config_from_mapping, resolved_yaml
from gcahng.training.evaluate_checkpoint import evaluate_checkpoint, load_metric_model
from gcahng.training.replay import replay
from gcahng.training.step_dump import Fault, StepDump, write_dump
from gcahng.training.trusted import check_components
from launch import embed, evaluate, export, report, search
from launch import replay as replay_command

MODULE = """
from pathlib import Path

from gcahng.losses import NPairLoss as Loss
from gcahng.models.small_conv import SmallConv

Path(__file__).with_name("ran").touch()


def network(**arguments):
    return SmallConv(**arguments)


def sampler(request):
    raise RuntimeError("never asked")
"""
OWN = {"model.backbone": "foreign_module:network"}
ASKS = r"names code from outside this library, or files to open: .*foreign_module.* pass --trust-components"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of this library's parts alone; never written to."""
    folder = tmp_path_factory.mktemp("foreign")
    shards = convert_patterns(draw_patterns(folder / "images"), folder / "shards")
    train(shards, folder / "run", {"train.max_steps_per_epoch": 1})
    return folder / "run"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the foreign module makes when it is imported, which it can be."""
    (tmp_path / "foreign_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "ran"
    sys.modules.pop("foreign_module", None)


def foreign(run: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of a run as a stranger would give it away: other settings, and a manifest that vouches for them."""
    copy = Path(shutil.copytree(run, folder, symlinks=True))
    newest = (copy / "last").resolve()
    for file in (copy / "config.yaml", newest / "config.yaml"):
        file.write_text(yaml.safe_dump(with_overrides(yaml.safe_load(file.read_text()), changes)))
    listing = json.loads((newest / "manifest.json").read_text())
    content = (newest / "config.yaml").read_bytes()
    listing["config.yaml"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(listing))
    return copy


Read = Callable[[Path, Path, bool], object]


def exported(folder: Path, out: Path, trust: bool) -> object:
    settings = ExportSettings(format="torch-export")
    return export_checkpoint(folder / "last", out / "m.pt2", settings, trust_components=trust)


def reported(folder: Path, _: Path, trust: bool) -> object:
    return embed_run(read_runs([folder], trust_components=trust)[0], 1)


READERS: dict[str, Read] = {
    "evaluate": lambda folder, _, trust: evaluate_checkpoint(folder / "last", trust_components=trust),
    "embed": lambda folder, out, trust: embed_checkpoint(
        folder / "last", IndexTarget(out / "index"), ALONE, trust_components=trust
    ),
    "search": lambda folder, _, trust: load_query_model(None, folder / "last", trust_components=trust),
    "export": exported,
    "report": reported,
}


@pytest.mark.parametrize("name", READERS)
def test_a_foreign_backbone_runs_only_by_the_users_word(run: Path, tmp_path: Path, ran: Path, name: str) -> None:
    folder = foreign(run, tmp_path / "run", OWN)
    with pytest.raises(ConfigError, match=ASKS):
        READERS[name](folder, tmp_path, False)
    assert not ran.exists()
    if name != "export":  # as evaluate, and it takes seconds
        assert READERS[name](folder, tmp_path, True)
        assert ran.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model.backbone": "subprocess:Popen", "model.backbone_args": {"args": ["false"]}},
        {"model.backbone": "gcahng.components:load_component", "model.backbone_args": {"path": "foreign_module:x"}},
        {"model.backbone": "resnet18", "model.backbone_args": {"checkpoint_path": "/etc/passwd"}},
        {"model.backbone": "hf-hub:stranger/model", "model.backbone_args": {}},
    ],
    ids=["program", "through this library", "file", "hub"],
)
def test_other_ways_to_choose_what_runs(run: Path, tmp_path: Path, ran: Path, changes: dict[str, Any]) -> None:
    folder = foreign(run, tmp_path / "run", changes)
    with pytest.raises(ConfigError, match="names code from outside this library, or files to open: model.backbone "):
        load_metric_model(folder / "last")
    assert not ran.exists()


def test_a_loss_and_a_sampler_are_not_needed_to_evaluate(run: Path, tmp_path: Path, ran: Path) -> None:
    folder = foreign(run, tmp_path / "run", {"loss.metric": "foreign_module:Loss", "batch.sampler": "foreign_module.x"})
    assert evaluate_checkpoint(folder / "last") == evaluate_checkpoint(run / "last")
    with pytest.raises(ConfigError, match=ASKS):
        training_batch(read_runs([folder])[0])
    assert read_status(folder).checkpoint is not None
    assert not ran.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.backbone", "foreign_module:network"),
        ("loss.metric", "foreign_module:Loss"),
        ("loss.miner", "foreign_module.Miner"),
        ("batch.sampler", "foreign_module:sampler"),
    ],
)
def test_a_dump_builds_nothing_foreign(tmp_path: Path, ran: Path, key: str, value: str) -> None:
    mined = {"loss.metric": "pml.TripletMarginLoss"} if key == "loss.miner" else {}
    settings = with_overrides(base_settings(tmp_path, tmp_path / "run"), {**mined, key: value})
    fault = Fault(
        step=1,
        message="not finite",
        what="loss",
        reach="metric",
        part=None,
        positions=(),
        keys=("a",) * 8,
        class_counts=(4,),
        num_training_classes=8,
        metric_loss=1.0,
        generation_loss=1.0,
        warm_up=False,
        precision="fp32",
        device="cpu",
    )
    batch = {"images": torch.zeros(8, 3, 16, 16, dtype=torch.uint8)}
    batch |= {name: torch.arange(8) // 2 for name in ("labels", "rows")}
    dump = write_dump(tmp_path / "run", StepDump(fault, resolved_yaml(config_from_mapping(settings)), batch, {}))
    assert dump is not None
    with pytest.raises(ConfigError, match=rf"{key} '{value}'.* pass --trust-components"):
        replay(dump)
    assert not ran.exists()
    with pytest.raises(Exception) as caught:  # it has no weights
        replay(dump, trust_components=True)
    assert "--trust-components" not in str(caught.value)


def test_starting_from_a_checkpoint_reads_its_weights_alone(run: Path, tmp_path: Path, ran: Path) -> None:
    folder = foreign(run, tmp_path / "run", OWN | {"loss.metric": "foreign_module:Loss"})
    shards = yaml.safe_load((run / "config.yaml").read_text())["data"]["dir"]
    settings = {"train.init_from": str(folder / "last"), "train.max_steps_per_epoch": 1}
    train(Path(shards), tmp_path / "new", settings)
    assert read_metrics(tmp_path / "new") and not ran.exists()


def test_the_parts_of_this_library_need_no_word(run: Path) -> None:
    config = load_metric_model(run / "last")[1]
    for backbone, arguments in (("resnet18", {}), ("small_conv", {"widths": [4]}), ("torchvision/googlenet", {})):
        model = replace(config.model, backbone=backbone, backbone_args=arguments)
        loss = replace(config.loss, metric="pml.TripletMarginLoss", miner="pml.BatchHardMiner")
        check_components(replace(config, model=model, loss=loss), run, trusted=False, whole=True)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (evaluate, ["--run", "r"]),
        (embed, ["--run", "r", "--out", "i"]),
        (export, ["--run", "r", "--output", "m.onnx"]),
        (search, ["i", "a.png"]),
        (report, ["r"]),
        (replay_command, ["d"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_command_knows_the_word(command: Any, arguments: list[str]) -> None:
    assert command.parse(arguments).trust_components is False
    assert command.parse([*arguments, "--trust-components"]).trust_components is True


def test_a_configuration_that_is_a_pipe_is_not_waited_for(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / checkpoint.newest_checkpoint(run).name, tmp_path / "step-1"))  # type: ignore[union-attr]
    (folder / "config.yaml").unlink()
    os.mkfifo(folder / "config.yaml")
    listing = json.loads((folder / "manifest.json").read_text())
    del listing["config.yaml"]
    (folder / "manifest.json").write_text(json.dumps(listing))
    with pytest.raises(ConfigError, match=r"lacks config.yaml: expected a file"):
        load_metric_model(folder)
