"""A real run with own components only, from an own data source to the results (see example_components.py)."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from run_cases import (
    assert_same_tensors,
    make_trainer,
    read_metrics,
    saved_tensors,
    train,
)

from gcahng.data.loader import Batch
from gcahng.errors import ConfigError, InputError
from gcahng.training import checkpoint
from gcahng.training.evaluate_checkpoint import evaluate_checkpoint
from shards import convert

OWN = {
    "model.backbone": "example_components:TwoConvolutions",
    "model.backbone_args": {"width": 6},
    "batch.sampler": "example_components.in_turn",
    "loss.metric": "example_components:CentreLoss",
    "loss.args": {"margin": 0.5},
    "optim.metric_model.name": "example_components:SignDescent",
    "train.epochs": 2,
}


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example is importable, as an own module on PYTHONPATH is."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("example_components", None)


@pytest.fixture
def own_shards(tmp_path: Path) -> Path:
    """12 labels of 5 grey levels each, converted by the command line."""
    draws = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 5)
    shades = 20 * labels[:, None, None, None] + draws.integers(0, 20, (60, 20, 20, 3))
    source = tmp_path / "arrays"
    source.mkdir()
    np.save(source / "images.npy", shades.astype(np.uint8))
    np.save(source / "labels.npy", labels)
    arguments = ["custom", "--source-class", "example_components:ArrayFile", "--source", str(source)]
    assert convert.main([*arguments, "--out", str(tmp_path / "own"), "--workers", "1", "--quiet"]) == 0
    return tmp_path / "own"


def test_a_run_of_own_components(own_shards, tmp_path) -> None:
    trainer = make_trainer(own_shards, tmp_path / "run", OWN | {"eval.ks": [1, 3]})
    assert type(trainer.parts.modules["metric_loss"]).__name__ == "CentreLoss"
    assert trainer.parts.modules["metric_loss"].margin == 0.5
    assert trainer.parts.modules["metric_loss"].centres.shape == (6, 8)
    assert trainer.parts.metric_model.backbone.num_features == 6
    assert type(trainer.parts.optimizers["metric_model"]).__name__ == "SignDescent"
    start = {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in trainer.parts.modules.items()}
    results = trainer.run()
    for part, tensors in start.items():
        saved = checkpoint.read_tensors(tmp_path / "run" / "last", part)
        assert saved.keys() == tensors.keys()
        weights = [name for name in tensors if name.endswith(("weight", "centres"))]
        assert weights and not any(torch.equal(saved[name], tensors[name]) for name in weights)
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step"]
    # 30 training images in batches of 4 x 2: 3 steps per epoch.
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(v) for row in rows for k, v in row.items() if k not in ("kind", "samples"))
    assert results["last"] == evaluate_checkpoint(tmp_path / "run" / "last", trust_components=True) | {
        "epoch": 2,
        "split": "test",
    }


def test_the_own_sampler_decides_the_batches(shards, tmp_path) -> None:
    loader = make_trainer(shards, tmp_path / "run", OWN).loader

    def labels(batches: Iterator[Batch]) -> list[list[int]]:
        return [batch.classes.tolist() for batch in batches]

    turns = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert labels(iter(loader.epoch_iterator(0))) == [turns[i % 2] for i in range(5)]
    assert labels(iter(loader.epoch_iterator(1))) == [turns[i % 2] for i in range(5, 10)]


def test_an_own_sampler_puts_similar_classes_together(shards, tmp_path) -> None:
    settings = {"batch.sampler": "example_components:SimilarClasses"}
    loader = make_trainer(shards, tmp_path / "run", OWN | settings).loader
    centres = np.array([[0, 0], [5, 0], [0, 1], [5, 1], [0, 2], [5, 2], [0, 3], [5, 3.0]])
    with_centres = [set(batch.classes.tolist()) for batch in loader.epoch_iterator(0, class_centres=centres)]
    assert len(with_centres) == 5
    assert all(classes in ({0, 2, 4, 6}, {1, 3, 5, 7}) for classes in with_centres)
    assert len({frozenset(batch.classes.tolist()) for batch in loader.epoch_iterator(0)}) > 2
    with pytest.raises(InputError, match=r"`class_centres` .* expected \(8, D\), got \(7, 2\)"):
        loader.epoch_iterator(1, class_centres=centres[:7])


def test_a_run_of_own_components_resumes(shards, tmp_path) -> None:
    constant = OWN | {"optim.graph.schedule.name": "constant"}
    train(shards, tmp_path / "whole", constant)
    train(shards, tmp_path / "run", constant | {"train.epochs": 1, "data.num_workers": 1})
    train(shards, tmp_path / "run", constant | {"train.resume": "auto"})
    assert_same_tensors(saved_tensors(tmp_path / "run"), saved_tensors(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("key", "path", "message"),
    [
        ("model.backbone", "example_components:TwoConvolution", "Did you mean `TwoConvolutions`"),
        ("loss.metric", "example_component:CentreLoss", "no module `example_component`"),
        ("batch.sampler", "example_components.InTurns", "Did you mean `InTurn`"),
        ("optim.graph.name", "example_components:Sign", "has no name `Sign`"),
    ],
)
def test_a_wrong_path_is_reported_before_training(shards, tmp_path, key, path, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(shards, tmp_path / "run", OWN | {key: path})
    assert not (tmp_path / "run").exists()
