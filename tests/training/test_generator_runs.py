"""Runs with a generator: they train, go on bit for bit after a stop, and their configurations say what table 8 asks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import (
    assert_same_tensors,
    convert_patterns,
    draw_patterns,
    make_trainer,
    read_metrics,
    read_state,
    saved_tensors,
    train,
)

from gcahng.errors import ConfigError
from gcahng.generation.generated_losses import GeneratorFactors
from gcahng.generation.generator import FeatureGenerator
from gcahng.training.config import load_config
from gcahng.training.config_schema import GeneratorConfig
from gcahng.training.parts import module_makers

ABLATIONS = Path(__file__).parents[2] / "configs" / "ablations"
# Pooling by kind of feature; the paper's maximum of ResNet-50 is the sum with the mean (docs/ablations.md).
FEATURES = {
    "googlenet_avg": "avg", "googlenet_max": "max", "resnet50_avg": "avg", "resnet50_max": "avg+max", "dino": "cls",
}  # fmt: skip
NAMES = [f"generator_{data}_{kind}" for data in ("cub", "cars") for kind in FEATURES]
GENERATOR = {
    "graph.enabled": False,
    "generation.method": "generator",
    "generation.coefficients": "single",
    "generation.beta": 5000.0,
    "train.precision": "bf16",
    "train.record_every": 2,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patterns")
    return convert_patterns(draw_patterns(folder / "images"), folder / "shards")


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def test_a_run_trains_its_generator_and_goes_on_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(shards, whole, GENERATOR | {"train.epochs": 3})
    steps = [row for row in read_metrics(whole) if row["kind"] == "step"]
    assert {"reconstruction_loss", "classification_loss", "generation_loss", "synthetic_loss"} <= steps[0].keys()
    assert {"synthetic_weight", "pull_factor"} <= steps[0].keys()
    assert mean(steps[-4:], "reconstruction_loss") < 0.5 * mean(steps[:4], "reconstruction_loss")
    assert 0 < steps[0]["synthetic_weight"] < 0.01 < steps[-1]["synthetic_weight"] < 1

    train(shards, stopped, GENERATOR | {"train.epochs": 1})
    train(shards, stopped, GENERATOR | {"train.epochs": 3, "train.resume": "auto"})
    got, want = saved_tensors(stopped), saved_tensors(whole)
    assert {key.split(":")[0] for key in want} >= {"generator.safetensors", "optimizer-generator.pt"}
    assert_same_tensors(got, want)
    assert read_state(stopped) == read_state(whole)
    assert [row for row in read_metrics(stopped) if row["kind"] == "step"] == steps


def test_parts_are_built_for_the_features_that_are_pooled(shards: Path, tmp_path: Path) -> None:
    trainer = make_trainer(shards, tmp_path / "run", GENERATOR | {"generation.generator.hidden": [5, 6]})
    generator = trainer.parts.modules["generator"]
    assert isinstance(generator, FeatureGenerator)
    assert [tuple(layer.weight.shape) for layer in (*generator.hidden, generator.last)] == [(5, 8), (6, 5), (8, 6)]
    optimizer = trainer.parts.optimizers["generator"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(1e-2, 0.0)}
    assert trainer.step.settings.generator.factors == GeneratorFactors(64.0, 5000.0)
    # A part has the same initial weights whether the others are made before it or not.
    alone = module_makers(trainer.config, 8)["generator"]()
    assert_same_tensors(alone.state_dict(), module_makers(trainer.config, 8)["generator"]().state_dict())
    assert_same_tensors(alone.state_dict(), generator.state_dict())


def test_the_defaults_are_those_of_the_released_code() -> None:
    config = GeneratorConfig()
    factors = GeneratorFactors()
    assert (config.reconstruction, config.classification) == (factors.reconstruction, factors.classification)
    assert (config.hidden, config.classify) == ((512,), "features")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation.coefficients": "channel", "graph.enabled": True}, "goes on from single-coefficient interpolat"),
        ({"generation.enabled": False}, "is 'generator', but generation.enabled is false"),
        ({"graph.enabled": True, "graph.neighbours": 2}, "must be null with generation.method=generator"),
        ({"generation.generator": {"reconstruction": 0, "classification": 0}}, "the generator would learn nothing"),
        ({"generation.generator.hidden": [4, 0]}, "must be widths of at least 1"),
        ({"generation.generator.classification": -1}, "must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_go_together_are_refused(
    shards: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(shards, tmp_path / "run", GENERATOR | changes)


@pytest.mark.parametrize("name", NAMES)
def test_the_configurations_of_table_8(name: str) -> None:
    config = load_config(ABLATIONS / f"{name}.yaml")
    _, data, kind = name.split("_", 2)
    backbone = kind.partition("_")[0]
    base = load_config(ABLATIONS.parent / f"{data}_{backbone}.yaml")
    assert config.model.pooling == FEATURES[kind]
    assert (config.generation.method, config.generation.coefficients) == ("generator", "single")
    assert not config.graph.enabled
    assert config.generation.beta == {"cub": 5e3, "cars": 1e4}[data]
    assert config.run.dir == f"runs/ablations/{name}"
    assert (config.data, config.batch, config.optim, config.train) == (base.data, base.batch, base.optim, base.train)
    assert replace(config.model, pooling=base.model.pooling) == base.model
    assert config.generation.alpha == base.generation.alpha
