"""What a checkpoint holds of the parts of a run: as one process has it, whatever ranks and backend trained them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gcahng.distributed.shard_states import (
    is_sharded,
    load_whole_optimizer_state,
    whole_optimizer_state,
    whole_state,
)
from gcahng.training import checkpoint
from gcahng.training.backend import Backend
from gcahng.training.parts import RunParts
from gcahng.training.sharded_parts import (
    joined,
    joined_optimizers,
    optimizer_of_saved,
    saved_with,
    schedule_of_saved,
)


def whole_states(
    parts: RunParts, backend: Backend
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Mapping[str, Any]]]:
    """States of the modules and of the optimisers by part; all ranks call it, and rank 0 gets them whole."""
    modules = {name: whole_state(module) for name, module in parts.modules.items()}
    optimizers = {
        name: whole_optimizer_state(parts.modules[name], optimizer)
        if is_sharded(parts.modules[name])
        else backend.optimizer_state(name)
        for name, optimizer in parts.optimizers.items()
    }
    return joined(modules), joined_optimizers(optimizers)


def read_optimizers(folder: Path, parts: RunParts) -> dict[str, dict[str, Any]]:
    """The optimisers' states of a checkpoint, by the parts of this run.

    Raises:
        DataError: One is missing, or holds other things than tensors and plain values.
    """
    found = {}
    for name, optimizer in parts.optimizers.items():
        saved = checkpoint.read_optimizer(folder, saved_with(name), like=optimizer)
        found[name] = optimizer_of_saved(name, parts.modules[name], saved)
    return found


def load_optimizers(states: Mapping[str, dict[str, Any]], parts: RunParts, backend: Backend) -> None:
    """Give the optimisers what `read_optimizers` found; all ranks call it."""
    for name, state in states.items():
        if is_sharded(parts.modules[name]):
            load_whole_optimizer_state(parts.modules[name], parts.optimizers[name], state)
        else:
            backend.load_optimizer_state(name, state)


def schedule_states(parts: RunParts) -> dict[str, Any]:
    """Where the learning rates stand, by part."""
    return {name: s.state_dict() for name, s in parts.schedules.items() if saved_with(name) == name}


def load_schedules(states: Mapping[str, Any], parts: RunParts) -> None:
    """Give the schedules what `schedule_states` gave."""
    for name, schedule in parts.schedules.items():
        schedule.load_state_dict(schedule_of_saved(name, states))
