"""What a checkpoint holds of the parts of a run: as one process has it, whatever ranks and backend trained them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gcahng.distributed import Ranks
from gcahng.distributed.agreement import agreed
from gcahng.distributed.shard_states import (
    is_sharded,
    load_whole_optimizer_state,
    whole_optimizer_state,
    whole_state,
)
from gcahng.errors import ConfigError
from gcahng.training import checkpoint
from gcahng.training.backend import Backend
from gcahng.training.optimizers import parameter_groups
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


def load_optimizers(folder: Path, parts: RunParts, backend: Backend, ranks: Ranks) -> None:
    """Give the optimisers the states of a checkpoint, one after the other; all ranks call it.

    Raises:
        DataError: One is missing, or holds other things than tensors and plain values.
        ConfigError: One belongs to other parameter groups.
    """
    for name in parts.optimizers:
        # Not all at once: of a sharded part each rank reads all rows, to keep its own.
        state = agreed(ranks, partial(_read_optimizer, folder, name, parts))
        if is_sharded(parts.modules[name]):
            load_whole_optimizer_state(parts.modules[name], parts.optimizers[name], state)
        else:
            backend.load_optimizer_state(name, state)


def _read_optimizer(folder: Path, name: str, parts: RunParts) -> dict[str, Any]:
    """A part's whole state."""
    module, optimizer = parts.modules[name], parts.optimizers[name]
    saved = checkpoint.read_optimizer(folder, saved_with(name), like=optimizer)
    state = optimizer_of_saved(name, module, saved)
    found = [(group.get("reach"), len(group["params"])) for group in state["param_groups"]]
    # Of the module: ZeRO has put others into the optimiser's groups. One of the user's own may make its groups anew.
    wanted = [(group["reach"], len(group["params"])) for group in parameter_groups(module)]
    keeps_groups = [group.get("reach") for group in optimizer.param_groups] == [reach for reach, _ in wanted]
    if keeps_groups and found != wanted:
        raise ConfigError(
            f"`train.resume`: the optimiser of `{name}` in {folder} has {_listed(found)}: expected {_listed(wanted)}. "
            "Another version of gcahng saved it. Go on with that one, or start a new run from its weights with "
            "train.init_from."
        )
    return state


def _listed(groups: list[tuple[str | None, int]]) -> str:
    """For instance "2 parameter groups (5 tensors after_warm_up, 4 both)"."""
    sizes = ", ".join(f"{count} tensors {reach}" for reach, count in groups)
    return f"{len(groups)} parameter group{'s' if len(groups) > 1 else ''} ({sizes})"


def schedule_states(parts: RunParts) -> dict[str, Any]:
    """Where the learning rates stand, by part."""
    return {name: s.state_dict() for name, s in parts.schedules.items() if saved_with(name) == name}


def load_schedules(states: Mapping[str, Any], parts: RunParts) -> None:
    """Give the schedules what `schedule_states` gave, as JSON brings it back."""
    for name, schedule in parts.schedules.items():
        state = dict(schedule_of_saved(name, states))
        # A setting, counted by numbers: in JSON their keys have become text, and no epoch would be one of them.
        state.pop("milestones", None)
        schedule.load_state_dict(state)
