"""Mean and variance of a backbone's features, pooled in every way that it allows, while images go through it.

Letters: b images of a batch, C channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gcahng.models import Embedder
from gcahng.models.pooling import POOLINGS, pool

# Per-image features are summed in float64: the variance is a small difference of large numbers in nothing else.
EXACT = torch.float64


class ChannelMoments:
    """Mean and sum of squared deviations of each channel over all images so far (Chan, Golub and LeVeque)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=EXACT)
        self._squares = torch.zeros((), dtype=EXACT)

    def add(self, features: Tensor) -> None:
        """Take (b, C) features, not normalised."""
        values = features.detach().to("cpu", EXACT)
        if not len(values):
            return
        mean = values.mean(0)
        squares = (values - mean).square().sum(0)
        shift, total = mean - self.mean, self.count + len(values)
        self._squares = self._squares + squares + shift.square() * (self.count * len(values) / total)
        self.mean = self.mean + shift * (len(values) / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """(C,) over the images, divided by their number."""
        return self._squares / max(self.count, 1)

    @property
    def over_images(self) -> float:
        """Mean variance of a channel over the images."""
        return float(self.variance.mean())

    @property
    def between_channels(self) -> float:
        """Variance of the channels' means."""
        return float(self.mean.var(correction=0)) if self.mean.dim() else 0.0

    @property
    def total(self) -> float:
        """Variance of all values of all channels: the sum of the two."""
        return self.over_images + self.between_channels


Moments = dict[str, ChannelMoments]
"""By pooling, in the order of `gcahng.models.pooling.POOLINGS`; empty before the first image."""


@contextmanager
def watched_features(model: Embedder) -> Iterator[Moments]:
    """Within it, whatever goes through the model's backbone is pooled in every way and counted.

    The model computes what it always does.
    """
    found: Moments = {}

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        features = output.detach()
        features = features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
        for name in poolings_of(features, model.backbone.num_prefix_tokens):
            found.setdefault(name, ChannelMoments()).add(pool(features, name, model.backbone.num_prefix_tokens))

    handle = model.backbone.register_forward_hook(watch)
    try:
        with torch.no_grad():
            yield found
    finally:
        handle.remove()


def poolings_of(features: Tensor, num_prefix_tokens: int) -> list[str]:
    """The ways of pooling that a backbone's features allow.

    Args:
        features: Feature map (b, C, h, w) or tokens (b, T, C).
        num_prefix_tokens: Tokens before the patch tokens.
    """
    if features.ndim == 4:
        return [name for name in POOLINGS if name != "cls"]
    has_patches = features.shape[1] > num_prefix_tokens
    return [name for name in POOLINGS if (num_prefix_tokens > 0 if name == "cls" else has_patches)]
