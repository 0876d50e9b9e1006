"""Every file of configs/ as it is, but for sizes: it builds, takes real steps, and evaluates by its protocol.

What the files say stands in `test_config_released.py`; here, that the run is built of it and can be trained.
"""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gcahng.data.shards.writer import Sample, ShardWriter
from gcahng.graph import GraphNetwork
from gcahng.training.config import load_config
from gcahng.training.evaluation import EmbeddingSettings, as_row, evaluate
from gcahng.training.trainer import Trainer

FOLDER = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TRAIN_CLASSES = 6
IMAGES = 4
# (P, layers, heads, alpha, beta, w_sim, w_div) by data set and backbone, from the method's tables.
STEP_TABLE = {
    "cub_resnet50": (3, 2, 4, 5, 20, 20, 60),
    "cars_resnet50": (3, 2, 4, 5, 20, 20, 60),
    "sop_resnet50": (2, 1, 2, 5, 20, 20, 60),
    "inshop_resnet50": (2, 1, 2, 5, 20, 20, 60),
    "hotel50k_resnet50": (2, 1, 2, 5, 20, 20, 60),
    "cub_googlenet": (3, 2, 4, 4, 30, 10, 10),
    "cars_googlenet": (3, 2, 4, 4, 30, 10, 10),
    "sop_googlenet": (2, 1, 2, 5, 20, 20, 20),
    "inshop_googlenet": (2, 1, 2, 2, 20, 20, 20),
    "cub_dino": (3, 2, 4, 2, 5, 20, 20),
    "cars_dino": (3, 2, 4, 2, 5, 20, 20),
    "sop_dino": (2, 1, 2, 5, 20, 20, 60),
    "inshop_dino": (2, 1, 2, 5, 20, 20, 60),
    "demo": (2, 1, 2, 1, 60, 20, 20),
    "omniglot": (3, 2, 4, 1, 20, 20, 60),
}
LOSSES = {
    "metric_loss",
    "node_loss",
    "synthetic_loss",
    "synthetic_weight",
    "pull_factor",
    "total_loss",
    "classifier_loss",
    "classification_loss",
    "similarity_loss",
    "diversity_loss",
    "generation_loss",
}


@pytest.fixture(scope="module")
def four_splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with train, test, query and gallery; query and gallery share their classes, as In-Shop's do."""
    folder = tmp_path_factory.mktemp("four_splits")
    draws = np.random.default_rng(5)
    writer = ShardWriter(folder)
    plan = [("train", TRAIN_CLASSES, IMAGES), ("test", 3, 4), ("query", 3, 2), ("gallery", 3, 17)]
    for split, classes, images in plan:
        kind = "seen" if split == "train" else "test" if split == "test" else "shop"
        for number in range(classes):
            mean = draws.uniform(60, 190, 3)
            for _ in range(images):
                content = io.BytesIO()
                pixels = (mean + draws.normal(0, 40, (40, 40, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(content, "PNG")
                writer.write(Sample(content.getvalue(), "png", f"{kind}-{number}", split, "drawn"))
    writer.finish("drawn", 0, {})
    return folder


def small_run(name: str, shards: Path, run_dir: Path) -> Trainer:
    """The experiment on small images, few classes per batch and weights from scratch; all else is the file's."""
    size = 64 if name.endswith("googlenet") else 32
    overrides = [
        f"data.dir={shards}",
        f"run.dir={run_dir}",
        "data.num_workers=0",
        f"data.transform.image_size={size}",
        "batch.num_classes=4",
        "model.pretrained=false",
        "train.device=cpu",
        *([f"model.backbone_args.img_size={size}"] if name.endswith("dino") else []),
        # The test split here has 12 images, not thousands.
        *(["eval.ks=[1,10]"] if name.startswith(("sop", "hotel50k")) else []),
        # Nor have its classes images for training; `test_protocols.py` evaluates as the file says.
        *(["eval.split=query", "eval.gallery_split=gallery", "eval.coarse_label=null"] if "hotel" in name else []),
    ]
    return Trainer(load_config(FOLDER / f"{name}.yaml", overrides), progress_bars=False)


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def assert_built_as_released(name: str, trainer: Trainer) -> None:
    samples, layers, heads, alpha, beta, similarity, diversity = STEP_TABLE[name]
    settings = trainer.step.settings
    assert (settings.num_samples, settings.alpha, settings.beta) == (samples, alpha, beta)
    weights = (settings.classifier_weight, settings.classification_weight, settings.similarity_weight)
    assert weights == (10, 20, similarity)
    assert settings.diversity_weight == pytest.approx(0.01 * diversity)
    assert settings.generate and settings.channel_coefficients and trainer.step.graph_generates
    graph = trainer.parts.modules["graph"]
    assert isinstance(graph, GraphNetwork)
    assert (len(graph.node_blocks), len(graph.edge_blocks)) == (layers, layers)
    assert {block.num_heads for block in graph.node_blocks} == {heads}
    dim = 384 if name.endswith("dino") else 64 if name in ("demo", "omniglot") else 512
    assert (graph.embedding_dim, trainer.parts.metric_model.embedding_dim) == (dim, dim)
    classifier = trainer.parts.modules["classifier"]
    assert (classifier.in_features, classifier.out_features) == (dim, TRAIN_CLASSES)
    optim = trainer.config.optim
    for part in ("metric_model", "graph", "classifier"):
        want = getattr(optim, part)
        optimizer = trainer.parts.optimizers[part]
        assert isinstance(optimizer, torch.optim.AdamW)
        got = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
        assert got == {(want.lr, want.weight_decay)}


def assert_steps_move_what_they_should(name: str, trainer: Trainer) -> None:
    """One step as in the warm-up, where the head alone is trained, and one after it."""
    model = trainer.parts.metric_model
    parts = trainer.parts.modules
    (batch,) = islice(trainer.loader.epoch_iterator(0), 1)
    assert batch.images.shape[0] == 4 * STEP_TABLE[name][0]
    for warm_up in (True, False):
        model.set_warm_up(warm_up)
        before = {part: snapshot(module) for part, module in parts.items()}
        report = trainer.run_step(batch.images, batch.labels, batch.rows)
        assert report.keys() == LOSSES
        assert all(bool(torch.isfinite(value)) for value in report.values())
        moves = moved(model, before["metric_model"])
        assert any(parameter.startswith("head.") for parameter in moves)
        assert any(parameter.startswith("backbone.") for parameter in moves) is not warm_up
        assert not any("patch_embed" in parameter for parameter in moves)
        trained = {key for key, p in parts["graph"].named_parameters() if p.requires_grad}
        # The key bias of an edge block has a zero gradient and starts at zero: weight decay leaves it there.
        still = trained - moved(parts["graph"], before["graph"])
        assert all(key.startswith("edge_blocks.") and key.endswith(".key.bias") for key in still)
        assert moved(parts["classifier"], before["classifier"]) == {"weight", "bias"}


def assert_evaluates(name: str, trainer: Trainer) -> None:
    settings = EmbeddingSettings(trainer.data.transform, 64, 0, trainer.device)
    row = as_row(evaluate(trainer.parts.metric_model, trainer.data.shards, trainer.config.eval, settings))
    ks = {"inshop": (1, 10, 20, 30, 40, 50), "sop": (1, 10), "hotel50k": (1, 10)}.get(
        name.partition("_")[0], (1, 2, 4, 8)
    )
    assert [key for key in row if key.startswith("recall")] == [f"recall_at_{k}" for k in ks]
    assert row["num_queries"] == (6 if name.startswith(("inshop", "hotel50k")) else 12)
    assert all(0 <= row[f"recall_at_{k}"] <= 1 for k in ks) and 0 <= row["map_at_r"] <= 1


def test_the_table_has_every_file() -> None:
    assert sorted(STEP_TABLE) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_experiment_trains_and_evaluates(name: str, four_splits: Path, tmp_path: Path) -> None:
    trainer = small_run(name, four_splits, tmp_path / "run")
    assert_built_as_released(name, trainer)
    assert_steps_move_what_they_should(name, trainer)
    assert_evaluates(name, trainer)
