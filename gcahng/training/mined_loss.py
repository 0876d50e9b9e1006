"""A loss of pytorch-metric-learning (PML), or one that takes its pairs from a miner, as the metric loss of a run.

It runs on the gathered global batch: what a miner chooses are rows of that. Every rank computes the same of the same
(torch's generators are alike there, so that miners that draw agree), hence PML's own wrappers for several processes
have no place here. What PML's objects remember beside parameters and buffers goes into checkpoints.

Letters: B samples of the global batch, D channels.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gcahng.components import is_component_path, load_component
from gcahng.errors import ConfigError, InputError
from gcahng.training.config_schema import LossConfig
from gcahng.training.pml_objects import LOSSES, MINERS, Known, build_pml, find_pml, is_pml

# What PML's classes keep from one batch to the next as plain attributes, by class name. A test holds, for all of the
# installed version, that nothing else is kept.
PLAIN_STATE = {"CrossBatchMemory": ("queue_idx", "has_been_filled"), "DynamicSoftMarginLoss": ("hist_",)}
# The batch that a loss is tried on when a run starts; smaller for fewer training classes, and for a smaller memory.
TRIAL_CLASSES, TRIAL_SAMPLES = 4, 3
_MEMORY = "CrossBatchMemory"


class MinedLoss(nn.Module):
    """A loss, and the miner that chooses its pairs or triplets.

    Its `forward` has neither `layout` nor `share`: the step hands it the whole batch on every rank.
    """

    def __init__(self, loss: nn.Module, miner: Callable[..., Any] | None = None, *, name: str = "") -> None:
        """
        Args:
            loss: Takes (embeddings, labels), with a miner also `indices_tuple`.
            miner: (embeddings, labels) -> (anchors, positives, negatives), or (anchors, positives, anchors, negatives).
            name: As a configuration has it, for messages.
        """
        super().__init__()
        self.loss = loss
        self.miner = miner
        self.name = name or type(loss).__name__

    @property
    def measured(self) -> dict[str, Tensor]:
        """What the loss says it has measured of the batch."""
        return dict(getattr(self.loss, "measured", {}))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            embeddings: (B, D) of the global batch.
            labels: (B,) int64 training labels.
        Returns:
            Scalar loss, float64 for float64 embeddings, else computed in float32.
        Raises:
            InputError: The loss returns something else than one number.
        """
        if embeddings.dtype != torch.float64:
            embeddings = embeddings.float()
        chosen = {}
        if self.miner is not None:
            with torch.no_grad():
                chosen["indices_tuple"] = self.miner(embeddings, labels)
        value = self.loss(embeddings, labels, **chosen)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"{self.name} must return one number for a batch: got {got}. Choose a reducer that sums up or averages."
            )
        for _, module, attribute in self._plain_state():
            if isinstance(kept := getattr(module, attribute), Tensor):
                # Else the next batch's gradients would lead back into this one.
                setattr(module, attribute, kept.detach())
        return value.reshape(())

    def _plain_state(self) -> Iterator[tuple[str, nn.Module, str]]:
        """(name in the state dictionary, who has it, its attribute) of what is neither parameter nor buffer."""
        for prefix, module in self.named_modules():
            for kind in type(module).__mro__:
                for attribute in PLAIN_STATE.get(kind.__name__, ()):
                    yield f"{prefix}.{attribute}", module, attribute

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, module, attribute in self._plain_state():
            destination[prefix + name] = torch.as_tensor(getattr(module, attribute)).detach().clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        _, strict, missing, *_ = rest
        for name, module, attribute in self._plain_state():
            saved = state_dict.pop(prefix + name, None)
            owner = prefix + name.removesuffix(attribute)
            # A position in a queue of which the rows are not there would be wrong: then all of it stays fresh.
            if any(owner + buffer not in state_dict for buffer, _ in module.named_buffers(recurse=False)):
                continue
            if saved is not None:
                now = getattr(module, attribute)
                setattr(module, attribute, saved.to(now) if isinstance(now, Tensor) else type(now)(saved.item()))
            elif strict:
                missing.append(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_loss_name(key: str, name: str | None) -> None:
    """Look up what `loss.metric` or `loss.miner` names; nothing is built.

    Raises:
        ConfigError: pytorch-metric-learning is not installed or has no such class, or a dotted path does not load.
    """
    if name is not None and is_pml(name):
        find_pml(name, (MINERS if key == "loss.miner" else LOSSES,), key)
    elif name is not None and is_component_path(name):
        load_component(name)


def build_mined_loss(config: LossConfig, make_own: Callable[[Known], nn.Module], known: Known) -> MinedLoss:
    """The loss of a configuration that names one of PML's, or a miner.

    Args:
        config: `loss.metric` is `pml.NAME`, or there is a miner.
        make_own: Makes a loss that is none of PML's.
        known: N and D.
    Raises:
        ConfigError: A name or an argument is wrong, or loss and miner fail on a small batch of random embeddings.
    """
    make = partial(_make, config, make_own)
    found = make(known)
    _check_forward(found, config)
    with torch.random.fork_rng(devices=[]):
        classes = min(TRIAL_CLASSES, known.num_classes)
        # Rows of a few classes cost nothing; a loss of one's own may have arguments for each of its classes.
        trial = Known(classes, known.embedding_dim) if is_pml(config.metric) else known
        _try(make(trial), classes, known.embedding_dim, config)
    return found


def _make(config: LossConfig, make_own: Callable[[Known], nn.Module], known: Known) -> MinedLoss:
    if is_pml(config.metric):
        loss = build_pml(config.metric, config.args, known, packages=(LOSSES,), key="loss.metric", args_key="loss.args")
    else:
        loss = make_own(known)
    name = config.metric if config.miner is None else f"{config.metric} with {config.miner}"
    return MinedLoss(loss, _make_miner(config, known), name=name)


def _make_miner(config: LossConfig, known: Known) -> Callable[..., Any] | None:
    if config.miner is None:
        return None
    if is_pml(config.miner):
        given = (config.miner, config.miner_args, known)
        return build_pml(*given, packages=(MINERS,), key="loss.miner", args_key="loss.miner_args")
    try:
        miner = load_component(config.miner)(**config.miner_args)
    except TypeError as error:
        raise ConfigError(f"`loss.miner_args` do not fit loss.miner `{config.miner}`: {error}.") from error
    if not callable(miner):
        raise ConfigError(
            f"`loss.miner` must make a function of (embeddings, labels): `{config.miner}` made {type(miner).__name__}."
        )
    return cast(Callable[..., Any], miner)


def _check_forward(found: MinedLoss, config: LossConfig) -> None:
    """Whether the loss takes what it will be given."""
    takes = inspect.signature(found.loss.forward).parameters
    if is_pml(config.metric) and "labels" not in takes:
        raise ConfigError(
            f"`loss.metric` {config.metric} compares ({', '.join(takes)}): expected a loss of (embeddings, labels). "
            "A batch has one view of each image. Name another loss."
        )
    if config.miner is None:
        return
    if "indices_tuple" not in takes:
        raise ConfigError(
            f"`loss.miner` {config.miner}: the loss {config.metric} takes ({', '.join(takes)}), expected an "
            "`indices_tuple` among them. Set loss.miner to null, or name another loss."
        )
    if _memories(found):
        # It would look up the batch's row numbers in its memory, where other rows stand.
        raise ConfigError(
            f"`loss.miner` {config.miner} chooses rows of the batch, but pml.CrossBatchMemory compares with its "
            f"memory: give it the miner as its argument, miner: {{{config.miner}: {{}}}}, and set loss.miner to null."
        )


def _memories(found: MinedLoss) -> list[Any]:
    """The memories of earlier batches in a loss."""
    return [m for m in found.loss.modules() if any(kind.__name__ == _MEMORY for kind in type(m).__mro__)]


def _try(loss: MinedLoss, classes: int, embedding_dim: int, config: LossConfig) -> None:
    """Train with a loss twice, so that what does not go together is found before a run begins."""
    rows = min([classes * TRIAL_SAMPLES, *(memory.memory_size for memory in _memories(loss))])
    classes = max(1, min(classes, rows // 2))
    samples = rows // classes
    z = torch.randn(classes * samples, embedding_dim, requires_grad=True)
    labels = torch.arange(classes).repeat(samples)
    miner = f" with loss.miner {config.miner}" if config.miner else ""
    try:
        for _ in range(2):  # some meet what they remember of the first batch
            loss(z, labels).backward()
    except Exception as error:  # whatever a loss or a miner of somebody else raises
        said = ": ".join(filter(None, (type(error).__name__, str(error).rstrip("."))))
        raise ConfigError(
            f"`loss.metric` {config.metric}{miner} cannot be used: on random embeddings of {classes} classes x "
            f"{samples} samples it raised {said}. Change loss.args or loss.miner, or name another loss."
        ) from error
