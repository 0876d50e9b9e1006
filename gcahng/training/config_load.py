"""From YAML files and `section.key=value` overrides to one checked `Config`.

Every layer (the base file, the file itself, the overrides) is flattened to leaves
`dotted key -> (value, source)`; later layers replace leaves of earlier ones. Free-form mappings
(`model.backbone_args`, `loss.args`) are leaves too: a later file replaces them whole, since the
arguments belong to the component named beside them; an override may set one entry of them.
"""

import dataclasses
import difflib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import yaml

from gcahng.errors import ConfigError
from gcahng.training.config_check import limit_fault, relation_faults
from gcahng.training.config_schema import Config
from gcahng.training.config_types import Mismatch, convert, show
from gcahng.training.config_yaml import parse_yaml, read_yaml

COMMAND_LINE = "command line"

log = logging.getLogger(__name__)

_MAX_FAULTS = 100  # that an error lists
_MAX_FAULT = 600  # characters of each; a configuration may be anybody's

RETIRED = {
    "eval.chunk_size": "the search takes `eval.memory_mb` of memory instead",
}
"""Settings of earlier versions: files that hold them still load (checkpoints do), without their value."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a configuration; nothing but the YAML files is opened.

    Args:
        path: YAML file. Its `base: other.yaml` (relative to the file) is read first, and so on.
        overrides: `section.key=value`, value in YAML, applied in order after the files.
    Returns:
        The configuration, every rule of `config_check` fulfilled.
    Raises:
        ConfigError: lists every fault of the files and overrides, each with its full dotted key and
            the file it came from.
    """
    layers = _Layers()
    _add_file(layers, Path(path))
    for override in overrides:
        _add_override(layers, override)
    return _build(layers, f"`{path}`")


def config_from_mapping(settings: Mapping[str, Any], source: str = "mapping") -> Config:
    """Check a nested mapping of settings, e.g. made in Python, and build its configuration.

    Args:
        settings: Sections and keys as in a YAML file.
        source: Name of the mapping in error messages.
    Raises:
        ConfigError: lists every fault.
    """
    layers = _Layers()
    _add_tree(layers, dict(settings), source)
    return _build(layers, f"`{source}`")


def check_config(config: Config) -> None:
    """Check a configuration that was made by its constructors.

    Raises:
        ConfigError: lists every fault.
    """
    config_from_mapping(dataclasses.asdict(config), "Config(...)")


def resolved_yaml(config: Config) -> str:
    """Write all settings, defaults included, as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


class _Leaf(NamedTuple):
    value: Any
    source: str


class _Layers:
    """The leaves so far and the faults found while they were gathered."""

    def __init__(self) -> None:
        self.leaves: dict[str, _Leaf] = {}
        self.faults: list[str] = []

    def add_fault(self, key: str, source: str | None, text: str) -> None:
        place = f"{key} ({source})" if source else key
        self.faults.append(f"{place}: {text}{'' if text.endswith('?') else '.'}")


def _add_file(layers: _Layers, path: Path, chain: tuple[Path, ...] = ()) -> None:
    """Add a file's base, then its own settings."""
    tree, faults = read_yaml(path)
    layers.faults.extend(faults)
    base = tree.pop("base", None)
    chain = (*chain, path.resolve())
    if isinstance(base, str):
        base_path = path.parent / base
        if base_path.resolve() in chain:
            layers.add_fault("base", str(path), f"`{base}` is based on this file itself")
        elif not base_path.is_file():
            layers.add_fault("base", str(path), f"no file `{base_path}` (relative to this file)")
        else:
            _add_file(layers, base_path, chain)
    elif base is not None:
        layers.add_fault("base", str(path), f"must be the name of one file: got {show(base)}")
    _add_tree(layers, tree, str(path))


def _add_tree(layers: _Layers, tree: Any, source: str, key: str = "") -> None:
    """Flatten a mapping under the section `key` into leaves; unknown keys become faults."""
    fields = _fields(_section_at(key))
    if tree is None:  # a section whose entries are all commented out
        return
    if not isinstance(tree, Mapping):
        names = ", ".join(fields)
        layers.add_fault(key, source, f"is a section with keys {names}: got {show(tree)}")
        return
    for name, value in tree.items():
        full = f"{key}.{name}" if key else str(name)
        if full in RETIRED and source != COMMAND_LINE:
            _warn_retired(full, source)
        elif full in RETIRED:
            layers.add_fault(full, source, f"no setting any more: {RETIRED[full]}. Leave it out")
        elif name not in fields:
            layers.add_fault(full, source, _unknown(str(name), key, list(fields)))
        elif dataclasses.is_dataclass(fields[name]):
            _add_tree(layers, value, source, full)
        else:
            layers.leaves[full] = _Leaf(value, source)


@functools.cache  # once for each file, however often it is read
def _warn_retired(key: str, source: str) -> None:
    log.warning("%s (%s) is no setting any more and is ignored: %s.", key, source, RETIRED[key])


def _add_override(layers: _Layers, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        layers.add_fault(override, COMMAND_LINE, "an override has the form section.key=value")
        return
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        layers.add_fault(key, COMMAND_LINE, f"{text!r} is no YAML value; quote it")
        return
    free = next((leaf for leaf in _free_form_keys() if key.startswith(f"{leaf}.")), None)
    if free is not None:
        earlier = layers.leaves[free].value if free in layers.leaves else {}
        entries = dict(earlier) if isinstance(earlier, Mapping) else {}
        entries[key.removeprefix(f"{free}.")] = value
        layers.leaves[free] = _Leaf(entries, COMMAND_LINE)
        return
    section, _, name = key.rpartition(".")
    try:
        _section_at(section)
    except KeyError:
        layers.add_fault(key, COMMAND_LINE, _unknown(key, "", []))
        return
    _add_tree(layers, {name: value}, COMMAND_LINE, section)


def _build(layers: _Layers, title: str) -> Config:
    values: dict[str, Any] = {}
    for key, expected, default in walk_settings():
        leaf = layers.leaves.get(key)
        if leaf is None:
            if default is MISSING:
                text = f"required and missing. Add it to the file, or pass {key}=VALUE"
                layers.add_fault(key, None, text)
            else:
                values[key] = default
            continue
        try:
            value = convert(leaf.value, expected)
        except Mismatch as mismatch:
            layers.add_fault(key, leaf.source, f"must be {mismatch}: got {show(leaf.value)}")
            continue
        fault = limit_fault(key, value)
        if fault is None:
            values[key] = value
        else:
            layers.add_fault(key, leaf.source, fault)
    for key, fault in relation_faults(values):
        sources = [leaf.source for name, leaf in layers.leaves.items() if f"{name}.".startswith(f"{key}.")]
        layers.add_fault(key, sources[-1] if sources else "default", fault)
    if layers.faults:
        count = len(layers.faults)
        listing = "\n".join(f"  {fault:.{_MAX_FAULT}}" for fault in layers.faults[:_MAX_FAULTS])
        raise ConfigError(f"Configuration {title} has {count} fault{'s' * (count > 1)}:\n{listing}")
    return _assemble(Config, values)


def _assemble(section: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    entries = {
        name: _assemble(expected, values, f"{prefix}{name}.")
        if dataclasses.is_dataclass(expected)
        else values[f"{prefix}{name}"]
        for name, expected in _fields(section).items()
    }
    return section(**entries)


def walk_settings(
    section: Any = Config, prefix: str = "", instance: object = MISSING
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, type, default) of every setting; a required one has `MISSING`.

    A section with a default of its own (`optim.graph`) hands that instance down, so that its leaves
    take their defaults from it and not from the class.
    """
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        if instance is not MISSING:
            default = getattr(instance, field.name)
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        else:
            default = field.default
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from walk_settings(hints[field.name], f"{key}.", default)
        else:
            yield key, hints[field.name], default


def _fields(section: Any) -> dict[str, Any]:
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _section_at(key: str) -> Any:
    """The dataclass of a dotted section name; KeyError if there is no such section."""
    section: Any = Config
    for name in key.split(".") if key else []:
        section = _fields(section)[name]
        if not dataclasses.is_dataclass(section):
            raise KeyError(key)
    return section


def _free_form_keys() -> list[str]:
    return [key for key, expected, _ in walk_settings() if get_origin(expected) is dict]


def _unknown(name: str, section: str, siblings: list[str]) -> str:
    """The fault of an unknown key, with the nearest name: a sibling first, else any setting."""
    prefix = f"{section}." if section else ""
    near = [f"{prefix}{other}" for other in difflib.get_close_matches(name, siblings, n=1)]
    if not near:
        every = [key for key, _, _ in walk_settings()]
        near = [key for key in every if key.rsplit(".")[-1] == name][:3]
        near = near or difflib.get_close_matches(f"{prefix}{name}", every, n=1)
    if near:
        return f"unknown key; did you mean {' or '.join(f'`{key}`' for key in near)}?"
    known = siblings or list(_fields(Config))
    return f"unknown key; known here: {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
