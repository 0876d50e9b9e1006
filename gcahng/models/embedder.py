"""The metric model f: images to embeddings."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from gcahng.errors import ConfigError, InputError
from gcahng.models.backbone import Backbone
from gcahng.models.pooling import POOLINGS, pool

HEADS = ("bn_linear", "linear")
HEAD_INITS = ("default", "orthogonal")


class Embedder(nn.Module):
    """Backbone, pooling, embedding head; and which of their parameters are trained.

    Which parameters require gradients is settled when it is built, warm-up or not: wrappers that average gradients
    over processes look once.

    Args:
        backbone: Images to a feature map or tokens.
        embedding_dim: D.
        pooling: `avg`, `max`, `avg+max` or `cls`.
        head: `bn_linear` (BatchNorm1d + Linear) or `linear`.
        head_init: `default` (PyTorch's) or `orthogonal` (orthogonal Linear weight, zero bias).
        freeze_batch_norm: Keep the running statistics of the backbone's BatchNorm2d layers, and use
            them in training too. Their affine weights are trained all the same, after the warm-up.
        freeze_patch_embed: Never train the patch embedding of a vision transformer.

    Backbone parameters that do not require gradients when they come in are never trained.

    Attributes:
        backbone: See above.
        head: BatchNorm1d (`norm`) and Linear (`linear`), or Linear alone.
        embedding_dim: D.
        warm_up: True while only the head is trained.

    Raises:
        ConfigError: unknown choice, or something to freeze that the backbone does not have.
    """

    def __init__(
        self,
        backbone: Backbone,
        embedding_dim: int,
        *,
        pooling: str = "avg",
        head: str = "bn_linear",
        head_init: str = "default",
        freeze_batch_norm: bool = False,
        freeze_patch_embed: bool = False,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("pooling", pooling, POOLINGS),
            ("head", head, HEADS),
            ("head_init", head_init, HEAD_INITS),
        ):
            if value not in choices:
                raise ConfigError(f"model.{name} must be one of {', '.join(choices)}: got {value!r}.")
        if pooling == "cls" and backbone.num_prefix_tokens < 1:
            raise ConfigError(
                "model.pooling is cls, but the backbone has no class token. Set it to avg, max or avg+max."
            )
        self.backbone = backbone
        self.embedding_dim = embedding_dim
        self.pooling = pooling
        self.head = _build_head(backbone.num_features, embedding_dim, head, head_init)
        self._frozen_norms = self._norms_to_freeze() if freeze_batch_norm else []
        if freeze_patch_embed:
            for parameter in self._patch_parameters():
                parameter.requires_grad_(False)
        self.warm_up = False
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Under autocast the backbone and the head's product run in the lower precision; pooling,
        BatchNorm1d and the result are float32. The result is not L2-normalised.

        Args:
            images: (B, 3, height, width), normalised, in the parameters' dtype.
        Returns:
            (B, D)
        Raises:
            InputError: the backbone refuses the image size, or returns another shape than it says.
        """
        return self.embed_features(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Backbone and pooling: (B, C) of images as `forward` takes them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.warm_up):
            features = _at_least_float32(self.backbone(images))
        pooled = pool(features, self.pooling, self.backbone.num_prefix_tokens)
        if pooled.shape[1] != self.backbone.num_features:
            raise InputError(
                f"The backbone must return as many channels as its `num_features`: expected "
                f"{self.backbone.num_features}, got {pooled.shape[1]}. Correct its `num_features`."
            )
        return pooled

    def embed_features(self, features: Tensor) -> Tensor:
        """The head: (B, D) embeddings of `features`, (B, C), of the whole batch at once."""
        return _at_least_float32(self.head(features))

    def set_warm_up(self, active: bool) -> None:
        """Train the head alone (`active`), or everything but what is frozen for good.

        In the warm-up no gradient reaches the backbone. Its BatchNorm statistics that are not frozen go on being
        updated, as in the released code.
        """
        self.warm_up = active
        if active:
            # An optimiser moves whatever still has a gradient.
            for parameter in self.backbone.parameters():
                parameter.grad = None

    def train(self, mode: bool = True) -> "Embedder":
        """Set the training mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def _norms_to_freeze(self) -> list[nn.Module]:
        norms: list[nn.Module] = [module for module in self.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
        if not norms:
            raise ConfigError("model.freeze_batch_norm is true, but the backbone has no BatchNorm2d. Set it to false.")
        return norms

    def _patch_parameters(self) -> list[nn.Parameter]:
        module = self.backbone.patch_embed
        if module is None:
            raise ConfigError(
                "model.freeze_patch_embed is true, but the backbone has no patch embedding. Set it to false."
            )
        return list(module.parameters())


def _build_head(num_features: int, embedding_dim: int, kind: str, init: str) -> nn.Sequential:
    linear = nn.Linear(num_features, embedding_dim)
    if init == "orthogonal":
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
    parts: OrderedDict[str, nn.Module] = OrderedDict(linear=linear)
    if kind == "bn_linear":
        parts["norm"] = nn.BatchNorm1d(num_features)
        parts.move_to_end("norm", last=False)
    return nn.Sequential(parts)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
