"""What every backbone offers: images to a feature map or to tokens.

Shapes: B images, C channels, h x w positions, T tokens.
"""

from torch import Tensor, nn


class Backbone(nn.Module):
    """Base of all backbones.

    A subclass defines `forward_features`; weight files are read into `network`, whose parameter
    names are those of the published files.

    Attributes:
        num_features: C, channels of the features.
        num_prefix_tokens: Tokens before the patch tokens, the class token first; 0 for maps.
        network: The module that computes the features.
        weight_source: Where the weights come from, in words, for the run log.
    """

    def __init__(self, network: nn.Module, num_features: int, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.network = network
        self.num_features = num_features
        self.num_prefix_tokens = num_prefix_tokens
        self.weight_source = "random initialisation"

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute features before any pooling.

        Args:
            images: (B, 3, height, width), normalised.
        Returns:
            A feature map (B, C, h, w) or tokens (B, T, C).
        """
        features: Tensor = self.network(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Same as `forward_features`."""
        return self.forward_features(images)

    @property
    def patch_embed(self) -> nn.Module | None:
        """The patch embedding of a vision transformer; None for other networks."""
        module = getattr(self.network, "patch_embed", None)
        return module if isinstance(module, nn.Module) else None
