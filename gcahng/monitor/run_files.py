"""Reads JSON and YAML of run folders, which may be anybody's: in bounded time and memory, and without torch."""

import json
import os
import stat
from pathlib import Path
from typing import Any, get_args, get_origin

_MAX_JSON_BYTES = 1 << 28
_MAX_YAML_BYTES = 1 << 18
_MAX_DEPTH = 100


def read_json(path: Path) -> Any:
    """The value in a file.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is too large or no JSON.
    """
    return parse_json(_content(path, _MAX_JSON_BYTES).decode())


def parse_json(text: str | bytes) -> Any:
    """A JSON value; ValueError if it is none, or nested without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """The value in a file, as configurations are written: without aliases, a few lines of which may stand for millions.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is too large, nested too deeply, has aliases, or is no YAML.
    """
    import yaml

    # The loader of `yaml.safe_load`, in C where there is one: folders may hold many runs. That one recurses on the
    # stack of C, which deep nesting would end without an exception: hence a look at the events first.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text, depth = _content(path, _MAX_YAML_BYTES).decode(), 0
    try:
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                raise ValueError("it is nested too deeply" if depth > _MAX_DEPTH else "it has aliases")
        return loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(type(error).__name__) from error


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated kind: numbers (of at most 64 bits), texts, lists, None, dictionaries."""
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(is_of(entry, get_args(kind)[1]) for entry in value.values())
    kinds = (object,) if kind is Any else (list,) if get_origin(kind) is list else get_args(kind) or (kind,)
    if isinstance(value, int):
        return abs(value) < 1 << 63 and any(each in kinds for each in (int, float, object))
    return isinstance(value, kinds)


def _content(path: Path, most: int) -> bytes:
    # Without waiting for whoever might write into a pipe.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is no regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content
