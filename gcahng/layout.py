"""The group-major batch layout: K groups of P samples, the classes in the same order in every group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.errors import InputError


@dataclass(frozen=True)
class BatchLayout:
    """Where each sample of a batch stands in the group-major layout.

    Attributes:
        num_classes: P, classes in the batch.
        num_samples: K, samples of each class.
        order: (B,) int64; `order[g * P + p]` is the index, in the caller's batch, of sample g of class p.
        class_labels: (P,) int64; the label of class p.
    """

    num_classes: int
    num_samples: int
    order: Tensor
    class_labels: Tensor


def check_labels(labels: Tensor, num_rows: int, name: str = "labels") -> None:
    """Raise InputError unless `labels` is a one-dimensional integer tensor with `num_rows` entries."""
    if not isinstance(labels, Tensor):
        raise InputError(
            f"`{name}` must be a tensor of class numbers: got {type(labels).__name__}. Use torch.as_tensor."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(
            f"`{name}` must hold integer class numbers: expected int64, got {labels.dtype}. "
            f"Convert them with `{name}.long()`."
        )
    if labels.shape != (num_rows,):
        raise InputError(
            f"`{name}` must have one entry per embedding: expected shape ({num_rows},), "
            f"got {tuple(labels.shape)}. Check the collate function."
        )


def check_embeddings(embeddings: Tensor, name: str = "embeddings", *, values: bool = True) -> None:
    """Raise InputError unless `embeddings` is a floating (B, D) tensor of finite numbers.

    `values=False` leaves the numbers alone: to look at them is to wait for the device.
    """
    if not isinstance(embeddings, Tensor):
        raise InputError(f"`{name}` must be a tensor: got {type(embeddings).__name__}.")
    if embeddings.dim() != 2 or not embeddings.is_floating_point():
        raise InputError(
            f"`{name}` must be a floating tensor of shape (B, D): got {embeddings.dtype} "
            f"of shape {tuple(embeddings.shape)}."
        )
    if not values:
        return
    finite = torch.isfinite(embeddings.detach()).all(1)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite)[:, 0].tolist()
        raise InputError(
            f"`{name}` must be finite: {len(bad)} of {embeddings.shape[0]} embeddings are not, the first at position "
            f"{bad[0]}. Check the images, or lower the learning rate."
        )


def check_same_width(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    """Raise InputError unless two (rows, D) tensors have the same D."""
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"`{second_name}` must have as many channels as `{first_name}`: expected {first.shape[1]}, "
            f"got {second.shape[1]}."
        )


def group_major(labels: Tensor) -> BatchLayout:
    """The group-major layout of a batch whose samples come in any order.

    Classes keep the order of their first sample, samples of a class their own order, so a batch that is
    group-major already keeps its order.

    Args:
        labels: (B,) int64, every class the same number of times.
    Raises:
        InputError: Labels are not integers, or the classes have different numbers of samples.
    """
    check_labels(labels, labels.shape[0] if labels.dim() else 0)
    classes, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sizes = counts.tolist()
    if not sizes:
        raise InputError("`labels` is empty: expected at least one sample.")
    # The commonest size; of two as common the larger, since missing samples are the usual fault.
    expected = max(set(sizes), key=lambda size: (sizes.count(size), size))
    if min(sizes) != max(sizes):
        odd = [(c, n) for c, n in zip(classes.tolist(), sizes, strict=True) if n != expected]
        listed = ", ".join(f"class {c} has {n}" for c, n in odd[:10])
        more = f" and {len(odd) - 10} more classes" if len(odd) > 10 else ""
        raise InputError(
            f"`labels` must hold every class the same number of times: most classes have {expected} samples, "
            f"but {listed}{more}. Use a class-balanced sampler."
        )
    num_classes, num_samples = len(sizes), expected
    by_class = torch.argsort(inverse, stable=True).view(num_classes, num_samples)
    appearance = torch.argsort(by_class[:, 0])
    by_class = by_class[appearance]
    return BatchLayout(num_classes, num_samples, by_class.T.reshape(-1), classes[appearance])
