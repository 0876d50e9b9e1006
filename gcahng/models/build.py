"""Backbones by name: timm, torchvision's GoogLeNet, `small_conv`, own ones by dotted path."""

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from gcahng.components import is_component_path, load_component
from gcahng.errors import ConfigError
from gcahng.models.backbone import Backbone
from gcahng.models.embedder import Embedder
from gcahng.models.googlenet import GoogLeNetBackbone, download_googlenet
from gcahng.models.small_conv import SmallConv
from gcahng.models.timm_backbone import TimmBackbone, is_timm_name, near_timm_names
from gcahng.models.weights import LOCAL_FILE_REPAIR, load_weights

GOOGLENET, SMALL_CONV = "torchvision/googlenet", "small_conv"


def build_embedder(
    backbone: str,
    *,
    embedding_dim: int,
    pooling: str = "avg",
    head: str = "bn_linear",
    head_init: str = "default",
    backbone_args: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    weights: str | None = None,
    freeze_batch_norm: bool = False,
    freeze_patch_embed: bool = False,
) -> Embedder:
    """Build a metric model from plain values, named as in the section `model` of a configuration.

    Raises:
        ConfigError: see `build_backbone` and `Embedder`.
    """
    return Embedder(
        build_backbone(backbone, pretrained=pretrained, weights=weights, backbone_args=backbone_args),
        embedding_dim,
        pooling=pooling,
        head=head,
        head_init=head_init,
        freeze_batch_norm=freeze_batch_norm,
        freeze_patch_embed=freeze_patch_embed,
    )


def build_backbone(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    backbone_args: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build a backbone.

    Args:
        name: A timm name (`resnet50.tv_in1k`), `torchvision/googlenet`, `small_conv`, or the dotted
            path of a callable that returns a module with `num_features` (and, if it returns
            tokens, `num_prefix_tokens`), whose forward gives (B, C, h, w) or (B, T, C).
        pretrained: Start from the published weights, downloaded unless cached.
        weights: Local .safetensors, .pth or .pt file in place of the download.
        backbone_args: Keyword arguments of the backbone's builder.
    Raises:
        ConfigError: unknown name (with near ones) or argument; weights that cannot be fetched, read
            or matched.
    """
    check_backbone_name(name)
    arguments = dict(backbone_args or {})
    if name == GOOGLENET:
        backbone = _call(GoogLeNetBackbone, name, arguments)
        if pretrained and weights is None:
            backbone.weight_source = _load_published_googlenet(backbone.network)
    elif name == SMALL_CONV:
        network = _call(SmallConv, name, arguments)
        backbone = Backbone(network, network.num_features)
        _refuse_download(name, pretrained, weights)
    elif is_timm_name(name):
        return TimmBackbone(name, pretrained=pretrained, weights=weights, **arguments)
    else:
        backbone = _own_backbone(name, arguments)
        _refuse_download(name, pretrained, weights)
    if weights is not None:
        backbone.weight_source = load_weights(backbone.network, weights)
    return backbone


def check_backbone_name(name: str) -> None:
    """Refuse a name that `build_backbone` cannot build; nothing is built or loaded but an own backbone's module.

    Raises:
        ConfigError: The name is unknown (near ones are named), or its module cannot be imported.
    """
    if name in (GOOGLENET, SMALL_CONV):
        return
    if name.partition("/")[0] == "torchvision":
        raise ConfigError(
            f"Unknown backbone `{name}`: of torchvision's only `{GOOGLENET}` is offered. Take the "
            "others from timm, e.g. `resnet50.tv_in1k`."
        )
    if is_timm_name(name):
        return
    if not is_component_path(name) or (":" not in name and not _is_module(name.partition(".")[0])):
        near = near_timm_names(name, others=(GOOGLENET, SMALL_CONV))
        hint = f"Did you mean {' or '.join(f'`{other}`' for other in near)}? " if near else ""
        raise ConfigError(
            f"Unknown backbone `{name}`. {hint}Give a timm name, `{GOOGLENET}`, `{SMALL_CONV}`, or "
            "the dotted path of an own one, `package.module:Name`."
        )
    load_component(name)


def needs_no_trust(name: str, arguments: Mapping[str, Any]) -> bool:
    """Tell whether building a backbone runs the code of this library, timm and torchvision alone, and opens no file.

    So it is for their architectures with numbers as arguments: not for dotted paths, timm's `hf-hub:` and `local-dir:`,
    texts that may name files, or weights to download. Nothing is imported.
    """
    known = name in (GOOGLENET, SMALL_CONV) or (":" not in name and is_timm_name(name))
    return known and "pretrained" not in arguments and all(map(_is_plain, arguments.values()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float)


def _own_backbone(name: str, arguments: dict[str, Any]) -> Backbone:
    network = _call(load_component(name), name, arguments)
    width = getattr(network, "num_features", None)
    if not isinstance(network, nn.Module) or not isinstance(width, int):
        raise ConfigError(
            f"Backbone `{name}` must return a torch module with a whole number `num_features` (the "
            f"channels of its features): got {type(network).__name__} with num_features={width!r}."
        )
    if isinstance(network, Backbone):
        return network
    return Backbone(network, width, int(getattr(network, "num_prefix_tokens", 0)))


def _is_module(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _call(factory: Any, name: str, arguments: dict[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"Backbone `{name}` does not take model.backbone_args {arguments!r}: {error}. Remove "
            "or correct the argument."
        ) from error


def _refuse_download(name: str, pretrained: bool, weights: str | None) -> None:
    if pretrained and weights is None:
        raise ConfigError(
            f"Backbone `{name}` has no published weights. Set model.pretrained=false, or pass model.weights=FILE."
        )


def _load_published_googlenet(network: nn.Module) -> str:
    try:
        state = download_googlenet()
    except (OSError, RuntimeError) as error:  # no connection, no room, wrong checksum
        raise ConfigError(
            f"The published weights of backbone `{GOOGLENET}` cannot be fetched "
            f"({type(error).__name__}: {error}). {LOCAL_FILE_REPAIR}"
        ) from error
    return load_weights(network, state)
