"""Objects of pytorch-metric-learning (PML) by name, built from plain YAML values.

`pml.NAME` stands for a public class of PML's packages of losses, miners, distances, reducers and regularizers. An
argument that is such a name, or a mapping with such a name as its only key, is an object too, with the mapping's value
as its arguments: `distance: {pml.LpDistance: {p: 1}}`. PML is imported here alone, and when a name is looked up.
"""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gcahng.errors import ConfigError

PREFIX = "pml."
LOSSES, MINERS = "losses", "miners"
# Where arguments are looked up, in this order; a test holds that no name is in two of them.
PACKAGES = (LOSSES, MINERS, "distances", "reducers", "regularizers")
_PML = "pytorch_metric_learning"
_INSTALL = "Install it: pip install 'gcahng[pml]'."
_WRAPPERS = ("DistributedLossWrapper", "DistributedMinerWrapper")
# What PML has and a training step has no use for, and why.
_UNFIT = {
    "EmbeddingsAlreadyPackagedAsTriplets": "takes rows 3 i to 3 i + 2 for a triplet, but a batch is group-major: these "
    "are samples of three classes. Use pml.BatchHardMiner or pml.TripletMarginMiner",
}


@dataclass(frozen=True)
class Known:
    """What constructors are given that ask for it and whose user gave none.

    Attributes:
        num_classes: N, training classes.
        embedding_dim: D.
    """

    num_classes: int
    embedding_dim: int

    def value(self, parameter: str) -> int | None:
        """The value for a constructor's parameter of this name; None for other names."""
        if parameter == "num_classes":
            return self.num_classes
        return self.embedding_dim if parameter in ("embedding_size", "descriptors_dim") else None


def is_pml(name: object) -> bool:
    """Tell whether a name is one of PML's (nothing is imported)."""
    return isinstance(name, str) and name.startswith(PREFIX)


def find_pml(name: str, packages: tuple[str, ...], key: str) -> type[nn.Module]:
    """The class that `pml.NAME` stands for.

    Args:
        name: With its prefix.
        packages: Those of PML that it may come from.
        key: Setting that names it, for errors.
    Raises:
        ConfigError: PML is not installed, or has no such class there.
    """
    plain = name.removeprefix(PREFIX)
    if plain in _WRAPPERS:
        raise ConfigError(
            f"`{key}`: {name} is not to be used: the batch is gathered from all ranks already, with gradients. Name "
            "the loss or the miner itself."
        )
    if plain in _UNFIT:
        raise ConfigError(f"`{key}`: {name} {_UNFIT[plain]}.")
    found = {n: kind for package in packages for n, kind in _classes(package, key).items()}
    if plain in found:
        return found[plain]
    elsewhere = [p for p in PACKAGES if p not in packages and plain in _classes(p, key)]
    near = difflib.get_close_matches(plain, found, n=3)
    if elsewhere:
        repair = f"It is one of its {elsewhere[0]}: name one of its {' or '.join(packages)}."
    elif near:
        repair = f"Did you mean {' or '.join(f'`{PREFIX}{n}`' for n in near)}?"
    else:
        repair = f"It has {', '.join(sorted(found))}."
    raise ConfigError(f"`{key}`: pytorch-metric-learning has no `{plain}` among its {', '.join(packages)}. {repair}")


def _classes(package: str, key: str) -> dict[str, type[nn.Module]]:
    """The classes of one of PML's packages that are meant for use."""
    try:
        module = importlib.import_module(f"{_PML}.{package}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`{key}` names an object of pytorch-metric-learning, which cannot be imported: no module `{error.name}`. "
            f"{_INSTALL}"
        ) from error
    return {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and not name.startswith(("Base", "_"))
    }


def build_pml(
    name: str, arguments: Mapping[str, Any], known: Known, *, packages: tuple[str, ...], key: str, args_key: str
) -> nn.Module:
    """Make the object `pml.NAME`.

    Args:
        name: With its prefix.
        arguments: Keyword arguments as YAML has them.
        known: Given to constructors that demand them.
        packages: Those of PML that the name may come from.
        key: Setting that names it.
        args_key: Setting that holds its arguments.
    Raises:
        ConfigError: There is no such object, or it refuses its arguments.
    """
    kind = find_pml(name, packages, key)
    parameters, demanded = _parameters(kind)
    for argument in arguments:
        if argument not in parameters:
            near = difflib.get_close_matches(argument, parameters, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(parameters) or 'none'}."
            raise ConfigError(f"`{args_key}`: {name} has no argument `{argument}`; {hint}")
    given = {n: _value(value, known, f"{args_key}.{n}") for n, value in arguments.items()}
    filled = {n: known.value(n) for n in demanded if n not in given and known.value(n) is not None}
    _check_num_classes(name, given, known, args_key)
    try:
        return kind(**filled, **given)
    except Exception as error:  # PML raises what it will: TypeError, ValueError, assertions, plain Exceptions
        text = str(error).rstrip(".")
        raise ConfigError(f"`{args_key}` do not fit {name}: {type(error).__name__}: {text}.") from error


def _check_num_classes(name: str, given: Mapping[str, Any], known: Known, args_key: str) -> None:
    count = given.get("num_classes")
    if isinstance(count, int) and count < known.num_classes:
        raise ConfigError(
            f"`{args_key}.num_classes` of {name} must be at least the number of training classes, "
            f"{known.num_classes}: got {count}. Leave it out: it is filled in."
        )


def _parameters(kind: type[nn.Module]) -> tuple[list[str], list[str]]:
    """Names that a constructor takes, and those of them without a default.

    PML's constructors hand what they do not know to the next class (`**kwargs`), as far as there is one.
    """
    names: dict[str, bool] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                names.setdefault(parameter.name, parameter.default is parameter.empty)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return list(names), [name for name, demanded in names.items() if demanded]


def _value(value: Any, known: Known, key: str) -> Any:
    """An argument: an object where the YAML value names one, entry by entry in lists and mappings."""
    if is_pml(value):
        value = {value: None}
    if isinstance(value, Mapping):
        if len(value) == 1 and is_pml(name := next(iter(value))):
            arguments = value[name] or {}
            if not isinstance(arguments, Mapping):
                raise ConfigError(f"`{key}`: the arguments of {name} must be a mapping: got {arguments!r}.")
            return build_pml(name, arguments, known, packages=PACKAGES, key=key, args_key=f"{key}.{name}")
        if any(map(is_pml, value)):
            listed = ", ".join(map(str, value))
            raise ConfigError(
                f"`{key}`: an object is a mapping with its name as the only key: got the keys {listed}. Indent its "
                "arguments below its name, and leave out other objects."
            )
        return {name: _value(entry, known, f"{key}.{name}") for name, entry in value.items()}
    if isinstance(value, list):
        return [_value(entry, known, f"{key}[{number}]") for number, entry in enumerate(value)]
    return value
