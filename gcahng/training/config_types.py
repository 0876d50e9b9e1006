"""Values read from YAML against the types of the settings: conversion, and how values are shown."""

import difflib
import types
from typing import Any, Literal, Union, get_args, get_origin


class Mismatch(Exception):
    """A value has the wrong type; the text says what was expected."""


def convert(value: Any, expected: Any) -> Any:
    """Bring a value read from YAML to the type of its field.

    Lists become tuples and whole numbers become floats where the field asks for them; nothing else
    is converted (a quoted number is text, `1` is no boolean).

    Raises:
        Mismatch: the value is no instance of the expected type.
    """
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [option for option in get_args(expected) if option is not types.NoneType]
        try:
            return convert(value, inner)
        except Mismatch as mismatch:
            raise Mismatch(f"{mismatch} or null") from None
    if origin is Literal:
        return _convert_choice(value, get_args(expected))
    if origin is tuple:
        return _convert_list(value, get_args(expected))
    if origin is dict:
        if not isinstance(value, dict) or not _is_plain(value):
            raise Mismatch("a mapping of names to plain YAML values")
        return dict(value)
    if expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    # `bool` is an `int` to Python, so types are compared exactly.
    if type(value) is not expected:
        raise Mismatch(_NAMES[expected])
    return value


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
# Words of earlier versions; the graph says the same (`gcahng.graph.backends`), but a configuration loads without torch.
_RENAMED = {"pairs": "eager"}


def _convert_choice(value: Any, choices: tuple[str, ...]) -> Any:
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.7)
    hint = f" (did you mean `{near[0]}`?)" if near else ""
    if isinstance(value, str) and _RENAMED.get(value) in choices:
        hint = f" (`{value}` is now called `{_RENAMED[value]}`)"
    raise Mismatch(f"one of {', '.join(choices)}{hint}")


def _convert_list(value: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
    any_length = items[-1] is Ellipsis
    count = "" if any_length else f"{len(items)} "
    wanted = Mismatch(f"a list of {count}{_PLURALS[items[0]]}")
    if not isinstance(value, (list, tuple)) or not (any_length or len(value) == len(items)):
        raise wanted
    try:
        return tuple(convert(entry, items[0]) for entry in value)
    except Mismatch:
        raise wanted from None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, (str, bool, int, float))


def show(value: Any) -> str:
    """Write a value as YAML does, so that `null`, `true` and lists look as the user typed them."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(show, value))}]"
    return repr(value)
