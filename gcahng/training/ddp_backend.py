"""The backend of several ranks that each hold all parameters: DDP, prepared by Accelerate.

What the step runs of a part is one forward pass of a small module around it, so that DDP sees every use of the part's
parameters, whatever function of the part it is. Each part has a DDP wrapper of its own; one backward pass may go
through several. Gradients are averaged over ranks, once, during that pass (the gradient rule: `gcahng.distributed`), so
that optimisers, clipping and the pass gate do what they do in one process.

Not averaged: what modules with `own_rows = True` hold (class shards; a part, or within one): each rank has other rows,
and the module has done the division itself. Buffers are rank 0's at the start and each rank's own from then on.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gcahng.training.backend import PlainBackend, Precision, gradients_of, spoil
from gcahng.training.launched import Launched
from gcahng.training.optimizers import PassGate

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        own = {name: _own_tensors(module) for name, module in self.modules.items()}
        self._with_own_rows = [self.optimizers[name] for name in self.optimizers if own[name]]
        self._wrapped = {
            name: _wrapped(module, own[name], accelerator)
            for name, module in self.modules.items()
            if _averaged(module, own[name])
        }
        for name, module in self.modules.items():
            # DDP sends the parameters of what it wraps.
            for key, tensor in module.named_buffers() if name in self._wrapped else _tensors(module):
                if key not in own[name]:
                    dist.broadcast(tensor.detach(), 0, group=self.ranks.group)

    def run(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wrapper = self._wrapped.get(name)
        if wrapper is None:
            return super().run(name, function, *args, **kwargs)
        with self.precision_of(name):
            # All in one object, for DDP looks through the arguments for tensors to move.
            return wrapper(lambda part: function(part, *args, **kwargs))

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


class _Part(nn.Module):
    """A part whose forward pass is any function of it.

    It adds a parameter that no pass reaches: DDP prints a warning when it looks for one and finds none.
    """

    def __init__(self, part: nn.Module, like: nn.Parameter) -> None:
        super().__init__()
        self.part = part
        self.unreached = nn.Parameter(like.new_zeros(()))

    def forward(self, call: Callable[[nn.Module], Any]) -> Any:
        return call(self.part)


def _averaged(module: nn.Module, own: set[str]) -> list[nn.Parameter]:
    """The parameters whose gradients are averaged over ranks."""
    return [p for name, p in module.named_parameters() if p.requires_grad and name not in own]


def _wrapped(module: nn.Module, own: set[str], accelerator: "Accelerator") -> nn.Module:
    """A part under DDP.

    Unused parameters are looked for: each pass through the graph reaches others, a warm-up leaves the backbone out, and
    an own backbone may hold some that nothing uses. Their gradients stay None, for which DDP waits for the device at
    the end of a backward pass. Buffers are none of DDP's business: at each forward pass it would overwrite them with
    rank 0's.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    part = _Part(module, _averaged(module, own)[0])
    ignored = [f"part.{name}" for name in own] + [name for name, _ in part.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(part, ignored)
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    wrapped: nn.Module = accelerator.prepare_model(part, device_placement=False)
    return wrapped


def _own_tensors(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers of which each rank has its own rows."""
    owners = [(prefix, m) for prefix, m in module.named_modules() if getattr(m, "own_rows", False)]
    return {f"{prefix}.{name}" if prefix else name for prefix, owner in owners for name, _ in _tensors(owner)}


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
