"""`classes.jsonl`: what is written is read back line by line, from a mapped file, in any process."""

import hashlib
import pickle
from multiprocessing import get_context
from pathlib import Path

import pytest

from gcahng.data.shards import class_list
from gcahng.data.shards.class_list import ClassInfo, ClassList, encode_classes, load_classes
from gcahng.data.shards.manifest import ClassesFile
from gcahng.errors import DataError

ODD_NAMES = ("wren \u00e9", 'a "quoted"\nline', "\u2028\u6f22", "\udce9 of no encoding", "")


def infos_of(count: int) -> list[ClassInfo]:
    return [
        ClassInfo(i, f"{i} {ODD_NAMES[i % 5]}", "train" if i % 3 else "test", i + 1, {"super": "bird"} if i % 2 else {})
        for i in range(count)
    ]


def write(path: Path, count: int) -> ClassesFile:
    content = encode_classes(infos_of(count))
    path.write_bytes(content)
    return ClassesFile(path.name, count, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 32, 100])
@pytest.mark.parametrize("block", [7, 64, 1 << 22])  # lines cross the blocks of the scan, or fill them exactly
def test_every_class_is_read_back(tmp_path: Path, count: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_list, "_BLOCK", block)
    file = write(tmp_path / "classes.jsonl", count)
    classes = load_classes(tmp_path / "classes.jsonl", file)
    expected = infos_of(count)
    assert len(classes) == count
    assert [classes[i] for i in range(count)] == expected
    assert list(classes) == expected
    assert [classes[i] for i in range(-count, 0)] == expected
    assert classes[3:40:7] == expected[3:40:7]
    for beyond in (count, -count - 1):
        with pytest.raises(IndexError, match=rf"class id {beyond} of {count} classes"):
            classes[beyond]


def test_a_last_line_without_its_end_is_a_class(tmp_path: Path) -> None:
    path = tmp_path / "classes.jsonl"
    write(path, 17)
    path.write_bytes(path.read_bytes()[:-1])
    classes = ClassList(path)
    assert len(classes) == 17 and classes[16] == infos_of(17)[16] and list(classes) == infos_of(17)


def test_lines_are_json_without_the_class_id(tmp_path: Path) -> None:
    line = encode_classes([ClassInfo(0, "wren", "train", 2, {"super": "bird"})])
    assert line == b'{"name": "wren", "split": "train", "num_samples": 2, "columns": {"super": "bird"}}\n'


def _last_name(classes: ClassList) -> str:
    return classes[-1].name


def test_pickles_as_its_path(tmp_path: Path) -> None:
    write(tmp_path / "classes.jsonl", 3000)
    classes = ClassList(tmp_path / "classes.jsonl")
    assert classes[2999].num_samples == 3000
    assert len(pickle.dumps(classes)) < 400
    again = pickle.loads(pickle.dumps(classes))
    assert len(again) == 3000 and again[1234] == classes[1234]
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(_last_name, (classes,)) == classes[2999].name


@pytest.mark.parametrize(
    "line",
    ["", "[]", '{"name": "a"}', '{"name": 1, "split": "s", "num_samples": 1, "columns": {}}', '{"name"', "[" * 3000],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    good = encode_classes(infos_of(1)).decode()
    (tmp_path / "c.jsonl").write_text(f"{good}{line}\n{good}")
    classes = ClassList(tmp_path / "c.jsonl")
    assert classes[0].num_samples == classes[2].num_samples == 1
    with pytest.raises(DataError, match=r"c\.jsonl: line 2 is damaged: expected \{name, split, .*Restore"):
        classes[1]
    with pytest.raises(DataError, match="line 2 is damaged"):
        list(classes)


def test_file_that_differs_from_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "classes.jsonl"
    file = write(path, 5)
    short = encode_classes(infos_of(4))
    path.write_bytes(short)
    signed = ClassesFile(file.name, 5, hashlib.sha256(short).hexdigest())
    with pytest.raises(DataError, match=r"classes\.jsonl differs from the manifest: expected 5 classes, got 4 lines"):
        load_classes(path, signed)
    with pytest.raises(DataError, match=rf"expected sha256 {file.sha256}, got [0-9a-f]{{64}}\. Restore"):
        load_classes(path, file)
    path.unlink()
    with pytest.raises(DataError, match=r"classes\.jsonl cannot be read \(No such file or directory\)"):
        load_classes(path, file)
