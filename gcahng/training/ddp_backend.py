"""The backend of several ranks that each hold all parameters: DDP, prepared by Accelerate.

What the step runs of a part is one forward pass of a small module around it, so that DDP sees every use of the part's
parameters, whatever function of the part it is. Each part has a DDP wrapper of its own; one backward pass may go
through several. Gradients are averaged over ranks, once, during that pass (the gradient rule: `gcahng.distributed`), so
that optimisers, clipping and the pass gate do what they do in one process.

A parameter that a pass does not reach must not hold up the others. To look for such parameters DDP follows the graph of
every forward pass, and where there are some the host waits for the device at the end of the backward pass. So it looks
no longer than it has to (`_Search`).

Not averaged: what modules with `own_rows = True` hold (class shards; a part, or within one): each rank has other rows,
and the module has done the division itself. Buffers are rank 0's at the start and each rank's own from then on.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gcahng.errors import InputError
from gcahng.generation.generator import FeatureGenerator
from gcahng.graph import GraphNetwork
from gcahng.losses import ProxyAnchorLoss
from gcahng.models import Embedder
from gcahng.training.backend import PlainBackend, Precision, gradients_of, named_tensors, own_tensors, spoil
from gcahng.training.launched import Launched
from gcahng.training.optimizers import PassGate

if TYPE_CHECKING:
    from accelerate import Accelerator

# Every pass through such a part reaches all its parameters; subclasses may do otherwise.
_REACHED_WHOLE = (nn.Linear, ProxyAnchorLoss, FeatureGenerator)


class _Search(Enum):
    """What DDP does about parameters of a part that a pass does not reach."""

    EACH_PASS = auto()
    """DDP looks for them; their gradients stay None. A warm-up leaves the backbone out, an own backbone may hold some
    that nothing uses, an own loss may use some in some batches only."""
    NONE = auto()
    """There are none, of a classifier, a generator, proxies, and of an `Embedder` once a pass has reached all of it."""
    ZERO = auto()
    """They have gradients of zero, which the pass gate takes away: each pass through the graph network reaches others,
    and its parameter groups say which."""


class DistributedBackend(PlainBackend):
    """Several ranks with DDP: fp32 weights, autocast for bf16 and fp16, a loss scaler for fp16."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        gates: Mapping[str, PassGate],
        *,
        launched: Launched,
        precision: Precision = "fp32",
        deferred_checks: bool = False,
    ) -> None:
        """Wrap the parts: rank 0's weights and buffers become every rank's; all ranks call it.

        Args:
            modules: Parts by name, already on `launched.device`. Which parameters require gradients is settled here.
            optimizers: By part name; a part without parameters has none.
            gates: The pass gate of each optimiser.
            launched: Several ranks, with the accelerator.
            precision: Of matrix products.
            deferred_checks: As for `PlainBackend`.
        Raises:
            ConfigError: fp16 without CUDA.
        """
        super().__init__(
            modules,
            optimizers,
            gates,
            device=launched.device,
            precision=precision,
            deferred_checks=deferred_checks,
            ranks=launched.ranks,
        )
        accelerator = launched.accelerator
        assert accelerator is not None
        self._accelerator = accelerator
        own = {name: set(own_tensors(module)) for name, module in self.modules.items()}
        self._own = own
        self._with_own_rows = [self.optimizers[name] for name in self.optimizers if own[name]]
        averaged = {name: _averaged(module, own[name]) for name, module in self.modules.items()}
        self._averaged = {name: parameters for name, parameters in averaged.items() if parameters}
        self._search = {name: _search(self.modules[name], self.optimizers.get(name)) for name in self._averaged}
        self._wrapped = {
            name: _wrapped(self.modules[name], own[name], accelerator, search) for name, search in self._search.items()
        }
        for name, module in self.modules.items():
            # DDP sends the parameters of what it wraps.
            for key, tensor in module.named_buffers() if name in self._wrapped else named_tensors(module):
                if key not in own[name]:
                    dist.broadcast(tensor.detach(), 0, group=self.ranks.group)

    def run(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wrapper = self._wrapped.get(name)
        if wrapper is None:
            return super().run(name, function, *args, **kwargs)
        with self.precision_of(name):
            # All in one object, for DDP looks through the arguments for tensors to move.
            return wrapper(lambda part: function(part, *args, **kwargs))

    def step(self, names: Sequence[str], reach: str) -> None:
        """As in one process.

        Raises:
            InputError: A pass left out parameters that ranks were sure of (`_Search.NONE`); nothing has moved.
        """
        for name in names:
            search = self._search.get(name)
            if search is _Search.NONE or (search is _Search.EACH_PASS and isinstance(self.modules[name], Embedder)):
                self._look_at_reached(name, reach)
        super().step(names, reach)

    def _look_at_reached(self, name: str, reach: str) -> None:
        """End the search in a part of which a pass has reached all; raise if a later one does not."""
        missed = [key for key, parameter in self._averaged[name].items() if parameter.grad is None]
        if self._search[name] is _Search.EACH_PASS and not missed:
            # None are the gradients that no rank has: all ranks come here in the same step.
            del self._wrapped[name]
            self._accelerator.free_memory()  # its buckets are as large as the new ones
            self._search[name] = _Search.NONE
            self._wrapped[name] = _wrapped(self.modules[name], self._own[name], self._accelerator, _Search.NONE)
        elif self._search[name] is _Search.NONE and missed:
            raise InputError(
                f"{len(missed)} parameters of `{name}` have no gradient in this {reach} pass, the first being "
                f"`{missed[0]}`: expected one of each, as before, which several ranks then average; no parameter was "
                "moved. Switch off what leaves whole layers out by chance, or train on one rank."
            )

    def close(self) -> None:
        """Let the wrappers go before their process group does."""
        self._wrapped.clear()
        self._accelerator.free_memory()

    def _move(self, optimizer: Optimizer) -> None:
        gradients = gradients_of(optimizer)
        if self.scaler is not None and gradients and optimizer in self._with_own_rows:
            # The other gradients are the same on all ranks; an overflow in one rank's rows must skip the move on all.
            bad = torch.stack([~torch.isfinite(g).all() for g in gradients]).any()
            spoil(gradients, self.ranks.sum(bad.float()))
        super()._move(optimizer)


def _search(module: nn.Module, optimizer: Optimizer | None) -> _Search:
    """What a part begins with."""
    if isinstance(module, GraphNetwork) and optimizer is not None and "reach" in optimizer.param_groups[0]:
        return _Search.ZERO
    return _Search.NONE if type(module) in _REACHED_WHOLE else _Search.EACH_PASS


class _Part(nn.Module):
    """A part whose forward pass is any function of it, from tensors to a tensor or a dict of tensors."""

    def __init__(self, part: nn.Module, averaged: Sequence[nn.Parameter], search: _Search) -> None:
        super().__init__()
        self.part = part
        self.tied = list(averaged) if search is _Search.ZERO else []
        if search is _Search.EACH_PASS:
            # No pass reaches it: DDP prints a warning when it looks for such a parameter and finds none.
            self.unreached = nn.Parameter(averaged[0].new_zeros(()))

    def forward(self, call: Callable[[nn.Module], Any]) -> Any:
        found = call(self.part)
        return _tied(found, self.tied) if self.tied else found


class _Tie(torch.autograd.Function):
    """Tensors as they are, in a graph with all given parameters; those have no gradient from here.

    To DDP a parameter that nothing but this reaches is one with a gradient of zero.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        # What no loss is made of stays without gradient.
        ctx.set_materialize_grads(False)
        ctx.parameters = len(tensors) - count
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients, *[None] * ctx.parameters


def _tied(found: dict[str, Tensor], parameters: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    trained = {name: tensor for name, tensor in found.items() if tensor.requires_grad}
    if not trained:
        return found
    tied = _Tie.apply(len(trained), *trained.values(), *parameters)
    return found | dict(zip(trained, tied, strict=True))


def _averaged(module: nn.Module, own: set[str]) -> dict[str, nn.Parameter]:
    """The parameters whose gradients are averaged over ranks, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad and name not in own}


def _wrapped(module: nn.Module, own: set[str], accelerator: "Accelerator", search: _Search) -> nn.Module:
    """A part under DDP; all ranks call it.

    Buffers are none of DDP's business: at each forward pass it would overwrite them with rank 0's.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    part = _Part(module, list(_averaged(module, own).values()), search)
    ignored = [f"part.{name}" for name in own] + [name for name, _ in part.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(part, ignored)
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=search is _Search.EACH_PASS)
    wrapped: nn.Module = accelerator.prepare_model(part, device_placement=False)
    return wrapped
