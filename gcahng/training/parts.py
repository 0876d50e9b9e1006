"""From a configuration to the trained parts, their optimisers, and the step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gcahng.data.ranks import rank_sizes
from gcahng.distributed.shard_states import check_by_entry, is_sharded
from gcahng.errors import ConfigError
from gcahng.generation.generated_losses import GeneratorFactors
from gcahng.generation.generator import FeatureGenerator
from gcahng.graph import GraphNetwork
from gcahng.models import Embedder, build_embedder
from gcahng.random import stream_key
from gcahng.training.backend import Backend
from gcahng.training.config import Config, ModelConfig
from gcahng.training.generator_passes import GeneratorSettings
from gcahng.training.launched import Launched
from gcahng.training.make_backend import make_backend
from gcahng.training.metric_losses import build_metric_loss
from gcahng.training.optimizers import PassGate, build_optimizer, build_schedule
from gcahng.training.sharded_parts import NODE_CLASSIFIER
from gcahng.training.step import StepSettings, TrainingStep

# The part of `optim` that moves each part of the run.
OPTIMIZER_OF = {
    "metric_model": "metric_model",
    "metric_loss": "proxies",
    "graph": "graph",
    NODE_CLASSIFIER: "graph",
    "classifier": "classifier",
    "generator": "generator",
}
_CLIPPED = ("metric_model", "graph", NODE_CLASSIFIER)


@dataclass(frozen=True)
class RunParts:
    """The trained modules of a run and what moves them, all by part name."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    gates: Mapping[str, PassGate]
    schedules: Mapping[str, LRScheduler]

    @property
    def metric_model(self) -> Embedder:
        model = self.modules["metric_model"]
        assert isinstance(model, Embedder)
        return model


def choose_device(setting: str) -> torch.device:
    """The device of `train.device`.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`train.device` is cuda, but torch sees no CUDA device. Use cpu or auto.")
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(setting)


def build_metric_model(config: ModelConfig, *, load_weights: bool = True) -> Embedder:
    """The backbone with its head; `load_weights=False` leaves the published or local weights out."""
    return build_embedder(
        config.backbone,
        pooling=config.pooling,
        head=config.head,
        head_init=config.head_init,
        embedding_dim=config.embedding_dim,
        pretrained=config.pretrained and load_weights,
        weights=config.weights if load_weights else None,
        backbone_args=config.backbone_args,
        freeze_batch_norm=config.freeze_batch_norm,
        freeze_patch_embed=config.freeze_patch_embed,
    )


def _seeded(seed: int, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Build a part with initial weights of its own stream: adding a part leaves the others alone."""
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: modules are built there, and CUDA's generators stay as they are.
        torch.default_generator.manual_seed(stream_key(seed, "weights", name) >> 1)
        return make()


def build_modules(config: Config, num_classes: int, *, load_weights: bool = True) -> dict[str, nn.Module]:
    """The parts that the configuration asks for, on the CPU; arguments as for `module_makers`."""
    return {name: make() for name, make in module_makers(config, num_classes, load_weights=load_weights).items()}


def module_makers(config: Config, num_classes: int, *, load_weights: bool = True) -> dict[str, Callable[[], nn.Module]]:
    """What makes the parts that the configuration asks for, on the CPU: one at a time, where memory counts.

    Args:
        num_classes: N, training classes.
        load_weights: Whether to load the backbone's published or local weights.
    """
    dim = config.model.embedding_dim
    widths: list[int] = []  # of the features, once the metric model is there

    def metric_model() -> nn.Module:
        model = build_metric_model(config.model, load_weights=load_weights)
        widths.append(model.backbone.num_features)
        return model

    def num_features() -> int:
        return widths[0] if widths else _num_features(config.model)

    makers: dict[str, Callable[[], nn.Module]] = {
        "metric_model": metric_model,
        "metric_loss": lambda: build_metric_loss(config.loss, num_classes, dim),
    }
    if config.graph.enabled:
        makers["graph"] = lambda: GraphNetwork(
            dim,
            num_classes,
            config.graph.num_layers,
            config.graph.num_heads,
            dropout=config.graph.dropout,
            edge_dropout=config.graph.edge_dropout,
            backend=config.graph.backend,
            norm=config.graph.norm,
            node_propagation=config.graph.node_propagation,
            edge_to_node=config.graph.edge_to_node,
            edge_aggregation=config.graph.edge_aggregation,
        )
    if config.generation.enabled:
        by_generator = config.generation.method == "generator"
        by_features = by_generator and config.generation.generator.classify == "features"
        makers["classifier"] = lambda: nn.Linear(num_features() if by_features else dim, num_classes)
        if by_generator:
            hidden = config.generation.generator.hidden
            makers["generator"] = lambda: FeatureGenerator(dim, num_features(), hidden)
    return {name: partial(_seeded, config.seed, name, make) for name, make in makers.items()}


def _num_features(config: ModelConfig) -> int:
    """Channels of the pooled features: of a backbone built for that alone."""
    with torch.random.fork_rng(devices=[]):  # the part that asks draws its own weights
        return build_metric_model(config, load_weights=False).backbone.num_features


def build_parts(
    config: Config, modules: Mapping[str, nn.Module], device: torch.device, *, fused: bool | None = None
) -> RunParts:
    """Move the modules to their device and make optimisers and schedules.

    Args:
        config: Of the run.
        modules: Parts by name.
        device: Of the run.
        fused: Whether optimisers are fused (see `build_optimizer`); by default on CUDA.
    Raises:
        ConfigError: An optimiser cannot be made, or cannot move rows that are spread over ranks.
    """
    fused = device.type == "cuda" if fused is None else fused
    optimizers: dict[str, Optimizer] = {}
    gates: dict[str, PassGate] = {}
    schedules: dict[str, LRScheduler] = {}
    for name, module in modules.items():
        module.to(device).train()
        if not any(True for _ in module.parameters()):
            continue
        settings = getattr(config.optim, OPTIMIZER_OF[name])
        clip = config.optim.clip_value if name in _CLIPPED else None
        optimizers[name], gates[name] = build_optimizer(module, settings, clip_value=clip, fused=fused)
        if is_sharded(module):
            check_by_entry(name, optimizers[name])
        schedules[name] = build_schedule(optimizers[name], settings.schedule, config.train.epochs)
    return RunParts(dict(modules), optimizers, gates, schedules)


def build_step(
    config: Config, parts: RunParts, launched: Launched, *, deferred_checks: bool | None = None
) -> tuple[TrainingStep, Backend]:
    """The training step over all ranks, and the backend that it runs on; every rank calls it.

    Args:
        config: Of the run.
        parts: What is trained, on the device of `launched`.
        launched: The ranks, and which backend.
        deferred_checks: Whether the step never waits for the device (see `PlainBackend`); by default on CUDA.
    """
    backend = make_backend(config, parts, launched, deferred_checks=deferred_checks)
    ranks = launched.ranks
    class_counts = rank_sizes(config.batch.num_classes, ranks.size)
    return TrainingStep(backend, step_settings(config), ranks=ranks, class_counts=class_counts), backend


def step_settings(config: Config) -> StepSettings:
    """The constants of the iteration that a configuration asks for."""
    weights = config.generation.weights
    settings: dict[str, Any] = {
        "seed": config.seed,
        "num_samples": config.batch.num_samples,
        "generate": config.generation.enabled,
        "channel_coefficients": config.generation.coefficients == "channel",
        "fusion": config.generation.fusion,
        "alpha": config.generation.alpha,
        "beta": config.generation.beta,
        "neighbours": config.graph.neighbours,
        "normalised_distance": config.generation.normalised_distance,
        "classifier_weight": weights.classifier,
        "classification_weight": weights.classification,
        "similarity_weight": weights.similarity,
        "diversity_weight": weights.diversity * weights.diversity_scale,
        "generator": GeneratorSettings(
            GeneratorFactors(config.generation.generator.reconstruction, config.generation.generator.classification),
            config.generation.generator.classify,
        ),
        "micro_batch": config.accumulation.micro_batch,
        "microbatch_statistics": config.accumulation.microbatch_statistics,
    }
    return StepSettings(**settings)
