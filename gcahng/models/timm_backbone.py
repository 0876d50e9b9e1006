"""Backbones from timm, by the names its users know.

timm takes seconds to import, half the start of a command: it is imported when a network of its is asked for.
"""

import difflib
import sys
from typing import Any

from torch import Tensor

from gcahng.errors import ConfigError, InputError
from gcahng.models.backbone import Backbone
from gcahng.models.weights import LOCAL_FILE_REPAIR, load_weights


class TimmBackbone(Backbone):
    """A timm network without its pooling and classifier.

    Args:
        name: Architecture, with or without a tag, e.g. `resnet50.tv_in1k`.
        pretrained: Start from the tag's published weights.
        weights: Local file in place of the download.
        arguments: Further keyword arguments of `timm.create_model`, e.g. `img_size=64`.
    Raises:
        ConfigError: unknown name or argument, weights that cannot be fetched or do not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: str | None = None,
        **arguments: Any,
    ) -> None:
        import timm

        download = pretrained and weights is None
        if download and not _is_hub(name) and not timm.is_model_pretrained(name):
            raise ConfigError(
                f"timm has no published weights for backbone `{name}`. Choose another tag, set "
                "model.pretrained=false, or pass model.weights=FILE."
            )
        network, whole = _create(name, download, arguments)
        width = getattr(network, "head_hidden_size", None) if whole else None
        prefix = getattr(network, "num_prefix_tokens", None)
        if prefix is None:
            prefix = int(hasattr(network, "cls_token"))
        super().__init__(network, int(width or network.num_features), int(prefix))
        self.name = name
        self._whole = whole
        self._channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        if weights is not None:
            convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
            self.weight_source = load_weights(network, weights, convert=convert)
        elif download:
            self.weight_source = f"timm's published weights of {name}"

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to a map (B, C, h, w) or tokens (B, T, C).

        Raises:
            InputError: the network is built for another image size.
        """
        try:
            network: Any = self.network
            features: Tensor = network(images) if self._whole else network.forward_features(images)
        except AssertionError as error:  # how timm refuses an image size
            raise InputError(
                f"Backbone `{self.name}` refuses images of shape {tuple(images.shape)}: {error} "
                "Set data.transform.image_size to its size, or model.backbone_args.img_size to "
                "yours."
            ) from error
        if self._channels_last and features.ndim == 4:
            features = features.permute(0, 3, 1, 2)
        return features


def is_timm_name(name: str) -> bool:
    """Tell whether timm knows the architecture of `name` (its tag is not looked at)."""
    import timm

    return _is_hub(name) or timm.is_model(name.split(".")[0])


def near_timm_names(name: str, others: tuple[str, ...] = ()) -> list[str]:
    """Up to three known names like `name`: tags of its architecture, or architectures."""
    import timm

    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture) and tag:
        known = [*timm.list_models(f"{architecture}.*", pretrained=True), architecture]
        return difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return difflib.get_close_matches(architecture, [*timm.list_models(), *others], n=3)


def _is_hub(name: str) -> bool:
    return name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))


def _create(name: str, download: bool, arguments: dict[str, Any]) -> tuple[Any, bool]:
    """The network, and whether calling it whole gives features.

    Without its pooling a network may still hold layers between features and classifier (a norm, a
    convolution): those belong to the features. A few networks cannot be built without pooling; of
    them only `forward_features` is used.
    """
    import timm

    known = {"pretrained": download, "num_classes": 0, **arguments}
    try:
        try:
            return timm.create_model(name, global_pool="", **known), True
        except AssertionError:
            return timm.create_model(name, **known), False
    except TypeError as error:
        raise ConfigError(
            f"Backbone `{name}` does not take model.backbone_args {arguments!r}: {error}. Remove "
            "or correct the argument."
        ) from error
    except Exception as error:  # the hub's clients raise many kinds without a common base
        if "Invalid pretrained tag" in str(error):
            near = ", ".join(f"`{other}`" for other in near_timm_names(name))
            raise ConfigError(f"{error}. Known tags: {near}. Correct model.backbone.") from error
        if download:
            raise ConfigError(
                f"The published weights of backbone `{name}` cannot be fetched "
                f"({type(error).__name__}: {_first_line(error)}). {LOCAL_FILE_REPAIR}"
            ) from error
        raise ConfigError(
            f"timm cannot build backbone `{name}` with model.backbone_args {arguments!r}: "
            f"{type(error).__name__}: {_first_line(error)}. Correct model.backbone_args, or choose "
            "another backbone."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
