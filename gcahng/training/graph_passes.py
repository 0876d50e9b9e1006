"""What the step does with the graph network in each of its two passes: from a batch to losses.

Each is one function of the network, tensors in and losses out, so that a wrapper sees a whole forward pass.

Shapes: B = P * K samples of the global batch group-major, D channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.generation import ConstantClassifier, LossFactors, Synthesis, generation_loss, synthetic_loss
from gcahng.graph import Coefficients, GraphNetwork
from gcahng.training.hardness import HardnessRecord


def node_and_synthetic(
    graph: GraphNetwork,
    z: Tensor,
    labels: Tensor,
    synthesis: Synthesis | None,
    generates: bool,
    call: Mapping[str, Any],
    record: HardnessRecord | None = None,
) -> dict[str, Tensor]:
    """The graph's part of the metric pass: J_nce, and J_syn if its coefficients make the negatives.

    A graph without node classifier gives "node_features", (B, D), in place of J_nce. What a record says of the
    negatives comes with the losses.
    """
    output = graph(z, labels, need_coefficients=generates, coefficient_gradient=False, **call)
    with torch.autocast(z.device.type, enabled=False):
        if graph.classifies_nodes:
            losses = {"node_loss": F.cross_entropy(output.node_logits, labels)}
        else:
            losses = {"node_features": output.node_features}
        if generates:
            assert synthesis is not None
            losses["synthetic_loss"] = synthetic_loss(z, output.coefficients, synthesis, reduce=call["reduce"])
            if record is not None:
                losses |= record.take_candidates(z, output.coefficients, synthesis)
    return losses


@dataclass(frozen=True)
class Judge:
    """J_gen of coefficients; see `generation_loss`. The classifier is made when it judges: it may be large.

    Where a record is given, it takes the negatives that are judged.
    """

    synthesis: Synthesis
    classifier: Callable[[], ConstantClassifier]
    class_labels: Tensor
    factors: LossFactors
    reduce: Callable[[Tensor], Tensor]
    record: HardnessRecord | None = None

    def __call__(self, z: Tensor, coefficients: Coefficients) -> dict[str, Tensor]:
        classifier = self.classifier()
        if self.record is not None:
            self.record.take_synthetic(z, coefficients, self.synthesis, classifier, self.class_labels)
        found = generation_loss(
            z, coefficients, self.synthesis, classifier, self.class_labels, self.factors, reduce=self.reduce
        )
        losses = {
            "classification_loss": found.classification,
            "similarity_loss": found.similarity,
            "generation_loss": found.total,
        }
        return losses if found.diversity is None else losses | {"diversity_loss": found.diversity}


def generation(
    graph: GraphNetwork, z: Tensor, labels: Tensor, judge: Judge, call: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The graph's part of the generation pass: J_gen and its parts."""
    output = graph(z, labels, need_coefficients=True, coefficient_gradient=True, **call)
    with torch.autocast(z.device.type, enabled=False):
        return judge(z, output.coefficients)
