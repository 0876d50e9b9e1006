"""The class of a sample in a plain tar: an integer in `.cls`, or a field of `.json`."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gcahng.data.tars.samples import TarSample
from gcahng.errors import DataError

LABEL_FIELDS = ("class_name", "class", "label", "cls")
"""Fields of `.json` that are looked for, in this order, where none is named."""

_INTEGER = re.compile(rb"\s*(-?[0-9]{1,18})\s*")


class Label(NamedTuple):
    """A class as a tar spells it.

    Attributes:
        value: Number or name.
        kind: Where it stood and whether it is a number or a name, for messages; one tar set has one kind.
    """

    value: int | str
    kind: str


NO_LABEL = Label(0, "no label")
"""Of samples whose class is not looked for."""


def read_label(sample: TarSample, field: str | None, name: str) -> Label:
    """The class of a sample: `.cls`, or else the first of `LABEL_FIELDS` in `.json`.

    Args:
        sample: The sample.
        field: Field of `.json` to take instead of all that.
        name: What the error calls the sample.
    Raises:
        DataError: There is no label, or it is neither an integer nor a name.
    """
    if field is None and "cls" in sample.members:
        return _from_cls(sample.members["cls"], name)
    wanted = LABEL_FIELDS if field is None else (field,)
    if "json" not in sample.members:
        missing = "a .json member" if field is not None else "a .cls or .json member"
        raise DataError(
            f"{name} has no label: expected {missing}, got {', '.join('.' + e for e in sorted(sample.members))}. "
            "Write the class beside the image."
        )
    record = _record(sample.members["json"], name)
    for key in wanted:
        if key in record:
            return _from_field(key, record[key], name)
    raise DataError(
        f"{name} has no label: expected field {' or '.join(wanted)} in .json, got {sorted(record)[:20]}. Name the "
        "right one (--label-field)."
    )


def label_ids(values: Sequence[int | str]) -> tuple[NDArray[np.int64], list[str] | None]:
    """Numbers for the labels of all samples, which are of one kind.

    Args:
        values: Label of each sample.
    Returns:
        Class ids (n,): numbers as they are, names by their place in sorted order; and the names, None for numbers.
    """
    if not values or isinstance(values[0], int):
        return np.array(values, dtype=np.int64), None
    names = sorted({str(value) for value in values})
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[str(value)] for value in values], dtype=np.int64), names


def _from_cls(content: bytes, name: str) -> Label:
    match = _INTEGER.fullmatch(content)
    if match is None:
        raise DataError(
            f"{name} has no integer in .cls: got {content[:40]!r}. Write class numbers there, or names into a field "
            "of .json."
        )
    return Label(int(match[1]), "number in .cls")


def _from_field(key: str, value: object, name: str) -> Label:
    if isinstance(value, str) and value:
        return Label(value, f"name in field {key!r} of .json")
    if isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63:
        return Label(value, f"number in field {key!r} of .json")
    raise DataError(f"{name} has no class in field {key!r} of .json: expected a name or an integer, got {value!r:.80}.")


def _record(content: bytes, name: str) -> dict[str, object]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{name} has a damaged .json: expected an object, got {content[:80]!r}. Make the tar again.")
    return record
