"""How the step runs modules, sends gradients back and moves parameters: the seam to distribution and precision.

The step names its parts ("metric_model", "metric_loss", "graph", "classifier", "generator") and never touches an
optimiser, a scaler or a wrapper itself. This file holds the backend of one process; distributed ones offer the same
methods.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gcahng.distributed import ONE, Ranks
from gcahng.distributed.shard_states import load_whole_optimizer_state, whole_optimizer_state
from gcahng.errors import ConfigError
from gcahng.training.finite_checks import DeferredChecks, FiniteChecks, ImmediateChecks
from gcahng.training.optimizers import PassGate, obeys_gate

Precision = Literal["fp32", "bf16", "fp16"]

# Parts that autocast leaves alone: losses are computed in float32. The generator's is of the order of 1e4, beyond what
# gradients in float16 bear beside those of the other parts under one loss scale.
FULL_PRECISION = ("metric_loss", "generator")


class Backend(Protocol):
    """What the training step asks of its surroundings."""

    @property
    def matmul_dtype(self) -> torch.dtype | None:
        """Dtype of matrix products, None for the tensors' own."""

    @property
    def checks(self) -> FiniteChecks:
        """What keeps parameters from moving on numbers that are not finite."""

    def has(self, name: str) -> bool:
        """Whether the run has this part."""

    def module(self, name: str) -> nn.Module:
        """The part itself, without wrappers: for reading weights, not for forward."""

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a part on its arguments under the run's precision."""

    def run(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(part, *args, **kwargs)` as the forward pass of a part, under the run's precision.

        Whatever uses the part's parameters happens inside, and tensors come out, alone or in a dict: then wrappers
        that watch a forward pass for its parameters (DDP, DeepSpeed) see all of it.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to the parameters."""

    def step(self, names: Sequence[str], reach: str) -> None:
        """Move the named parts' parameters that pass `reach` reached, then drop all their gradients."""

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """The whole state of a part's optimiser, as one process without wrappers has it; all ranks call it.

        Of a part whose rows are spread over ranks it is on rank 0 alone, the others' is empty.
        """

    def load_optimizer_state(self, name: str, state: dict[str, Any]) -> None:
        """Go on from what `optimizer_state` gave, whatever backend and number of ranks gave it."""

    def state_dict(self) -> dict[str, Any]:
        """What else a checkpoint holds, beside modules and optimisers; the same on all ranks."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""

    def close(self) -> None:
        """Training has ended: let go of what would disturb the end of the process."""


class PlainBackend:
    """One process, no wrappers; fp32 weights, autocast for bf16 and fp16, a loss scaler for fp16."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        gates: Mapping[str, PassGate],
        *,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        deferred_checks: bool = False,
        ranks: Ranks = ONE,
    ) -> None:
        """
        Args:
            modules: Parts by name, already on `device`.
            optimizers: By part name; a part without parameters has none.
            gates: The pass gate of each optimiser (see `gcahng.training.optimizers`).
            device: Where the parts are.
            precision: Of matrix products.
            deferred_checks: Find numbers that are not finite without waiting for the device (`DeferredChecks`): for
                optimisers that are fused, and a caller that calls `checks.finish()` after the last step.
            ranks: All that must stop together, for the subclasses: this class alone is for one.
        Raises:
            ConfigError: fp16 without CUDA.
        """
        self.device = torch.device(device)
        if precision == "fp16" and self.device.type != "cuda":
            raise ConfigError(f"`train.precision` fp16 needs CUDA: the device is {self.device.type}. Use bf16 or fp32.")
        self.modules = dict(modules)
        self.optimizers = dict(optimizers)
        self.gates = dict(gates)
        self.matmul_dtype: torch.dtype | None = {
            "fp32": None,
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
        }[precision]
        self.ranks = ranks
        self.checks: FiniteChecks = DeferredChecks(self.device, ranks) if deferred_checks else ImmediateChecks(ranks)
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None

    def has(self, name: str) -> bool:
        return name in self.modules

    def module(self, name: str) -> nn.Module:
        return self.modules[name]

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.run(name, nn.Module.__call__, *args, **kwargs)

    def run(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.precision_of(name):
            return function(self.modules[name], *args, **kwargs)

    def precision_of(self, name: str) -> torch.autocast:
        """The context in which a part runs forward."""
        enabled = self.matmul_dtype is not None and name not in FULL_PRECISION
        return torch.autocast(self.device.type, dtype=self.matmul_dtype, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, names: Sequence[str], reach: str) -> None:
        present = {name: self.optimizers[name] for name in names if name in self.optimizers}
        try:
            self._check_gradients(present, reach)
            for name, optimizer in present.items():
                self.gates[name].active = reach
                self._move(optimizer)
        finally:
            for optimizer in present.values():
                optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()

    def _check_gradients(self, optimizers: Mapping[str, Optimizer], reach: str) -> None:
        """Before any parameter moves: raise, or close the gate, if a gradient is not finite."""
        checked: dict[str, Sequence[Tensor]] = {name: gradients_of(o) for name, o in optimizers.items()}
        if self.scaler is not None:
            # A loss scaler looks at gradients itself: those that overflow are its business, until no scale has helped.
            checked = {name: _beyond_help(self.scaler, gradients) for name, gradients in checked.items()}
        self.checks.gradients(checked, reach)
        if not all(obeys_gate(optimizer) for optimizer in optimizers.values()):
            self.checks.settle()

    def _move(self, optimizer: Optimizer) -> None:
        gate = self.checks.gate
        if self.scaler is not None:
            if gate is not None:
                spoil(gradients_of(optimizer), gate)
            self.scaler.unscale_(optimizer)
            self.scaler.step(optimizer)
        elif gate is not None and obeys_gate(optimizer):
            optimizer.found_inf = gate  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
        else:
            optimizer.step()

    def optimizer_state(self, name: str) -> dict[str, Any]:
        return whole_optimizer_state(self.modules[name], self.optimizers[name])

    def load_optimizer_state(self, name: str, state: dict[str, Any]) -> None:
        load_whole_optimizer_state(self.modules[name], self.optimizers[name], state)

    def close(self) -> None:
        """Nothing to let go of."""

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; optimisers and modules are saved by their own names."""
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that there are of an optimiser's parameters."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _beyond_help(scaler: torch.amp.GradScaler, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """What to check of gradients that a loss scaler checks: nothing but zero as long as the loss is scaled up."""
    scale = scaler._scale
    if not gradients or scale is None:
        return ()
    largest = torch.stack(torch._foreach_norm(list(gradients), ord=math.inf)).amax()
    return (torch.where(scale.to(largest.device) < 1, largest, 0.0),)


def spoil(gradients: Sequence[Tensor], gate: Tensor) -> None:
    """Make the smallest gradient NaN where the gate is closed: a loss scaler then skips the move."""
    if gradients:
        smallest = min(gradients, key=Tensor.numel)
        smallest.masked_fill_(gate.bool(), math.nan)


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    return [*module.named_parameters(), *module.named_buffers()]


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of which each rank has its own rows (of modules with `own_rows = True`), by name."""
    owners = [(prefix, m) for prefix, m in module.named_modules() if getattr(m, "own_rows", False)]
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, owner in owners
        for name, tensor in named_tensors(owner)
    }
