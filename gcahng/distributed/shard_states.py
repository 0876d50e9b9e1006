"""Whole tensors of sharded parts, and back: what checkpoints hold does not depend on W.

Rows travel over the CPUs' group, one rank after another, so that no device holds all of them.

Letters: N classes, n of them on this rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gcahng.data.ranks import rank_part
from gcahng.distributed.class_shards import ClassShard
from gcahng.errors import ConfigError

# Optimisers that treat every entry by itself: rows moved apart move as they would together.
_BY_ENTRY = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)


def is_sharded(module: nn.Module) -> bool:
    """Whether a part holds this rank's rows only."""
    return isinstance(module, ClassShard)


def check_by_entry(name: str, optimizer: Optimizer) -> None:
    """Refuse an optimiser that may look at more than one entry of a sharded part at a time.

    Args:
        name: Of the part.
        optimizer: Of the part.
    Raises:
        ConfigError: It is none of those known to move every entry by itself.
    """
    if type(optimizer) not in _BY_ENTRY:
        raise ConfigError(
            f"`distributed.shard_classes` cannot spread part `{name}` over ranks: its optimiser "
            f"{type(optimizer).__name__} may look at more than one entry at a time, so that a rank's rows would move "
            f"otherwise than all rows together. Use one of {', '.join(kind.__name__ for kind in _BY_ENTRY)}, or set "
            "shard_classes to false."
        )


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dictionary of a part as the replicated part has it; all ranks call it.

    Returns:
        On rank 0 (N, ...) tensors on the CPU for a sharded part; on other ranks nothing. Of another part each rank's
        own state dictionary.
    """
    state: dict[str, Tensor] = module.state_dict()
    if not isinstance(module, ClassShard):
        return state
    found = {name: _whole(rows, module) for name, rows in state.items()}
    return {name: values for name, values in found.items() if values is not None}


def whole_optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimiser's state dictionary as that of the replicated part; all ranks call it.

    Returns:
        On rank 0 all rows, on the CPU, for a sharded part; on other ranks nothing. Of another part each rank's own
        state dictionary.
    """
    state: dict[str, Any] = optimizer.state_dict()
    if not isinstance(module, ClassShard):
        return state
    parameters = _numbered(optimizer)
    found: dict[int, dict[str, Any]] = {}
    for number, entries in sorted(state["state"].items()):
        shape = parameters[number].shape
        # Sorted, as every rank must send the same ones in turn.
        found[number] = {
            key: _whole(value, module) if _has_rows(value, shape) else value for key, value in sorted(entries.items())
        }
    return {"state": found, "param_groups": state["param_groups"]} if module.ranks.first else {}


def load_whole_optimizer_state(module: nn.Module, optimizer: Optimizer, whole: Mapping[str, Any]) -> None:
    """Go on from what `whole_optimizer_state` gave on rank 0, whatever number of ranks and device gave it.

    Whether a sharded part's optimiser is fused stays as it is.
    """
    if not isinstance(module, ClassShard):
        optimizer.load_state_dict(dict(whole))
        return
    parameters = _numbered(optimizer)
    found = {}
    for number, entries in whole["state"].items():
        shape = torch.Size((module.num_classes, *parameters[number].shape[1:]))
        found[number] = {
            key: value[module.rows].clone() if _has_rows(value, shape) else value for key, value in entries.items()
        }
    groups = [
        saved | {key: own[key] for key in ("fused",) if key in own}
        for saved, own in zip(whole["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": found, "param_groups": groups})


def _numbered(optimizer: Optimizer) -> list[Tensor]:
    """Parameters by their numbers in the optimiser's state dictionary."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _has_rows(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _whole(rows: Tensor, shard: ClassShard) -> Tensor | None:
    """(N, ...) on rank 0's CPU from each rank's (n, ...); None on other ranks."""
    ranks = shard.ranks
    own = rows.detach().cpu().contiguous()
    if ranks.size == 1:
        return own
    if not ranks.first:
        dist.send(own, group=ranks.host_group, group_dst=0)
        return None
    whole = own.new_empty(shard.num_classes, *own.shape[1:])
    whole[shard.rows] = own
    for rank in range(1, ranks.size):
        dist.recv(whole[rank_part(shard.num_classes, rank, ranks.size)], group=ranks.host_group, group_src=rank)
    return whole
