"""Optimisers and schedules of the parts, the pass gate, clipping by value."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LRScheduler,
    MultiStepLR,
    StepLR,
)

from gcahng.components import load_component
from gcahng.errors import ConfigError
from gcahng.graph import GraphNetwork
from gcahng.models import Embedder
from gcahng.training.config_schema import OptimizerConfig, ScheduleConfig

ALL_PASSES = "both"
# Parameters that every pass reaches, but for the warm-up.
AFTER_WARM_UP = "after_warm_up"


class PassGate:
    """Keeps parameters that a pass does not reach out of that pass's optimiser step.

    The graph network is stepped twice per iteration, and each pass reaches other parameters; in the warm-up none
    reaches the backbone. PyTorch leaves the others' gradients None, so that AdamW neither decays them nor moves their
    moments; a backend that fills missing gradients with zeros would. The gate makes it explicit: parameter groups carry
    the pass that reaches them (`reach`), and before each step the gradients of the other groups are set to None.
    """

    def __init__(self, optimizer: Optimizer, warming_up: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            optimizer: To attach to; a group without `reach` is open to all passes.
            warming_up: Whether the part is in its warm-up, asked at each step.
        """
        self.active = ALL_PASSES
        self.warming_up = warming_up
        optimizer.register_step_pre_hook(self._close)

    def is_open(self, reach: str) -> bool:
        """Whether parameters of this mark move in the active pass."""
        if reach == AFTER_WARM_UP:
            return not self.warming_up()
        return reach in (ALL_PASSES, self.active)

    def _close(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if not self.is_open(group.get("reach", ALL_PASSES)):
                for parameter in group["params"]:
                    parameter.grad = None


def clip_by_value(optimizer: Optimizer, bound: float) -> None:
    """Clamp every gradient entry to [-bound, bound] before each step of `optimizer`.

    A hook on the optimiser sees averaged gradients whole or in any partition, so it acts alike in every backend.
    """

    def clamp(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if gradients:
            torch._foreach_clamp_min_(gradients, -bound)
            torch._foreach_clamp_max_(gradients, bound)

    optimizer.register_step_pre_hook(clamp)


def obeys_gate(optimizer: Optimizer) -> bool:
    """Whether the optimiser moves nothing while its `found_inf` is 1, as torch's fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def start_momentum(optimizer: Optimizer) -> None:
    """Begin momentum at zero, before each step of a fused SGD, wherever there is none yet.

    The first step is then the gradient itself, as it should be. Left to itself the fused step keeps uninitialised
    memory as momentum when its first move is skipped, and fails when a parameter joins later (after a warm-up).
    """

    def fill(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if group["momentum"] and parameter.grad is not None:
                    state = optimizer.state[parameter]
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(parameter)

    optimizer.register_step_pre_hook(fill)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of a part, marked by the passes that reach them, in the order of its parameters."""
    if isinstance(module, GraphNetwork):
        groups = module.parameter_groups()
    elif isinstance(module, Embedder):
        groups = {AFTER_WARM_UP: list(module.backbone.parameters()), ALL_PASSES: list(module.head.parameters())}
    else:
        groups = {ALL_PASSES: list(module.parameters())}
    return [{"params": params, "reach": reach} for reach, params in groups.items() if params]


def build_optimizer(
    module: nn.Module, settings: OptimizerConfig, *, clip_value: float | None = None, fused: bool = False
) -> tuple[Optimizer, PassGate]:
    """The optimiser of a part, with its pass gate and clipping attached.

    Args:
        module: The part.
        settings: Of the optimiser.
        clip_value: Bound of gradient entries; None for none.
        fused: One kernel for all parameters, for "adamw" and "sgd": fast on CUDA, and what `DeferredChecks` of
            `gcahng.training.finite_checks` ask for. Other numbers by rounding alone.
    """
    optimizer = _make(settings, parameter_groups(module), fused)
    gate = PassGate(optimizer, lambda: module.warm_up) if isinstance(module, Embedder) else PassGate(optimizer)
    if fused and settings.name == "sgd":
        start_momentum(optimizer)
    if clip_value is not None:
        clip_by_value(optimizer, clip_value)
    return optimizer, gate


def _make(settings: OptimizerConfig, groups: Iterable[dict[str, Any]], fused: bool) -> Optimizer:
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if fused:
        common["fused"] = True  # else torch's own choice
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, **common)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, **common)
    return _make_own(settings, groups)


def _make_own(settings: OptimizerConfig, groups: Iterable[dict[str, Any]]) -> Optimizer:
    """The optimiser that a dotted path names; momentum goes to those that take it by name."""
    factory = load_component(settings.name)
    arguments: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    try:
        takes_momentum = "momentum" in inspect.signature(factory).parameters
        if takes_momentum:
            arguments["momentum"] = settings.momentum
        optimizer = factory(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"`optim.*.name` {settings.name} cannot be made from parameter groups and {', '.join(arguments)}: {error}. "
            "Name a torch optimiser whose constructor takes these."
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"`optim.*.name` must make a torch.optim.Optimizer: {settings.name} made {type(optimizer).__name__}."
        )
    if settings.momentum and not takes_momentum:
        raise ConfigError(
            f"`optim.*.momentum` is {settings.momentum}, but the constructor of {settings.name} has no `momentum`. "
            "Set it to 0, or name an optimiser that has one."
        )
    return optimizer


def build_schedule(optimizer: Optimizer, settings: ScheduleConfig, epochs: int) -> LRScheduler:
    """The learning-rate schedule, stepped once per epoch."""
    if settings.name == "step":
        return StepLR(optimizer, settings.step_size, settings.gamma)
    if settings.name == "milestones":
        return MultiStepLR(optimizer, list(settings.milestones), settings.gamma)
    if settings.name == "cosine":
        return CosineAnnealingLR(optimizer, epochs)
    return ConstantLR(optimizer, factor=1.0, total_iters=0)
