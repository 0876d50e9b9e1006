"""Every file of configs/ablations: it differs from its base in what it names, trains a step, and stands in the docs."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_cases import ALONE
from torch import nn

from gcahng.graph import GraphNetwork
from gcahng.models import Embedder
from gcahng.training.averages import EpochAverages
from gcahng.training.config import Config, load_config
from gcahng.training.parts import build_metric_model, build_modules, build_parts, build_step
from gcahng.training.step import TrainingStep

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "ablations"
PATHS = sorted(FOLDER.glob("*.yaml"))
NAMES = [path.stem for path in PATHS if not path.stem.startswith("generator")]
# What their settings are: test_generator_runs.py.
WITH_GENERATOR = [path.stem for path in PATHS if path.stem.startswith("generator")]

ALONE_SETTINGS: dict[str, Any] = {"graph.enabled": False, "generation.enabled": False}
WEIGHT = "generation.weights"
# The base, and every setting that differs from it.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("cub_resnet50", ALONE_SETTINGS),
    "baseline_gnn": ("cub_resnet50", {"generation.enabled": False}),
    "single_coefficient": ("cub_resnet50", {"graph.enabled": False, "generation.coefficients": "single"}),
    "without_global_correlations": ("cub_resnet50", {"graph.node_propagation": False}),
    "without_hadamard_addition": ("cub_resnet50", {"graph.edge_to_node": False}),
    "without_random_weighting": ("cub_resnet50", {"generation.fusion": "pick"}),
    "without_classification_loss": ("cub_resnet50", {f"{WEIGHT}.classification": 0}),
    "without_similarity_loss": ("cub_resnet50", {f"{WEIGHT}.similarity": 0}),
    "without_diversity_loss": ("cub_resnet50", {f"{WEIGHT}.diversity": 0}),
    "similarity_tenth": ("cub_resnet50", {f"{WEIGHT}.similarity": 2}),
    "similarity_tenfold": ("cub_resnet50", {f"{WEIGHT}.similarity": 200}),
    "diversity_tenth": ("cub_resnet50", {f"{WEIGHT}.diversity": 6}),
    "diversity_tenfold": ("cub_resnet50", {f"{WEIGHT}.diversity": 600}),
    "batch_40x2": ("cub_resnet50", {"batch.num_classes": 40, "batch.num_samples": 2}),
    "batch_20x4": ("cub_resnet50", {"batch.num_classes": 20, "batch.num_samples": 4}),
    "batch_16x5": ("cub_resnet50", {"batch.num_classes": 16, "batch.num_samples": 5}),
    "batch_13x6": ("cub_resnet50", {"batch.num_classes": 13, "batch.num_samples": 6}),
    "layers_1": ("cub_resnet50", {"graph.num_layers": 1}),
    "layers_3": ("cub_resnet50", {"graph.num_layers": 3}),
    "heads_1": ("cub_resnet50", {"graph.num_heads": 1}),
    "heads_2": ("cub_resnet50", {"graph.num_heads": 2}),
    "heads_8": ("cub_resnet50", {"graph.num_heads": 8}),
    "proxy_anchor": ("cub_resnet50", {"loss.metric": "proxy_anchor", f"{WEIGHT}.diversity": 20}),
    "proxy_anchor_baseline": ("cub_resnet50", ALONE_SETTINGS | {"loss.metric": "proxy_anchor"}),
    "googlenet_avg_baseline": ("cub_googlenet", ALONE_SETTINGS),
    "googlenet_max": ("cub_googlenet", {"model.pooling": "max"}),
    "googlenet_max_baseline": ("cub_googlenet", ALONE_SETTINGS | {"model.pooling": "max"}),
    "resnet50_avg": ("cub_resnet50", {"model.pooling": "avg"}),
    "resnet50_avg_baseline": ("cub_resnet50", ALONE_SETTINGS | {"model.pooling": "avg"}),
    "dino_baseline": ("cub_dino", ALONE_SETTINGS),
}
TRAINING_CLASSES = 5


@cache
def loaded(path: Path) -> Config:
    return load_config(path)


def base_of(name: str) -> Path:
    return ROOT / "configs" / f"{CHANGES[name][0]}.yaml"


def settings(config: Config) -> dict[str, Any]:
    return flat(asdict(config), "")


def flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def difference(config: Config, base: Config) -> dict[str, Any]:
    """What differs but for `run.dir`, with the values of the first."""
    ours, theirs = settings(config), settings(base)
    assert ours.keys() == theirs.keys()
    return {key: value for key, value in ours.items() if value != theirs[key] and key != "run.dir"}


def test_the_table_has_every_file() -> None:
    assert sorted(CHANGES) == NAMES


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_file_changes_what_it_names_and_nothing_else(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    base = loaded((path.parent / tree.pop("base")).resolve())
    config = loaded(path)
    assert tree.pop("run") == {"dir": f"runs/ablations/{path.stem}"}
    named = flat(tree, "")
    changed = difference(config, base)
    assert changed == named
    if path.stem in CHANGES:
        stem, want = CHANGES[path.stem]
        assert base.run.dir == f"runs/{stem}"
        assert changed == want


# Backbones for images of 16 x 16 with 8 and 12 channels of features; the second has a class token.
CONV = ("small_conv", {"widths": [4, 8]})
VIT = ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3})


def small(config: Config) -> Config:
    """The configuration with few channels and classes and a backbone of two layers: a step takes little time."""
    name, arguments = VIT if config.model.pooling == "cls" else CONV
    model = replace(config.model, backbone=name, backbone_args=arguments, embedding_dim=8, pretrained=False)
    return replace(
        config,
        model=model,
        batch=replace(config.batch, num_classes=3),
        graph=replace(config.graph, backend="eager"),
        train=replace(config.train, device="cpu"),
    )


@cache
def usual_state(base: Path) -> dict[str, dict[str, torch.Tensor]]:
    modules = build_modules(small(loaded(base)), TRAINING_CLASSES)
    return {part: module.state_dict() for part, module in modules.items()}


def first_step(config: Config, modules: dict[str, nn.Module]) -> tuple[TrainingStep, dict[str, torch.Tensor]]:
    """The step of a configuration, and what it reports of a batch of three classes."""
    step, _ = build_step(config, build_parts(config, modules, ALONE.device), ALONE)
    samples = config.batch.num_samples
    images = torch.rand(3 * samples, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    report = step(images, torch.tensor([4, 0, 2]).repeat(samples), EpochAverages(), step=0)
    assert all(bool(torch.isfinite(value)) for value in report.values())
    return step, report


@pytest.mark.parametrize("name", NAMES)
def test_a_file_builds_and_takes_a_step(name: str) -> None:
    config, usual = small(loaded(FOLDER / f"{name}.yaml")), usual_state(base_of(name))
    modules = build_modules(config, TRAINING_CLASSES)
    # Parts that both have start from the same values, but for those of another depth.
    assert modules.keys() <= usual.keys()
    for part in modules.keys() - {"metric_loss"}:
        ours = modules[part].state_dict()
        if not name.startswith("layers"):
            assert ours.keys() <= usual[part].keys()
            assert all(torch.equal(value, usual[part][key]) for key, value in ours.items())
    graph = modules.get("graph")
    if isinstance(graph, GraphNetwork):
        assert (len(graph.node_blocks), graph.node_blocks[0].num_heads) == (
            config.graph.num_layers,
            config.graph.num_heads,
        )
    step, report = first_step(config, modules)
    assert ("node_loss" in report) == config.graph.enabled == ("graph" in modules)
    assert ("synthetic_loss" in report) == config.generation.enabled == ("classifier" in modules)
    assert ("diversity_loss" in report) == (config.graph.enabled and config.generation.enabled)
    if config.generation.enabled:
        weights = config.generation.weights
        total = weights.classification * report["classification_loss"] + weights.similarity * report["similarity_loss"]
        if "diversity_loss" in report:
            total = total + weights.diversity * weights.diversity_scale * report["diversity_loss"]
        torch.testing.assert_close(report["generation_loss"], total / 2)
    assert step.settings.fusion == config.generation.fusion


@pytest.mark.parametrize("name", WITH_GENERATOR)
def test_a_file_with_a_generator_takes_a_step(name: str) -> None:
    config = small(loaded(FOLDER / f"{name}.yaml"))
    modules = build_modules(config, TRAINING_CLASSES)
    assert modules.keys() == {"metric_model", "metric_loss", "classifier", "generator"}
    before = {part: [p.clone() for p in module.parameters()] for part, module in modules.items()}
    features = 12 if config.model.pooling == "cls" else 8
    assert [tuple(p.shape) for p in before["classifier"]] == [(5, features), (5,)]
    assert before["generator"][-2].shape == (features, 512)
    step, report = first_step(config, modules)
    for part in ("metric_model", "classifier", "generator"):
        moved = [not torch.equal(p, old) for p, old in zip(modules[part].parameters(), before[part], strict=True)]
        frozen = [not p.requires_grad for p in modules[part].parameters()]
        assert moved == [not still for still in frozen] and sum(frozen) <= len(frozen) // 2, part
    assert step.generator is not None
    total = 64 * report["reconstruction_loss"] + 5000 * report["classification_loss"]
    torch.testing.assert_close(report["generation_loss"], total)
    assert float(report["synthetic_weight"]) == pytest.approx(1 - math.exp(-config.generation.beta / 1e6))
    want = report["metric_loss"] + report["synthetic_weight"] * report["synthetic_loss"]
    torch.testing.assert_close(report["total_loss"], want)


@pytest.mark.parametrize(
    ("name", "base_pooling", "pooling"),
    [("googlenet_max", "avg", "max"), ("resnet50_avg", "avg+max", "avg")],
)
def test_pooling_of_the_real_backbones(name: str, base_pooling: str, pooling: str) -> None:
    """The two poolings of table 8 on one backbone: the paper's maximum of ResNet-50 is the sum with the mean."""
    config = loaded(FOLDER / f"{name}.yaml").model
    assert (loaded(base_of(name)).model.pooling, config.pooling) == (base_pooling, pooling)
    model = build_metric_model(config, load_weights=False).eval()
    assert isinstance(model, Embedder)
    with torch.no_grad():
        images = torch.rand(1, 3, 64, 64)
        positions = model.backbone(images).flatten(2)
        pooled = positions.amax(2) if pooling == "max" else positions.mean(2)
        assert positions.shape[2] > 1
        torch.testing.assert_close(model.head(pooled), model(images))


def test_proxy_anchor_runs_have_a_third_of_the_diversity_and_proxies_at_a_hundredfold_rate() -> None:
    config, base = loaded(FOLDER / "proxy_anchor.yaml"), loaded(base_of("proxy_anchor"))
    assert config.generation.weights.diversity == pytest.approx(base.generation.weights.diversity / 3)
    proxies, model = config.optim.proxies, config.optim.metric_model
    assert (proxies.lr, proxies.weight_decay) == (pytest.approx(100 * model.lr), model.weight_decay)
    assert proxies.schedule == model.schedule


ROW = re.compile(r"^\|[^|]*\| `([a-z0-9_]+)` \| `([a-z0-9_]+)` \| ([^|]+) \|", re.MULTILINE)


def rows_of_the_docs() -> dict[str, tuple[str, list[str]]]:
    """(base, overrides) by file, from the table of docs/ablations.md."""
    text = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    return {name: (base, re.findall(r"`([^`]+)`", cell)) for name, base, cell in ROW.findall(text)}


def test_the_docs_name_every_file_and_overrides_that_are_it() -> None:
    rows = rows_of_the_docs()
    assert sorted(rows) == NAMES
    for name, (base, overrides) in rows.items():
        config = load_config(ROOT / "configs" / f"{base}.yaml", overrides)
        assert difference(config, loaded(FOLDER / f"{name}.yaml")) == {}, name
        assert len(overrides) == len(CHANGES[name][1]), name
