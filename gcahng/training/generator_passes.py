"""What the step does with a generator of features (`generation.method: generator`) in place of interpolations as such.

Phase 1: the interpolated embeddings go through the generator and the metric model's own head; J_syn takes what comes
out. The generator is a constant; gradient reaches the metric model through the interpolated embeddings and through the
head's parameters, as in HDML, whose J_metric moves everything of the metric model and whose graph is cut nowhere
(released code, `main_npair.py`: c_train_step). Phase 3: the generator alone moves.

The head's parameters come out of the metric model's forward pass as tensors with gradient, so that a wrapper sees one
pass whose outputs hold all of it, whatever is done with them later. Its BatchNorm is applied to generated features with
the statistics of the batch's real ones (`gcahng.generation.row_map`), of all ranks; its running statistics move in the
real pass alone.

Shapes: B samples of the global batch group-major, B_r of this rank, D channels of embeddings, C of features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from gcahng.distributed import Ranks
from gcahng.generation import Synthesis
from gcahng.generation.generated_losses import GeneratorFactors, generated_synthetic_loss, generator_loss
from gcahng.generation.generator import FeatureGenerator
from gcahng.generation.row_map import Affine, Normalise, RowFunction, RowMap
from gcahng.models import Embedder
from gcahng.training.accumulation import cached_features
from gcahng.training.backend import Backend
from gcahng.training.sharded_parts import constant_classifier


@dataclass(frozen=True)
class GeneratorSettings:
    """Constants of the generator's passes.

    Attributes:
        factors: Of J_recon and J_soft.
        classify: What the classifier takes: "features" as in HDML (released code, `cross_entropy` and `genSoftmax` of
            `lib/HDML.py`), or "embeddings" as elsewhere in this library.
    """

    factors: GeneratorFactors = GeneratorFactors()
    classify: Literal["features", "embeddings"] = "features"


def embed_with_features(
    model: Embedder, images: Tensor, micro_batch: int | None, microbatch_statistics: bool
) -> dict[str, Tensor]:
    """Embeddings of this rank's images, their features, and the head: one forward pass of the metric model.

    Args:
        model: The metric model.
        images: (B_r, ...).
        micro_batch, microbatch_statistics: See `gcahng.training.accumulation`.
    Returns:
        "embeddings" (B_r, D), "features" (B_r, C), and the head's parameters by their names in it.
    """
    if micro_batch is None:
        features = model.features(images)
    else:
        features = cached_features(model, images, micro_batch, microbatch_statistics)
    head = {name: parameter.clone() for name, parameter in model.head.named_parameters()}
    return {"embeddings": model.embed_features(features), "features": features, **head}


@dataclass(frozen=True)
class GeneratorPasses:
    """The passes of a run with a generator; holds no state of its own.

    Attributes:
        backend: Holds "metric_model" (an `Embedder`), "classifier" and "generator".
        settings: Constants.
        ranks: Each takes a share of the anchors.
        class_counts: (W,) classes of a batch that each rank holds.
        micro_batch, microbatch_statistics: See `gcahng.training.accumulation`.
    """

    backend: Backend
    settings: GeneratorSettings
    ranks: Ranks
    class_counts: tuple[int, ...]
    micro_batch: int | None
    microbatch_statistics: bool

    def embed(self, images: Tensor, dtype: torch.dtype) -> "GeneratorBatch":
        """Run the metric model on this rank's images and gather the features; `dtype` is that of the losses."""
        found: dict[str, Tensor] = self.backend.run(
            "metric_model", embed_with_features, images, self.micro_batch, self.microbatch_statistics
        )
        own, features = found.pop("embeddings").to(dtype), found.pop("features").to(dtype)
        return GeneratorBatch(self, own, self.ranks.gather(features, self.class_counts), found)


@dataclass(frozen=True)
class GeneratorBatch:
    """A batch whose synthetic negatives a generator makes.

    Attributes:
        passes: Of the run.
        own: (B_r, D) embeddings of this rank's images.
        features: (B, C) of the global batch.
        head: The head's parameters by name.
    """

    passes: GeneratorPasses
    own: Tensor
    features: Tensor
    head: Mapping[str, Tensor]

    def synthetic_loss(self, z: Tensor, synthesis: Synthesis) -> Tensor:
        """J_syn of the metric pass, a scalar of the whole batch: the generator is a constant, the head is not.

        Args:
            z: (B, D) the gathered embeddings, with gradient.
            synthesis: The metric pass's.
        """
        generator = cast(FeatureGenerator, self.passes.backend.module("generator"))
        to_embeddings = generator.on_batch(z, constant=True).then(self._head_map(self.features, self.head))
        ranks = self.passes.ranks
        return generated_synthetic_loss(z, synthesis, to_embeddings, share=ranks.share, reduce=ranks.sum)

    def classified(self, z: Tensor) -> Tensor:
        """What the classifier learns from, (B, C) features or `z`, (B, D), without gradient."""
        return (self.features if self.passes.settings.classify == "features" else z).detach()

    def generation(self, z: Tensor, labels: Tensor, synthesis: Synthesis) -> dict[str, Tensor]:
        """J_gen of the generation pass and its terms, with gradient to the generator alone.

        Args:
            z: (B, D), detached.
            labels: (B,) int64 training labels.
            synthesis: The generation pass's.
        """
        found: dict[str, Tensor] = self.passes.backend.run("generator", self._generation, z, labels, synthesis)
        return found

    def _generation(
        self, generator: FeatureGenerator, z: Tensor, labels: Tensor, synthesis: Synthesis
    ) -> dict[str, Tensor]:
        backend, ranks, settings = self.passes.backend, self.passes.ranks, self.passes.settings
        features = self.features.detach()
        if settings.classify == "features":
            to_classified = RowMap((), features.shape[1])
        else:
            # The head that the metric pass has just moved, as the classifier that judges has moved too.
            head = cast(Embedder, backend.module("metric_model")).head
            to_classified = self._head_map(features, {name: p.detach() for name, p in head.named_parameters()})
        found = generator_loss(
            z,
            features,
            labels,
            synthesis,
            generator.on_batch(z),
            to_classified,
            constant_classifier(backend.module("classifier"), backend.matmul_dtype),
            settings.factors,
            share=ranks.share,
            reduce=ranks.sum,
        )
        return {
            "reconstruction_loss": found.reconstruction,
            "classification_loss": found.classification,
            "generation_loss": found.total,
        }

    def _head_map(self, features: Tensor, head: Mapping[str, Tensor]) -> RowMap:
        """The head as a function of single features, (R, C) -> (R, D), with BatchNorm statistics of `features`."""
        weight, bias = head["linear.weight"], head["linear.bias"]
        steps: list[RowFunction] = [Affine(weight, bias)]
        if "norm.weight" in head:
            norm = cast(nn.BatchNorm1d, cast(Embedder, self.passes.backend.module("metric_model")).head.norm)
            steps.insert(0, Normalise.of_batch(features, head["norm.weight"], head["norm.bias"], norm.eps))
        return RowMap(tuple(steps), max(weight.shape))
