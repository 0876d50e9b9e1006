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
        self._trained_parameters = {name for name, p in backbone.named_parameters() if p.requires_grad}
        if freeze_patch_embed:
            self._trained_parameters -= self._patch_parameters()
        self.warm_up = False
        self.set_warm_up(False)
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
        features = _at_least_float32(self.backbone(images))
        pooled = pool(features, self.pooling, self.backbone.num_prefix_tokens)
        if pooled.shape[1] != self.backbone.num_features:
            raise InputError(
                f"The backbone must return as many channels as its `num_features`: expected "
                f"{self.backbone.num_features}, got {pooled.shape[1]}. Correct its `num_features`."
            )
        return _at_least_float32(self.head(pooled))

    def set_warm_up(self, active: bool) -> None:
        """Train the head alone (`active`), or everything but what is frozen for good.

        BatchNorm statistics that are not frozen go on being updated during the warm-up, as in the
        released code.
        """
        self.warm_up = active
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not active and name in self._trained_parameters)
            if not parameter.requires_grad:
                # An optimiser moves whatever still has a gradient.
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

    def _patch_parameters(self) -> set[str]:
        module = self.backbone.patch_embed
        if module is None:
            raise ConfigError(
                "model.freeze_patch_embed is true, but the backbone has no patch embedding. Set it to false."
            )
        inside = {id(parameter) for parameter in module.parameters()}
        return {name for name, p in self.backbone.named_parameters() if id(p) in inside}


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
