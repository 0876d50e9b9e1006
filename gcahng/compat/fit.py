"""Whether released tensors fit our modules, and what a released file says of its model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gcahng.compat.convert import ReleasedState, listed
from gcahng.compat.names import GCA_HNG, METRIC_MODEL, SCT
from gcahng.errors import ConfigError
from gcahng.training.config_schema import ModelConfig

# What an entry of a backbone says of its architecture.
_SIGNS = {"layer1.0.": "a ResNet", "inception3a.": "GoogLeNet", "blocks.0.attn.": "a vision transformer"}
# What the authors' code computes and no weight shows, by its own words for a backbone.
_POOLING = {
    (GCA_HNG, "a ResNet"): "avg+max",
    (GCA_HNG, "GoogLeNet"): "avg",
    (GCA_HNG, "a vision transformer"): "cls",
    (SCT, "a ResNet"): "avg",
    (SCT, "GoogLeNet"): "avg",
}


def check_fit(state: ReleasedState, part: str, own: Mapping[str, Tensor]) -> None:
    """Refuse a part whose entries are not exactly those of our module: names, shapes and dtypes.

    Args:
        state: Of the file; it holds the part.
        part: One of `names.PARTS`.
        own: Our module's state dictionary.
    Raises:
        ConfigError: They differ; the message lists the entries by the file's names.
    """
    got = state.parts[part]

    def theirs(name: str) -> str:
        try:
            return state.naming.released_name(part, name)
        except KeyError:
            return f"{part}.{name} (of ours)"

    both = [name for name in own if name in got]
    kinds = {
        "missing in the file": [theirs(name) for name in own if name not in got],
        "not in the model": [theirs(name) for name in got if name not in own],
        "of another shape": [
            f"{theirs(name)} {tuple(got[name].shape)}, the model's {tuple(own[name].shape)}"
            for name in both
            if got[name].shape != own[name].shape
        ],
        "of another dtype": [
            f"{theirs(name)} {got[name].dtype}, the model's {own[name].dtype}"
            for name in both
            if got[name].dtype != own[name].dtype
        ],
    }
    faults = [f"  {len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if faults:
        lines = "\n".join(faults)
        raise ConfigError(
            f"The released file does not fit part `{part}` of the configuration, expected {len(own)} entries, got "
            f"{len(got)}:\n{lines}\nThe file holds {described(state)}. Give the configuration of that model "
            "(--config, model.backbone, model.embedding_dim)."
        )


def described(state: ReleasedState) -> str:
    """A file's metric model in words."""
    tensors = state.parts[METRIC_MODEL]
    backbone = architecture(state) or "a backbone of an unknown kind"
    linear = tensors.get("head.linear.weight")
    if linear is None or linear.ndim != 2:
        return f"{backbone} without the head's Linear"
    norm = "BatchNorm and " if "head.norm.weight" in tensors else ""
    return f"{backbone} with {norm}Linear from {linear.shape[1]} features to {linear.shape[0]} channels"


def architecture(state: ReleasedState) -> str | None:
    """The kind of the file's backbone, by its entries; None for an unknown one."""
    names = [name.removeprefix("backbone.network.") for name in state.parts[METRIC_MODEL]]
    return next((kind for sign, kind in _SIGNS.items() if any(name.startswith(sign) for name in names)), None)


def unlike_released(state: ReleasedState, model: ModelConfig) -> list[str]:
    """Settings that no weight shows and that the authors' code has otherwise, one line each."""
    kind, backbone = state.naming.kind, architecture(state)
    lines = []
    pooling = _POOLING.get((kind, backbone or ""))
    if pooling is not None and model.pooling != pooling:
        lines.append(f"model.pooling is {model.pooling}, the authors' code computes {pooling}")
    if backbone == "GoogLeNet":
        # GCA-HNG's GoogLeNet transforms its input as torchvision does for published weights, SCT's does not.
        given: Any = model.backbone_args.get("transform_input", True)
        if given is not (kind == GCA_HNG):
            lines.append(
                f"model.backbone_args.transform_input is {given}, the authors' code computes {kind == GCA_HNG}"
            )
    return lines
