"""The experiment files: they load, say what the method's table says, and build their models."""

from pathlib import Path

import pytest
import torch

from gcahng.models import build_embedder
from gcahng.training.config import Config, load_config

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
SETS = ("cub", "cars", "sop", "inshop")
BACKBONES = ("resnet50", "googlenet", "dino")


def load(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml")


def test_the_files_are_the_four_sets_by_three_backbones_and_the_demo():
    names = {path.stem for path in FILES}
    assert names >= {f"{data}_{backbone}" for data in SETS for backbone in BACKBONES} | {"demo"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_loads_and_opens_with_its_launch_command(path):
    config = load_config(path)
    command = f"# accelerate launch launch/train.py --config configs/{path.name}"
    assert path.read_text().splitlines()[0] == command
    assert Path(config.run.dir).name == path.stem


# lr f, lr G, step, alpha, beta, similarity, diversity, BatchNorm frozen, warm-up, epochs
RELEASED = {
    "cub_resnet50": (1.5e-4, 1.5e-4, 10, 5, 20, 20, 60, True, 2, 100),
    "cars_resnet50": (1.5e-4, 1.5e-4, 10, 5, 20, 20, 60, True, 2, 200),
    "sop_resnet50": (2e-4, 1.5e-4, 20, 5, 20, 20, 60, False, 1, 200),
    "inshop_resnet50": (2e-4, 1.5e-4, 20, 5, 20, 20, 60, False, 1, 200),
    "cub_googlenet": (1e-4, 3e-4, 30, 4, 30, 10, 10, True, 1, 150),
    "cars_googlenet": (1e-4, 3e-4, 30, 4, 30, 10, 10, True, 1, 200),
    "sop_googlenet": (3e-4, 1.5e-4, 15, 5, 20, 20, 20, False, 1, 150),
    "inshop_googlenet": (3e-4, 1.5e-4, 15, 2, 20, 20, 20, False, 1, 200),
    "cub_dino": (1e-5, 3e-4, 20, 2, 5, 20, 20, False, 2, 50),
    "cars_dino": (3e-5, 3e-4, 10, 2, 5, 20, 20, False, 2, 100),
    "sop_dino": (1.5e-5, 3e-4, 20, 5, 20, 20, 60, False, 1, 200),
    "inshop_dino": (1.5e-5, 3e-4, 20, 5, 20, 20, 60, False, 1, 150),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_values(name):
    config = load(name)
    optim, generation = config.optim, config.generation
    assert (
        optim.metric_model.lr,
        optim.graph.lr,
        optim.metric_model.schedule.step_size,
        generation.alpha,
        generation.beta,
        generation.weights.similarity,
        generation.weights.diversity,
        config.model.freeze_batch_norm,
        config.train.warm_up_epochs,
        config.train.epochs,
    ) == RELEASED[name]
    data, backbone = name.split("_")
    small_sets = data in ("cub", "cars")
    assert (config.batch.num_classes, config.batch.num_samples) == ((27, 3) if small_sets else (40, 2))
    assert (config.graph.num_layers, config.graph.num_heads) == ((2, 4) if small_sets else (1, 2))
    assert config.model.embedding_dim == (384 if backbone == "dino" else 512)
    assert config.model.pretrained
    assert config.model.freeze_patch_embed == (backbone == "dino")
    assert config.batch.sampler == "released"
    assert optim.metric_model.schedule.name == "step"
    assert optim.metric_model.schedule.gamma == 0.5
    assert optim.graph.schedule.name == "cosine"
    assert optim.classifier.schedule.name == "constant"
    assert (optim.metric_model.weight_decay, optim.graph.weight_decay) == (1e-4, 1e-4)
    assert (optim.classifier.lr, optim.classifier.weight_decay) == (1e-3, 1e-2)
    assert optim.proxies.lr == pytest.approx(100 * optim.metric_model.lr)
    assert optim.clip_value == 10.0
    assert (generation.weights.classifier, generation.weights.classification) == (10, 20)
    assert config.eval.protocol == ("query_gallery" if data == "inshop" else "self")


def test_hotels_search_the_training_images_by_hotel_and_chain():
    """As the authors of the data set evaluate; the rest is that of Stanford Online Products."""
    config, products = load("hotel50k_resnet50"), load("sop_resnet50")
    found = config.eval
    assert (found.protocol, found.split, found.gallery_split, found.ks) == (
        "query_gallery",
        "test",
        "train",
        (1, 10, 100),
    )
    assert (found.coarse_label, found.coarse_ks) == ("chain_name", (1, 3, 5))
    for section in ("model", "batch", "graph", "generation", "loss", "optim", "train"):
        assert getattr(config, section) == getattr(products, section)


# One build per backbone; the twelve files differ in other values only (see above).
@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("cub_resnet50", {}, 64),
        ("sop_googlenet", {}, 64),
        ("inshop_dino", {"img_size": 32}, 32),
        ("demo", {}, 32),
    ],
)
def test_model_builds_and_embeds(name, arguments, size):
    config = load(name)
    settings = vars(config.model) | {"pretrained": False, "backbone_args": arguments}
    model = build_embedder(**settings)
    with torch.no_grad():
        z = model.eval()(torch.rand(2, 3, size, size))
    assert z.shape == (2, config.model.embedding_dim)
    assert z.isfinite().all()
    assert not torch.allclose(z[0], z[1])


def test_all_files_of_a_backbone_build_the_same_model():
    for backbone in BACKBONES:
        models = [load(f"{data}_{backbone}").model for data in SETS]
        assert len({(m.backbone, m.pooling, m.head, m.head_init, m.embedding_dim) for m in models}) == 1
