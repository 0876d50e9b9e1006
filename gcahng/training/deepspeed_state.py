"""Optimiser state under ZeRO-1 and 2: from every rank's partition to what one process's optimiser has, and back.

ZeRO lays the trained parameters of a group in one row, cut into one partition per rank; the optimiser of a rank holds
one flat tensor for each group, its partition, with flat state. Where a parameter's pieces lie is known to DeepSpeed's
mapping of the parameter. (Its `safe_get_full_optimizer_state` is of no use here: it looks once, after the first move
of the first group, and so never sees the state of groups that another pass moves first.)
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gcahng.distributed import Ranks
from gcahng.errors import ConfigError

# What this project uses of a ZeRO-1/2 optimiser and of a parameter's mapping besides documented methods.
OPTIMIZER_NEEDS = (
    "_coalesce_grad_reduction",
    "averaged_gradients",
    "bit16_groups",
    "optimizer",
    "refresh_fp32_params",
    "zero_grad",
)
MAPPING_NEEDS = ("get_hp_fragment_address", "lp_fragment_address")


@dataclass(frozen=True)
class Layout:
    """An optimiser's parameters as they were before ZeRO took them.

    Attributes:
        groups: All parameters of each group, in order.
        trained: Those of them that are trained and the same on all ranks: ZeRO moves them.
        own: Those that are trained and other rows on each rank: they stay in the optimiser as they are.
    """

    groups: tuple[tuple[nn.Parameter, ...], ...]
    trained: tuple[tuple[nn.Parameter, ...], ...]
    own: tuple[tuple[nn.Parameter, ...], ...]

    @staticmethod
    def of(optimizer: Optimizer, own: Collection[int]) -> "Layout":
        """The layout of an optimiser; `own`: ids of parameters of which each rank has other rows."""
        groups = tuple(tuple(group["params"]) for group in optimizer.param_groups)
        return Layout(
            groups,
            tuple(tuple(p for p in group if p.requires_grad and p.numel() and id(p) not in own) for group in groups),
            tuple(tuple(p for p in group if p.requires_grad and id(p) in own) for group in groups),
        )

    def numbers(self, group: int) -> dict[int, int]:
        """By id of a group's parameter its number in the state dict of one process."""
        before = sum(len(parameters) for parameters in self.groups[:group])
        return {id(parameter): before + place for place, parameter in enumerate(self.groups[group])}


def check_zero_optimizer(name: str, zero: Any, layout: Layout) -> None:
    """Whether a ZeRO-1/2 optimiser has what this project uses of it, group by group as before.

    Raises:
        ConfigError: This version of DeepSpeed is built otherwise.
    """
    missing = [need for need in OPTIMIZER_NEEDS if not hasattr(zero, need)]
    if not missing:
        mappings = [getattr(p, "_hp_mapping", "absent") for group in layout.trained for p in group]
        missing = [
            f"{need} of a parameter"
            for need in MAPPING_NEEDS
            if any(mapping is not None and not hasattr(mapping, need) for mapping in mappings)
        ]
    if missing:
        raise ConfigError(
            f"DeepSpeed's ZeRO optimiser of `{name}` lacks {', '.join(missing)}, which finite checks and checkpoints "
            "use. Use DeepSpeed 0.19.8, or DDP."
        )
    wanted = [[id(p) for p in group] for group in layout.trained]
    found = [[id(p) for p in group] for group in zero.bit16_groups]
    flat = [len(group["params"]) for group in zero.optimizer.param_groups]
    same = len(found) == len(wanted) and all(own == want or not want for own, want in zip(found, wanted, strict=True))
    if not same or flat != [1] * len(wanted):
        raise ConfigError(
            f"DeepSpeed's ZeRO optimiser of `{name}` has other parameter groups than the run's optimiser. Use "
            "DeepSpeed 0.19.8, or DDP."
        )


def gathered_state(optimizer: Optimizer, layout: Layout, ranks: Ranks) -> dict[str, Any]:
    """What `state_dict()` of one process's optimiser would be; every rank calls it.

    Args:
        optimizer: Each of its groups has this rank's flat partition, then the rank's own rows.
        layout: Of it before.
        ranks: All that hold partitions.
    """
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        numbers, parameters = layout.numbers(number), layout.trained[number]
        flat, *rows = group["params"]
        held = optimizer.state.get(flat, {}) if parameters else {}
        for key in sorted(held):
            value = held[key]
            if _is_partition(value, flat):
                values: Sequence[Any] = _whole(value, parameters, ranks)
            else:
                values = [value.clone() if isinstance(value, Tensor) else value for _ in parameters]
            for parameter, of_parameter in zip(parameters, values, strict=True):
                state.setdefault(numbers[id(parameter)], {})[key] = of_parameter
        state |= {numbers[id(row)]: dict(optimizer.state[row]) for row in rows if optimizer.state.get(row)}
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append(options | {"params": list(numbers.values())})
    return {"state": state, "param_groups": groups}


def load_gathered_state(name: str, optimizer: Optimizer, layout: Layout, state: Mapping[str, Any]) -> None:
    """Give an optimiser of flat partitions its part of what `gathered_state` or one process's optimiser gave.

    Args:
        name: Of the part, for messages.
        optimizer, layout: As in `gathered_state`.
        state: Of one process, whole.
    Raises:
        ConfigError: It has other groups or sizes, or one group's parameters were not all moved equally often.
    """
    sizes = [len(group["params"]) for group in state["param_groups"]]
    expected = [len(group) for group in layout.groups]
    if sizes != expected:
        raise ConfigError(
            f"The saved optimiser of `{name}` has {sizes} parameters in its groups: expected {expected}. Resume with "
            "the configuration that saved it, or use train.init_from."
        )
    here: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    count = 0
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, state["param_groups"], strict=True)):
        saved_numbers = dict(zip(layout.numbers(number), saved["params"], strict=True))
        flat, *rows = group["params"]
        whole = [state["state"].get(saved_numbers[id(p)]) for p in layout.trained[number]]
        if any(whole):
            here[count] = _flat(name, whole, flat, layout.trained[number])
        for place, row in enumerate(rows, count + 1):
            if state["state"].get(saved_numbers[id(row)]):
                here[place] = state["state"][saved_numbers[id(row)]]
        options = {key: value for key, value in saved.items() if key != "params"}
        groups.append(options | {"params": list(range(count, count + 1 + len(rows)))})
        count += 1 + len(rows)
    optimizer.load_state_dict({"state": here, "param_groups": groups})


def _flat(
    name: str, whole: Sequence[Mapping[str, Any] | None], flat: Tensor, parameters: Sequence[nn.Parameter]
) -> dict[str, Any]:
    """This rank's partition of a group's state; `whole`: the whole state of each of its parameters."""
    held = [state for state in whole if state]
    if len(held) < len(whole) or any(state.keys() != held[0].keys() for state in held):
        raise _uneven(name)
    found: dict[str, Any] = {}
    for key, value in held[0].items():
        values = [state[key] for state in held]
        shapes = [of_parameter.shape if isinstance(of_parameter, Tensor) else None for of_parameter in values]
        if key != "step" and shapes == [parameter.shape for parameter in parameters]:
            found[key] = _own_partition(values, flat, parameters)
        elif any(shape for shape in shapes):
            raise ConfigError(
                f"The saved optimiser of `{name}` has `{key}` of shapes {[tuple(shape or ()) for shape in shapes]}: "
                f"expected {[tuple(p.shape) for p in parameters]}. Resume with the configuration that saved it."
            )
        elif any(bool(other != value) for other in values):
            raise _uneven(name)
        else:
            found[key] = value
    return found


def _own_partition(values: Sequence[Tensor], flat: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """This rank's pieces of one tensor for each parameter, in the order of its partition; zero where it is padded."""
    partition = torch.zeros_like(flat, requires_grad=False)
    for parameter, value in zip(parameters, values, strict=True):
        piece = _piece(parameter)
        if piece is not None:
            start, offset, count = piece
            partition[offset : offset + count] = value.flatten()[start : start + count].to(partition)
    return partition


def _whole(value: Tensor, parameters: Sequence[nn.Parameter], ranks: Ranks) -> list[Tensor]:
    """One tensor for each parameter of a group, from all ranks' partitions; one collective."""
    sizes = [parameter.numel() for parameter in parameters]
    row = value.new_zeros(sum(sizes))
    for parameter, own in zip(parameters, row.split(sizes), strict=True):
        piece = _piece(parameter)
        if piece is not None:
            start, offset, count = piece
            own[start : start + count] = value[offset : offset + count]
    if ranks.size > 1:
        dist.all_reduce(row, group=ranks.group)
    return [part.view(parameter.shape).clone() for parameter, part in zip(parameters, row.split(sizes), strict=True)]


def _piece(parameter: nn.Parameter) -> tuple[int, int, int] | None:
    """Where this rank's piece of a parameter lies: its start in the parameter, in the partition, its entries."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    partition = mapping.get_hp_fragment_address()
    return mapping.lp_fragment_address.start, partition.start, partition.numel


def _is_partition(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == flat.shape


def _uneven(name: str) -> ConfigError:
    return ConfigError(
        f"In the saved optimiser of `{name}` some parameters of a group were moved more often than others: ZeRO keeps "
        "one count for a group. Resume with the backend that saved it, or use stage 0."
    )
