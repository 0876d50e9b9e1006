"""The metric loss J_m that a configuration names."""

import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from gcahng.components import load_component
from gcahng.errors import ConfigError
from gcahng.losses import (
    HardNegativeLoss,
    NPairLoss,
    NPairPlusLoss,
    ProxyAnchorLoss,
    SelectivelyContrastiveLoss,
    SemiHardNegativeLoss,
)
from gcahng.training.config import LossConfig
from gcahng.training.mined_loss import build_mined_loss
from gcahng.training.pml_objects import Known, is_pml

_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "n_pair": NPairLoss,
    "n_pair_plus": NPairPlusLoss,
    "proxy_anchor": ProxyAnchorLoss,
    "hn": HardNegativeLoss,
    "shn": SemiHardNegativeLoss,
    "sct": SelectivelyContrastiveLoss,
}


def build_metric_loss(config: LossConfig, num_classes: int, embedding_dim: int) -> nn.Module:
    """The metric loss; N and D are passed to losses whose constructor asks for them by name.

    Raises:
        ConfigError: The loss or its miner refuses its arguments, a name or a dotted path does not load, or loss and
            miner do not go together.
    """
    if is_pml(config.metric) or config.miner is not None:
        own = partial(_build_own, config)
        return build_mined_loss(config, own, Known(num_classes, embedding_dim))
    return _build_own(config, Known(num_classes, embedding_dim))


def _build_own(config: LossConfig, given: Known) -> nn.Module:
    """A loss of this project, or the user's own by its dotted path."""
    factory = _LOSSES.get(config.metric) or load_component(config.metric)
    known = {"num_classes": given.num_classes, "embedding_dim": given.embedding_dim}
    try:
        wanted = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"`loss.metric` must name a class or a function: `{config.metric}` is no such ({error})."
        ) from error
    arguments = {name: value for name, value in known.items() if name in wanted} | config.args
    try:
        loss = factory(**arguments)
    except TypeError as error:
        raise ConfigError(f"`loss.args` do not fit loss.metric `{config.metric}`: {error}.") from error
    if not isinstance(loss, nn.Module):
        raise ConfigError(f"`loss.metric` must make a torch.nn.Module: `{config.metric}` made {type(loss).__name__}.")
    return loss
