"""docs/losses.md: its settings build what they say, its losses of random embeddings are what they are; its example."""

import math
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from run_cases import base_settings

from gcahng.errors import ConfigError
from gcahng.losses import ProxyAnchorLoss
from gcahng.training.config import config_from_mapping, load_config
from gcahng.training.metric_losses import build_metric_loss
from gcahng.training.mined_loss import MinedLoss
from gcahng.training.trainer import Trainer

losses = pytest.importorskip("pytorch_metric_learning.losses")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "configs" / "losses" / "cub_resnet50_multi_similarity.yaml"
TEXT = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: str(block["loss"]["metric"]))
def test_settings_build(block, tmp_path) -> None:
    config = config_from_mapping(base_settings(tmp_path, tmp_path) | block | {"optim": {}})
    if config.loss.metric.startswith("my_package"):
        with pytest.raises(ConfigError, match="no module `my_package`"):
            build_metric_loss(config.loss, 9, 8)
    else:
        assert build_metric_loss(config.loss, 9, 8)(torch.randn(8, 8), torch.arange(4).repeat(2)).isfinite()


def test_there_are_settings() -> None:
    assert len(BLOCKS) == 6


def test_losses_of_random_embeddings() -> None:
    table = dict(re.findall(r"\| `([\w.]+)` \| ([\d.]+) \|", TEXT))
    assert len(table) == 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {
            name: ProxyAnchorLoss(100, 512)
            if name == "proxy_anchor"
            else getattr(losses, name.removeprefix("pml."))(*([100, 512] if "Arc" in name else []))
            for name in table
        }
        found: dict[str, list[float]] = {name: [] for name in table}
        for _ in range(3):
            z, labels = torch.randn(81, 512), torch.arange(27).repeat(3)
            for name, loss in made.items():
                found[name].append(float(loss(z, labels).detach()))
    for name, text in table.items():
        assert sum(found[name]) / 3 == pytest.approx(float(text), rel=0.03), name


def test_the_example_takes_a_step(shards, tmp_path) -> None:
    small = ["model.backbone=small_conv", "model.pretrained=false", "model.embedding_dim=16", "batch.num_classes=4"]
    here = [f"data.dir={shards}", f"run.dir={tmp_path / 'run'}", "data.num_workers=0", "train.device=cpu"]
    config = load_config(EXAMPLE, [*small, *here, "data.transform.image_size=16"])
    assert (config.generation.alpha, config.optim.metric_model.lr, config.generation.weights.diversity) == (
        1,
        1.5e-4,
        60,
    )
    trainer = Trainer(config, progress_bars=False)
    loss = trainer.parts.modules["metric_loss"]
    assert isinstance(loss, MinedLoss)
    assert (loss.loss.alpha, loss.loss.beta, loss.loss.base, loss.miner.epsilon) == (2, 50, 0.5, 0.1)
    before = [parameter.detach().clone() for parameter in trainer.parts.metric_model.head.parameters()]
    (batch,) = islice(trainer.loader.epoch_iterator(0), 1)
    report = trainer.run_step(batch.images, batch.labels, batch.rows)
    trainer.close()
    assert 0.1 < float(report["metric_loss"]) < 3
    assert all(math.isfinite(float(value)) for value in report.values())
    assert any(
        not torch.equal(*pair) for pair in zip(before, trainer.parts.metric_model.head.parameters(), strict=True)
    )
    assert trainer.config.run.dir != load_config(EXAMPLE).run.dir == "runs/cub_resnet50_multi_similarity"
