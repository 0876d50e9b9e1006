"""YAML as configurations use it: safe, without two of its traps.

PyYAML reads `1e-4` as text (YAML 1.1 wants `1.0e-4`) and lets the last of two equal keys win. Here
the first is a number and the second a fault.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gcahng.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with floats as YAML 1.2 and people write them."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration `{path}` cannot be read: {error}. Give the path of a YAML file.") from error
    try:
        tree, repeated = _load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"Configuration `{path}`{place} is no valid YAML: {problem}. Repair that line.") from error
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
        return loader.construct_document(node), list(_repeated_keys(node))
    except ValueError as error:  # PyYAML lets one out for a date like 2024-13-01
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


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
