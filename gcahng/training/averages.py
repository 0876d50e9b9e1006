"""Epoch averages of the losses that steer hardness and trust."""

from typing import Any

import torch
from torch import Tensor

from gcahng.generation.interpolation import FIRST_EPOCH_MEAN_LOSS, SMALLEST_MEAN_LOSS


class EpochAverages:
    """Means of the metric and the generation loss over the previous epoch (1e6 in the first one).

    Each value counts as at least 1e-6, as in the released code. Some losses go below 0: J_gen does where the diversity
    loss outweighs the rest of it, and its trust weight is 1 then.
    """

    def __init__(self) -> None:
        self.metric_loss = FIRST_EPOCH_MEAN_LOSS
        self.generation_loss = FIRST_EPOCH_MEAN_LOSS
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, metric_loss: Tensor, generation_loss: Tensor | None) -> None:
        """Count one step; losses stay on their device."""
        self._steps += 1
        self._accumulate("metric_loss", metric_loss)
        if generation_loss is not None:
            self._accumulate("generation_loss", generation_loss)

    def end_epoch(self) -> None:
        """Make this epoch's means the previous epoch's."""
        if self._steps:
            if "metric_loss" in self._sums:
                self.metric_loss = float(self._sums["metric_loss"]) / self._steps
            if "generation_loss" in self._sums:
                self.generation_loss = float(self._sums["generation_loss"]) / self._steps
        self._sums, self._steps = {}, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric_loss": self.metric_loss,
            "generation_loss": self.generation_loss,
            "sums": {name: float(value) for name, value in self._sums.items()},
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metric_loss = float(state["metric_loss"])
        self.generation_loss = float(state["generation_loss"])
        self._sums = {n: torch.tensor(v, dtype=torch.float64) for n, v in state["sums"].items()}
        self._steps = int(state["steps"])

    def _accumulate(self, name: str, value: Tensor) -> None:
        value = value.detach().double().clamp_min(SMALLEST_MEAN_LOSS)
        self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
