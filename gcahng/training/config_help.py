"""The list of all settings with their meanings, taken from the schema's own documentation."""

import ast
import inspect
from dataclasses import MISSING
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gcahng.training import config_run, config_schema
from gcahng.training.config_load import walk_settings
from gcahng.training.config_types import show


def settings_help() -> str:
    """One paragraph per setting: key, type, default, meaning and unit; for `--help`."""
    lines = []
    for key, expected, default in walk_settings():
        start = "required" if default is MISSING else f"default {show(default)}"
        lines.append(f"{key}: {_type_name(expected)}, {start}\n    {setting_meaning(key)}")
    return "\n".join(lines)


def setting_meaning(key: str) -> str:
    """The documentation of one setting, e.g. of `batch.num_classes`; KeyError if there is none."""
    section: Any = config_schema.Config
    *sections, name = key.split(".")
    for part in sections:
        section = get_type_hints(section)[part]
    return _field_texts()[section.__name__][name]


@cache
def _field_texts() -> dict[str, dict[str, str]]:
    """The text under each field, by class and field: Python keeps it in the source only."""
    texts: dict[str, dict[str, str]] = {}
    sources = "\n".join(inspect.getsource(module) for module in (config_run, config_schema))
    for statement in ast.parse(sources).body:
        if not isinstance(statement, ast.ClassDef):
            continue
        fields = texts.setdefault(statement.name, {})
        for field, text in zip(statement.body, statement.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                fields[field.target.id] = str(text.value.value)
    return texts


def _type_name(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return " | ".join(get_args(expected))
    if isinstance(expected, type) and not get_args(expected):
        return expected.__name__
    return str(expected).replace("typing.", "")
