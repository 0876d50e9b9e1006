"""The generation of synthetic negatives and its losses as plain loops: a witness that shares no code."""

import math

import torch
from torch import Tensor


def group_major_indices(labels: list[int]) -> list[list[int]]:
    """For each class, in the order of first appearance, its samples in order."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    return list(members.values())


def distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.sqrt(sum((x - y + 1e-6) ** 2 for x, y in zip(a, b, strict=True)))


def synthetic_negatives(
    z: Tensor,
    labels: list[int],
    coefficients: Tensor | None,
    weights: Tensor,
    alpha: float,
    mean_metric_loss: float,
    *,
    normalised_distance: bool = False,
) -> Tensor:
    """(B, P, D), sample by sample, class by class, group by group."""
    classes = group_major_indices(labels)
    num_samples = len(classes[0])
    factor = math.exp(-alpha / mean_metric_loss)
    points = [row / row.norm() for row in z] if normalised_distance else list(z)
    rows = []
    for i in range(len(labels)):
        own = next(members for members in classes if i in members)
        group = own.index(i)
        positive = own[(group + 1) % num_samples]
        near = distance(points[i], points[positive])
        columns = []
        for members in classes:
            fused = None
            for g, j in enumerate(members):
                far = distance(points[i], points[j])
                pulled = z[j]
                if far > near:
                    pull = factor if coefficients is None else coefficients[i, j] * factor
                    share = (near + (far - near) * pull) / far
                    pulled = z[i] + share * (z[j] - z[i])
                fused = pulled if fused is None else pulled + weights[group, g - 1] * (fused - pulled)
            columns.append(fused)
        rows.append(torch.stack(columns))
    return torch.stack(rows)


def synthetic_loss(z: Tensor, synthetic: Tensor, num_samples: int) -> Tensor:
    """J_syn of a group-major batch, group by group and anchor by anchor."""
    num_classes = z.shape[0] // num_samples
    total = torch.zeros((), dtype=z.dtype)
    for g in range(num_samples):
        entropy = torch.zeros((), dtype=z.dtype)
        lengths = torch.zeros((), dtype=z.dtype)
        anchors = torch.zeros((), dtype=z.dtype)
        for p in range(num_classes):
            i = g * num_classes + p
            positive = z[((g + 1) % num_samples) * num_classes + p]
            candidates = [positive if q == p else synthetic[i, q] for q in range(num_classes)]
            scores = [z[i] @ c for c in candidates]
            entropy = entropy + torch.log(sum(torch.exp(s - scores[p]) for s in scores))
            lengths = lengths + sum(c @ c for c in candidates)
            anchors = anchors + z[i] @ z[i]
        total = total + entropy / num_classes
        total = total + 3e-3 * 0.25 * (anchors / num_classes + lengths / num_classes**2)
    return total / num_samples


def similarity(z: Tensor, synthetic: Tensor, num_classes: int) -> Tensor:
    """J_sim: own-class entries count as 0."""
    total = torch.zeros((), dtype=z.dtype)
    for i in range(z.shape[0]):
        for p in range(num_classes):
            if i % num_classes != p:
                s = synthetic[i, p]
                total = total + 1 - z[i] @ s / (z[i].norm() * s.norm())
    return total / (z.shape[0] * num_classes)


def classification(synthetic: Tensor, class_labels: list[int], weight: Tensor, bias: Tensor) -> Tensor:
    """J_cls: all entries, the own-class ones included."""
    total = torch.zeros((), dtype=synthetic.dtype)
    for row in synthetic:
        for p, label in enumerate(class_labels):
            logits = weight @ row[p] + bias
            total = total + torch.log(torch.exp(logits - logits[label]).sum())
    return total / (synthetic.shape[0] * len(class_labels))


def diversity(coefficients: Tensor) -> Tensor:
    """J_div, anchor by anchor and channel by channel."""
    batch = coefficients.shape[0]
    spread = torch.zeros((), dtype=coefficients.dtype)
    for i in range(batch):
        for c in range(coefficients.shape[2]):
            values = coefficients[i, :, c]
            mean = sum(values) / batch
            spread = spread + sum((v - mean) ** 2 for v in values)
    return 1 - torch.sqrt(spread / batch**2)
