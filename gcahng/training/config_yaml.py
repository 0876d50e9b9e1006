"""YAML as configurations use it: safe, without three of its traps.

PyYAML reads `1e-4` as text (YAML 1.1 wants `1.0e-4`) and lets the last of two equal keys win. Here
the first is a number and the second a fault. A few lines of aliases of aliases stand for more values than
a machine can hold: a file may say so many and no more.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gcahng.errors import ConfigError

MAX_BYTES = 1 << 18
"""Limit of a configuration file."""
_MAX_DEPTH = 100  # brackets in brackets
_MAX_DIGITS = 100
_MAX_NODES = 20_000  # values of a file, each counted as often as aliases repeat it


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with floats as YAML 1.2 and people write them, and with limits."""

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        """Looking ahead costs the square of the depth."""
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested too deeply: expected at most {_MAX_DEPTH} brackets")
        super().fetch_flow_collection_start(token_class)

    def construct_yaml_int(self, node: Any) -> int:
        """Python refuses to print what has more than some thousand digits."""
        if len(node.value) > _MAX_DIGITS:
            raise yaml.YAMLError(f"a number has more than {_MAX_DIGITS} digits")
        return int(super().construct_yaml_int(node))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Read one YAML value, e.g. the right side of an override; yaml.YAMLError if it is none."""
    return _load(text)[0]


def read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a configuration file.

    Returns:
        Its top-level mapping, and a fault for every repeated key.
    Raises:
        ConfigError: the file cannot be read, is no YAML, or holds no mapping.
    """
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"Configuration `{path}` is too large: expected at most {MAX_BYTES} bytes.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration `{path}` cannot be read: {error}. Give the path of a YAML file.") from error
    try:
        tree, repeated = _load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"Configuration `{path}`{place} is no valid YAML: {problem!s:.300}. Repair that line."
        ) from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"Configuration `{path}` must be a mapping of sections: got {type(tree).__name__}. "
            f"Start it with lines like `data:`."
        )
    faults = [f"{key} ({path}, line {line}): the key stands twice." for key, line in repeated]
    return tree, faults


def _load(text: str) -> tuple[Any, list[tuple[str, int]]]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        if _num_nodes(node, {}) > _MAX_NODES:
            raise yaml.YAMLError(f"it stands for more than {_MAX_NODES} values, aliases counted")
        return loader.construct_document(node), list(_repeated_keys(node))
    except yaml.YAMLError:
        raise
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply, or holds itself") from error
    # PyYAML lets out what Python says of a date like 2024-13-01, of `!!bool x`, `!!int ""` and others.
    except Exception as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error!s:.200}") from error
    finally:
        loader.dispose()


def _num_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for; RecursionError where one holds itself.

    Args:
        node: The tree, where aliases lead to the same node.
        known: Counts by the node's `id`.
    """
    if id(node) not in known:
        count = 1
        if isinstance(node, yaml.MappingNode):
            count += sum(_num_nodes(key, known) + _num_nodes(value, known) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            count += sum(_num_nodes(entry, known) for entry in node.value)
        known[id(node)] = count
    return known[id(node)]


def _repeated_keys(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield (dotted key, line) of every key that stands twice in its mapping."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in seen:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
        seen.add(key.value)
        yield from _repeated_keys(value, f"{prefix}{key.value}.")
