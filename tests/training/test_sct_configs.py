"""The files of configs/sct/: they say what the method's table says, and each builds and trains."""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gcahng.data.shards.writer import Sample, ShardWriter
from gcahng.losses import HardNegativeLoss, SelectivelyContrastiveLoss, SemiHardNegativeLoss
from gcahng.training.config import Config, load_config
from gcahng.training.evaluation import EmbeddingSettings, as_row, evaluate
from gcahng.training.trainer import Trainer

FOLDER = Path(__file__).parents[2] / "configs" / "sct"
BACKBONES = {"resnet50": "resnet50.tv_in1k", "resnet18": "resnet18.tv_in1k", "googlenet": "torchvision/googlenet"}
# D, B, epochs, passes per epoch, sampler, lr of sct (of the printed results), and the least and largest that the
# released scripts try.
RELEASED = {
    "cub": (64, 128, 80, 1, "filled", 9e-3, (3e-3, 1.2e-2)),
    "cars": (64, 128, 80, 1, "filled", 2e-2, (1e-2, 4e-2)),
    "sop": (512, 512, 200, 5, "sample", 3e-2, (1e-2, 1e-1)),
    "inshop": (512, 512, 200, 5, "sample", 1e-1, (3e-2, 3.0)),
    "hotel50k": (256, 512, 200, 5, "sample", 1e-1, (1e-2, 3e-1)),
}
# Of the printed results, by the notebooks beside the released scripts; and the least and largest that these try.
SHN_RATES = {
    "cub": (2e-3, 1e-3, 3e-3),
    "cars": (4e-3, 1e-3, 1e-2),
    "sop": (1e-2, 1e-2, 1e-1),
    "inshop": (3e-1, 3e-2, 3.0),
    "hotel50k": (1e-2, 1e-2, 3e-1),
}
KS = {"sop": (1, 10, 100, 1000), "inshop": (1, 10, 20, 30, 40, 50), "hotel50k": (1, 10, 100)}
FILES = [f"{data}_{backbone}" for data in RELEASED for backbone in BACKBONES]


def load(name: str, *overrides: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", list(overrides))


def test_the_files_are_the_five_sets_by_three_backbones_and_the_example() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*FILES, "characters"}


@pytest.mark.parametrize("name", FILES)
def test_released_values(name: str) -> None:
    config, (data, backbone) = load(name), name.split("_")
    dim, batch, epochs, passes, sampler, lr, tried = RELEASED[data]
    assert (config.model.backbone, config.model.pretrained) == (BACKBONES[backbone], True)
    assert (config.model.pooling, config.model.head, config.model.embedding_dim) == ("avg", "linear", dim)
    assert (config.batch.num_classes, config.batch.num_samples) == (batch // 2, 2)
    assert (config.batch.sampler, config.batch.passes, config.train.epochs) == (sampler, passes, epochs)
    optim = config.optim.metric_model
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", lr, 0, 0)
    assert tried[0] <= optim.lr <= tried[1]
    assert (optim.schedule.name, optim.schedule.gamma, optim.schedule.milestones) == ("milestones", 0.1, (epochs // 2,))
    assert config.optim.clip_value is None
    assert not config.graph.enabled and not config.generation.enabled
    assert (config.loss.metric, config.loss.args) == ("sct", {})
    assert config.data.transform.preset == f"sct_{data.removesuffix('50k')}"
    assert config.train.warm_up_epochs == 0 and not config.model.freeze_batch_norm
    assert config.eval.ks == KS.get(data, (1, 2, 4, 8))
    assert config.run.dir == f"runs/sct_{name}"


@pytest.mark.parametrize("data", RELEASED)
def test_evaluation_and_data_are_those_of_the_other_files(data: str) -> None:
    config, other = load(f"{data}_resnet50"), load_config(FOLDER.parent / f"{data}_resnet50.yaml")
    assert config.eval == other.eval
    assert config.data.dir == other.data.dir


@pytest.mark.parametrize("data", RELEASED)
@pytest.mark.parametrize("loss", ["shn", "hn"])
def test_the_other_losses_are_one_line_away(data: str, loss: str) -> None:
    """The overrides that a comment of the file names, with a rate that the released scripts try."""
    text = (FOLDER / f"{data}_resnet50.yaml").read_text()
    (line,) = [line for line in text.splitlines() if f"append loss.metric={loss} " in line]
    overrides = line.partition("append ")[2].partition(" (")[0].split()
    config = load(f"{data}_resnet50", *overrides)
    assert config.loss.metric == loss
    printed, low, high = SHN_RATES[data]
    assert low <= printed <= high
    assert config.optim.metric_model.lr == printed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few small images: four classes to train on, two that are queries and gallery."""
    folder = tmp_path_factory.mktemp("sct")
    draws = np.random.default_rng(6)
    writer = ShardWriter(folder)
    for split, classes, images in (("train", 4, 3), ("test", 2, 2), ("gallery", 2, 4)):
        for number in range(classes):
            for _ in range(images):
                content = io.BytesIO()
                pixels = draws.integers(0, 255, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(content, "PNG")
                kind = "seen" if split == "train" else "unseen"
                writer.write(Sample(content.getvalue(), "png", f"{kind}-{number}", split, "drawn"))
    writer.finish("drawn", 0, {})
    return folder


def small_run(name: str, shards: Path, run_dir: Path, *overrides: str) -> Trainer:
    """A file as it is, but for sizes, weights from scratch and splits that are there."""
    sizes = ["data.num_workers=0", "data.transform.image_size=32", "batch.num_classes=2", "train.device=cpu"]
    ours = [f"data.dir={shards}", f"run.dir={run_dir}", "model.pretrained=false", "eval.ks=[1,2]"]
    if "hotel" in name or "inshop" in name:
        ours += ["eval.split=test", "eval.gallery_split=gallery", "eval.coarse_label=null"]
    return Trainer(load(name, *sizes, *ours, *overrides), progress_bars=False)


def one_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    before = {name: p.detach().clone() for name, p in trainer.parts.metric_model.named_parameters()}
    (batch,) = islice(trainer.loader.epoch_iterator(0), 1)
    report = trainer.run_step(batch.images, batch.labels, batch.rows)
    after = dict(trainer.parts.metric_model.named_parameters())
    assert all(bool(torch.isfinite(value)) for value in report.values())
    assert {"backbone", "head"} <= {name.split(".")[0] for name, p in before.items() if not torch.equal(p, after[name])}
    return report


@pytest.mark.parametrize("name", FILES)
def test_each_builds_and_takes_a_step(name: str, shards: Path, tmp_path: Path) -> None:
    trainer = small_run(name, shards, tmp_path / "run")
    assert type(trainer.parts.modules["metric_loss"]) is SelectivelyContrastiveLoss
    assert set(trainer.parts.modules) == {"metric_model", "metric_loss"}
    optimizer = trainer.parts.optimizers["metric_model"]
    assert isinstance(optimizer, torch.optim.SGD)
    want = trainer.config.optim.metric_model
    assert {(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups} == {(want.lr, 0, 0)}
    report = one_step(trainer)
    assert set(report) == {"metric_loss", "total_loss", "hard_negative_ratio", "valid_triplets"}
    if name in ("hotel50k_resnet18", "cub_resnet18"):
        settings = EmbeddingSettings(trainer.data.transform, 64, 0, trainer.device)
        row = as_row(evaluate(trainer.parts.metric_model, trainer.data.shards, trainer.config.eval, settings))
        assert row["num_queries"] == 4


def test_the_example_trains_from_scratch(shards: Path, tmp_path: Path) -> None:
    trainer = small_run("characters", shards, tmp_path / "run")
    assert not trainer.config.model.pretrained
    # Distances in hardness.jsonl are those of unit vectors.
    assert trainer.step.settings.normalised_distance
    assert set(one_step(trainer)) >= {"hard_negative_ratio", "valid_triplets"}


@pytest.mark.parametrize("loss", ["hn", "shn", "sct"])
def test_gca_hng_on_top(loss: str, shards: Path, tmp_path: Path) -> None:
    on_top = ["graph.enabled=true", "generation.enabled=true", "generation.alpha=0.5", f"loss.metric={loss}"]
    trainer = small_run("cub_resnet18", shards, tmp_path / "run", *on_top)
    kinds = {"hn": HardNegativeLoss, "shn": SemiHardNegativeLoss, "sct": SelectivelyContrastiveLoss}
    assert type(trainer.parts.modules["metric_loss"]) is kinds[loss]
    report = one_step(trainer)
    assert {"hard_negative_ratio", "valid_triplets", "synthetic_loss", "generation_loss", "pull_factor"} <= set(report)
