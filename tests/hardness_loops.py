"""What `hardness.jsonl` records, by plain loops over all ordered pairs: a witness that shares no code."""

import math
from dataclasses import dataclass

import numpy as np
from generation_loops import distance, group_major_indices, synthetic_negatives
from torch import Tensor

from gcahng.generation import ConstantClassifier, Synthesis


@dataclass
class Looped:
    """Single values, in the order of the loops."""

    d_positive: list[float]
    d_negative: list[float]
    d_synthetic: list[float]
    coefficients: list[float]
    channel_std: list[float]
    own_class: list[bool]
    anchors_hard: list[bool]


def looped(
    z: Tensor,
    labels: list[int],
    table: Tensor | None,
    synthesis: Synthesis,
    classifier: ConstantClassifier,
    listed: Tensor | None = None,
) -> Looped:
    """Everything of a batch; `table` None for coefficient 1, `listed` (B, B) the edges of a sparse graph."""
    rule, weights = synthesis.rule, synthesis.weights
    factor = math.exp(-rule.alpha / rule.mean_metric_loss)
    points = [row / row.norm() for row in z] if rule.normalised_distance else list(z)
    classes = group_major_indices(labels)
    found = Looped([], [], [], [], [], [], hard_anchors(z, labels))
    fused = synthetic_negatives(
        z, labels, table, weights, rule.alpha, rule.mean_metric_loss, normalised_distance=rule.normalised_distance
    )
    for i in range(len(labels)):
        own = next(members for members in classes if i in members)
        near = distance(points[i], points[own[(own.index(i) + 1) % len(own)]])
        found.d_positive.append(float(near))
        for j in range(len(labels)):
            if labels[i] == labels[j] or (listed is not None and not listed[i, j]):
                continue
            far = distance(points[i], points[j])
            pull = factor * (table[i, j] if table is not None else 1.0)
            share = (near + (far - near) * pull) / far if far > near else 1.0
            pulled = z[i] + share * (z[j] - z[i])
            moved = pulled / pulled.norm() if rule.normalised_distance else pulled
            found.d_negative.append(float(far))
            found.d_synthetic.append(float(distance(points[i], moved)))
            if table is not None:
                found.coefficients += table[i, j].tolist()
                found.channel_std.append(float(np.std(table[i, j].numpy())))
        for p, members in enumerate(classes):
            if i in members or (listed is not None and not listed[i, members[0]]):
                continue
            scores = classifier.weight @ fused[i, p] + classifier.bias
            found.own_class.append(int(scores.argmax()) == labels[members[0]])
    return found


def hard_anchors(z: Tensor, labels: list[int]) -> list[bool]:
    """For each anchor that has both: whether its most similar negative beats its most similar positive."""
    found = []
    for i in range(len(labels)):
        cosines = [float(z[i] @ z[j] / (z[i].norm() * z[j].norm())) for j in range(len(labels))]
        positives = [cosines[j] for j in range(len(labels)) if j != i and labels[j] == labels[i]]
        positives = [cosine for cosine in positives if cosine <= 0.9999]
        negatives = [cosines[j] for j in range(len(labels)) if labels[j] != labels[i]]
        if positives and negatives:
            found.append(max(negatives) > max(positives))
    return found
