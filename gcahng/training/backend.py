"""How the step runs modules, sends gradients back and moves parameters: the seam to distribution and precision.

The step names its parts ("metric_model", "metric_loss", "graph", "classifier") and never touches an optimiser, a
scaler or a wrapper itself. This file holds the backend of one process; distributed ones offer the same methods.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gcahng.errors import ConfigError, TrainingError
from gcahng.training.optimizers import PassGate

Precision = Literal["fp32", "bf16", "fp16"]

# Parts that autocast leaves alone: losses are computed in float32.
FULL_PRECISION = ("metric_loss",)


class Backend(Protocol):
    """What the training step asks of its surroundings."""

    @property
    def matmul_dtype(self) -> torch.dtype | None:
        """Dtype of matrix products, None for the tensors' own."""

    def has(self, name: str) -> bool:
        """Whether the run has this part."""

    def module(self, name: str) -> nn.Module:
        """The part itself, without wrappers: for reading weights, not for forward."""

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a part on its arguments under the run's precision."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to the parameters."""

    def step(self, names: Sequence[str], reach: str) -> None:
        """Move the named parts' parameters that pass `reach` reached, then drop all their gradients."""


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
    ) -> None:
        """
        Args:
            modules: Parts by name, already on `device`.
            optimizers: By part name; a part without parameters has none.
            gates: The pass gate of each optimiser (see `gcahng.training.optimizers`).
            device: Where the parts are.
            precision: Of matrix products.
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
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None

    def has(self, name: str) -> bool:
        return name in self.modules

    def module(self, name: str) -> nn.Module:
        return self.modules[name]

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        enabled = self.matmul_dtype is not None and name not in FULL_PRECISION
        with torch.autocast(self.device.type, dtype=self.matmul_dtype, enabled=enabled):
            return self.modules[name](*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, names: Sequence[str], reach: str) -> None:
        present = [name for name in names if name in self.optimizers]
        if self.scaler is None:
            self._check_gradients(present, reach)
        for name in present:
            self.gates[name].active = reach
            if self.scaler is None:
                self.optimizers[name].step()
            else:
                self.scaler.unscale_(self.optimizers[name])
                self.scaler.step(self.optimizers[name])
        if self.scaler is not None:
            self.scaler.update()
        for name in present:
            self.optimizers[name].zero_grad(set_to_none=True)

    def _check_gradients(self, names: Sequence[str], reach: str) -> None:
        """Raise before any parameter moves, and drop the gradients, if one of them is not finite."""
        groups = {name: [g["params"] for g in self.optimizers[name].param_groups] for name in names}
        for name, parameter_groups in groups.items():
            gradients = [p.grad for group in parameter_groups for p in group if p.grad is not None]
            if not gradients:
                continue
            norms = torch.stack(torch._foreach_norm(gradients, ord=float("inf")))
            if not bool(torch.isfinite(norms).all()):
                for each in names:
                    self.optimizers[each].zero_grad(set_to_none=True)
                raise TrainingError(
                    f"Gradients of `{name}` are not finite in the {reach} pass; no parameter was moved. "
                    "Lower the learning rate, or train with precision fp32."
                )

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; optimisers and modules are saved by their own names."""
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
