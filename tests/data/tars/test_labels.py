"""Labels of plain tars: where they may stand, and what is no label."""

import json

import numpy as np
import pytest

from gcahng.data.tars.labels import label_ids, read_label
from gcahng.data.tars.samples import TarSample
from gcahng.errors import DataError


def label(members: dict[str, bytes], field: str | None = None):
    return read_label(TarSample("k", 0, members), field, "Sample k")


@pytest.mark.parametrize(
    ("record", "field", "want"),
    [
        ({"class_name": "dog", "class": "x", "label": 1}, None, "dog"),
        ({"class": "dog", "label": 1, "cls": 2}, None, "dog"),
        ({"label": 1, "cls": 2}, None, 1),
        ({"cls": 2}, None, 2),
        ({"class_name": "dog", "super": "animal"}, "super", "animal"),
        ({"class_name": "dog", "class_id": -3}, "class_id", -3),
        ({"label": "ünï / 1"}, None, "ünï / 1"),
    ],
)
def test_a_field_of_json(record: dict, field: str | None, want: int | str) -> None:
    assert label({"jpg": b"", "json": json.dumps(record).encode()}, field).value == want


@pytest.mark.parametrize(("content", "want"), [(b"7", 7), (b" -12\n", -12), (b"007", 7)])
def test_cls(content: bytes, want: int) -> None:
    """It goes before .json, unless a field is named."""
    members = {"cls": content, "json": b'{"class_name": "dog"}'}
    assert label(members).value == want
    assert label(members, "class_name").value == "dog"


def test_kinds_tell_places_and_types_apart() -> None:
    kinds = [
        label({"cls": b"1"}).kind,
        label({"json": b'{"label": 1}'}).kind,
        label({"json": b'{"label": "1"}'}).kind,
        label({"json": b'{"class": "1"}'}).kind,
    ]
    assert kinds == [
        "number in .cls",
        "number in field 'label' of .json",
        "name in field 'label' of .json",
        "name in field 'class' of .json",
    ]


@pytest.mark.parametrize(
    ("members", "field", "message"),
    [
        ({"jpg": b""}, None, r"Sample k has no label: expected a \.cls or \.json member, got \.jpg\. Write"),
        ({"jpg": b"", "cls": b"1"}, "label", r"expected a \.json member, got \.cls, \.jpg"),
        ({"json": b'{"name": 1}'}, None, r"field class_name or class or label or cls in \.json, got \['name'\]"),
        ({"json": b'{"class_name": 1}'}, "species", r"expected field species in \.json, got \['class_name'\]\. Name"),
        ({"cls": b"dog"}, None, r"Sample k has no integer in \.cls: got b'dog'"),
        ({"cls": b""}, None, "no integer"),
        ({"cls": "１".encode()}, None, "no integer"),
        ({"cls": b"1" * 19}, None, "no integer"),
        (
            {"json": b'{"label": null}'},
            None,
            "no class in field 'label' of .json: expected a name or an int.*, got None",
        ),
        ({"json": b'{"label": 1.5}'}, None, "got 1.5"),
        ({"json": b'{"label": true}'}, None, "got True"),
        ({"json": b'{"label": ""}'}, None, "got ''"),
        ({"json": b'{"label": 9223372036854775808}'}, None, "got 9223372036854775808"),
        ({"json": b"[1]"}, None, r"has a damaged \.json: expected an object, got b'\[1\]'"),
        ({"json": b"\xff\xfe{"}, None, "damaged"),
        ({"json": b"[" * 100_000}, None, "damaged"),
    ],
)
def test_what_is_no_label(members: dict[str, bytes], field: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        label(members, field)


def test_names_are_numbered_in_sorted_order() -> None:
    ids, names = label_ids(["b", "a", "ä", "b", "B"])
    assert names == ["B", "a", "b", "ä"] and ids.dtype == np.int64 and ids.tolist() == [2, 1, 3, 2, 0]


def test_numbers_stay() -> None:
    ids, names = label_ids([7, -1, 7])
    assert names is None and ids.dtype == np.int64 and ids.tolist() == [7, -1, 7]
    assert label_ids([])[0].tolist() == []
