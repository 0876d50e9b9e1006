"""Small steps with a generator, as one process runs them and as several ranks do."""

from dataclasses import dataclass, replace

import torch
from ddp_cases import Backends
from exact_cases import ExactCase, Outcome, run_case
from launched_here import launched_here
from maths_cases import randomise
from torch import nn

from gcahng.distributed import ONE, Ranks
from gcahng.distributed.shard_states import is_sharded
from gcahng.generation.generated_losses import GeneratorFactors
from gcahng.generation.generator import FeatureGenerator
from gcahng.models import Embedder, build_embedder
from gcahng.training.generator_passes import GeneratorSettings
from gcahng.training.sharded_parts import shard_part
from gcahng.training.step import StepSettings

# Backbones for images of 2 x 2 pixels, and the channels of their features: a convolutional one, and a vision
# transformer with a class token.
CONV = ("small_conv", {"widths": (4, 6)}, 6)
VIT = ("vit_tiny_patch16_224", {"img_size": 2, "patch_size": 1, "embed_dim": 12, "depth": 1, "num_heads": 3}, 12)


def small_embedder(dim: int, pooling: str = "avg", head: str = "bn_linear", warm_up: bool = False) -> Embedder:
    """A metric model with random parameters, in float32; the class token is that of a vision transformer."""
    name, arguments, _ = VIT if pooling == "cls" else CONV
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = build_embedder(name, backbone_args=arguments, embedding_dim=dim, pooling=pooling, head=head)
    randomise(model, 7)
    model.set_warm_up(warm_up)
    return model


@dataclass(frozen=True, kw_only=True)
class GeneratorCase(ExactCase):
    """A run whose synthetic negatives a generator makes.

    Attributes:
        pooling, head: Of the metric model.
        classify: What the classifier takes.
        warm_up: The head alone of the metric model is trained.
        micro_batch: Images of a rank that the backbone sees at once.
        sharded: Of several ranks each holds its own rows of the classifier.
        ranks: Of the run.
    """

    channel: bool = False
    graph: bool = False
    pooling: str = "avg"
    head: str = "bn_linear"
    classify: str = "features"
    warm_up: bool = False
    micro_batch: int | None = None
    sharded: bool = False
    ranks: Ranks = ONE

    @property
    def spread(self) -> bool:
        """Whether ranks hold different rows of the classifier."""
        return self.sharded and self.ranks.size > 1

    def modules(self) -> dict[str, nn.Module]:
        modules = super().modules()
        features = (VIT if self.pooling == "cls" else CONV)[2]
        width = features if self.classify == "features" else self.dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            modules["classifier"] = nn.Linear(width, self.training_classes)
            modules["generator"] = FeatureGenerator(self.dim, features, (7,))
        randomise(modules["generator"], 8)
        modules["metric_model"] = small_embedder(self.dim, self.pooling, self.head, self.warm_up)
        modules = {name: module.to(self.dtype) for name, module in modules.items()}
        return modules | (shard_part("classifier", modules["classifier"], self.ranks) if self.spread else {})

    def settings(self) -> StepSettings:
        # Factors that make the two terms weigh alike here, and trust neither 0 nor 1.
        generator = GeneratorSettings(GeneratorFactors(0.5, 2.0), self.classify)  # type: ignore[arg-type]
        return replace(
            super().settings(),
            generator=generator,
            micro_batch=self.micro_batch,
            microbatch_statistics=self.micro_batch is not None,
        )


CASES: dict[str, GeneratorCase] = {
    "average, uneven": GeneratorCase(num_classes=5, num_samples=3, steps=3),
    "graph, embeddings": GeneratorCase(graph=True, classify="embeddings", pooling="max", clip=0.02, steps=2),
    "warm-up, no BatchNorm, proxies": GeneratorCase(
        warm_up=True, head="linear", loss="proxy_anchor", pooling="avg+max", normalised_distance=True, steps=2
    ),
    "no wait, picked": GeneratorCase(deferred=True, fusion="pick", steps=2),
    "class shards": GeneratorCase(sharded=True, steps=3),
}


def run_all(ranks: Ranks) -> dict[str, Outcome]:
    """The cases, on this rank's part of the batches; without the classifier's rows where each rank has its own."""
    launched = launched_here(ranks)
    found = {}
    for name, case in CASES.items():
        own = replace(case, ranks=ranks)
        found[name] = run_case(own, ranks, Backends(launched))
        if case.sharded:
            assert is_sharded(own.modules()["classifier"]) == own.spread == (ranks.size > 1)
            found[name] = _without_classifier(found[name])
    return found


def _without_classifier(outcome: Outcome) -> Outcome:
    kept = {name: value for name, value in outcome.by_name().items() if ":classifier" not in name.split(" | ")[0]}
    return Outcome(tuple(kept), tuple(value.numel() for value in kept.values()), torch.cat(list(kept.values())))
