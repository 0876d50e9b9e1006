"""What is exported: the metric model between an input and an output that other programs can feed and use."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.images.transforms import normalise
from gcahng.models import Embedder


class ExportedModel(nn.Module):
    """Images to embeddings with the choices of an export built in.

    Args:
        embedder: The metric model.
        transform: Channel statistics of the images it was trained on.
        preprocess: Take bytes (B, H, W, 3) and normalise them, in place of normalised numbers (B, 3, H, W).
        l2_normalise: Give embeddings of length 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, embedder: Embedder, transform: TransformSettings, *, preprocess: bool = False, l2_normalise: bool = False
    ) -> None:
        super().__init__()
        self.embedder = embedder
        self.transform = transform
        self.preprocess = preprocess
        self.l2_normalise = l2_normalise
        self.register_buffer("mean", torch.tensor(transform.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(transform.std).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: What `inputs` makes.
        Returns:
            (B, D) float32
        """
        if self.preprocess:
            images = (images.permute(0, 3, 1, 2).contiguous().float() / 255 - self.mean) / self.std
        embeddings: Tensor = self.embedder(images)
        return F.normalize(embeddings, dim=1) if self.l2_normalise else embeddings

    def inputs(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8, as `gcahng.data` cuts them, in the form that `forward` takes."""
        return images.permute(0, 2, 3, 1).contiguous() if self.preprocess else normalise(images, self.transform)

    @torch.no_grad()
    def expected(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of images (B, 3, H, W) uint8 by the way that evaluation goes."""
        embeddings: Tensor = self.embedder(normalise(images, self.transform))
        return F.normalize(embeddings, dim=1) if self.l2_normalise else embeddings
