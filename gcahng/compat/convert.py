"""State dictionaries: the authors' into ours and back, the same tensors under other names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from gcahng.compat.names import PARTS, Naming, naming_of_names
from gcahng.errors import ConfigError

_LISTED = 10


@dataclass(frozen=True)
class ReleasedState:
    """A released state dictionary by our parts.

    Attributes:
        naming: How the file writes names.
        parts: Our names -> tensors for each of `metric_model`, `graph`, `classifier` that the file holds.
        unused: What the released code saves and never uses (`update_node`, classifiers of backbones), by its name
            in the file.
    """

    naming: Naming
    parts: Mapping[str, Mapping[str, Tensor]]
    unused: Mapping[str, Tensor]


def from_released(state: Mapping[str, Tensor]) -> ReleasedState:
    """Sort a released state dictionary by our parts and names; the tensors are those that came in.

    Raises:
        ConfigError: It is none, or holds entries that the released code does not have; the message lists them.
    """
    naming = naming_of_names(state)
    parts: dict[str, dict[str, Tensor]] = {}
    unused: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        try:
            place = naming.own_name(name)
        except KeyError:
            unknown.append(name)
            continue
        if place is None:
            unused[name] = tensor
        else:
            parts.setdefault(place[0], {})[place[1]] = tensor
    if unknown:
        raise ConfigError(
            f"The released file holds {len(unknown)} of {len(state)} entries that the authors' code does not have: "
            f"{listed(unknown)}. Save the model's state dictionary alone."
        )
    return ReleasedState(naming, {part: parts[part] for part in PARTS if part in parts}, unused)


def to_released(state: ReleasedState) -> dict[str, Tensor]:
    """The released state dictionary: exactly what `from_released` was given, or our parts under the authors' names.

    Raises:
        ConfigError: A part holds entries that the authors' code does not have; the message lists them.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for part, tensors in state.parts.items():
        for name, tensor in tensors.items():
            try:
                found[state.naming.released_name(part, name)] = tensor
            except KeyError:
                unknown.append(f"{part}.{name}")
    if unknown:
        raise ConfigError(
            f"{len(unknown)} entries have no name in the authors' code ({state.naming.kind}): {listed(unknown)}. "
            "Leave these parts out."
        )
    return found | dict(state.unused)


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
