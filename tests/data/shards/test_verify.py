"""`shards.verify`: a whole folder has no fault; whatever is damaged, the file and the place are named."""

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from shard_cases import edit_manifest, flip, samples_of, write_shards

from gcahng.data.shards import tar_parts
from gcahng.data.shards.class_list import ClassInfo, ClassList, encode_classes
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.verify import VerifyReport, verify
from gcahng.data.shards.verify_tar import MAX_FAULTS
from gcahng.errors import DataError, InputError

FIRST = "shard-000000.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "set"
    splits = {"train": ("wren", "finch", "owl"), "test": ("crow", "jay")}
    samples = [
        sample
        for split, names in splits.items()
        for number, name in enumerate(names)
        for sample in samples_of(split, name, 3, 10 * number)
    ]
    assert len(write_shards(folder, samples, shard_bytes=12_000, skipped=[]).shards) == 3
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def found(folder: Path, **options: bool) -> VerifyReport:
    report = verify(folder, **options)
    assert report.num_faults >= len(report.faults)
    return report


def assert_faults(report: VerifyReport, *patterns: str) -> None:
    """Every pattern is found in a fault, every fault by a pattern."""
    assert not report.is_whole
    for pattern in patterns:
        assert any(re.search(pattern, fault) for fault in report.faults), (pattern, report.faults)
    for fault in report.faults:
        assert any(re.search(pattern, fault) for pattern in patterns), fault


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_folder_has_no_fault(whole: Path, workers: int) -> None:
    done: list[int] = []
    report = verify(whole, decode=True, workers=workers, progress=done.append)
    assert report.is_whole and report.faults == report.warnings == ()
    sizes = [info.bytes for info in ShardSet.open(whole).manifest.shards]
    assert (report.shards, report.samples, report.bytes, done) == (3, 15, sum(sizes), sizes)
    assert report.decoded and report.location == str(whole)


def test_parts_of_any_size_say_the_same(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(copied / FIRST, 700)
    expected = found(copied)
    for part in (1, 100, 512, 5000):
        monkeypatch.setattr(tar_parts, "_PART", part)
        assert found(copied) == expected


def test_impossible_workers(whole: Path) -> None:
    with pytest.raises(InputError, match="`workers` must be at least 1, got 0"):
        verify(whole, workers=0)


# One flipped bit, everywhere.


def test_one_flipped_bit_anywhere_is_found_in_its_file(copied: Path) -> None:
    rng = np.random.default_rng(0)
    files = sorted(path for path in copied.iterdir() if path.name != "manifest.json")
    assert len(files) == 7
    for path in [path for path in files for _ in range(25)]:
        offset, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
        flip(path, offset, bit)
        report = found(copied)
        shard = path.name.replace(".index.npy", ".tar")
        assert report.faults, (path.name, offset, bit)
        assert all(fault.startswith(f"{shard}: ") for fault in report.faults), (offset, bit, report.faults)
        flip(path, offset, bit)
    assert found(copied).is_whole


def test_one_flipped_bit_of_the_manifest_is_found(copied: Path) -> None:
    rng = np.random.default_rng(1)
    path = copied / "manifest.json"
    unreadable = 0
    for _ in range(150):
        offset, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
        flip(path, offset, bit)
        message = first_message(copied)
        assert message.startswith((str(path), "manifest.json: was changed")), (offset, bit, message)
        unreadable += message.startswith(str(path))
        flip(path, offset, bit)
    assert 10 < unreadable < 140
    assert found(copied).is_whole


def first_message(folder: Path) -> str:
    try:
        return found(folder).faults[0]
    except DataError as error:
        return str(error)


def member(folder: Path, row: int, kind: str) -> tuple[Path, int, int]:
    """Tar, first byte and length of a member's content."""
    shards = ShardSet.open(folder)
    record = shards.record(row)
    where = (record.offset, record.length) if kind == "image" else (record.meta_offset, record.meta_length)
    return folder / shards.shard_name(row), *where


SHA256 = rf"^{FIRST}: is damaged: expected sha256 [0-9a-f]{{64}}, got "


@pytest.mark.parametrize(
    ("kind", "place", "message"),
    [
        ("image", lambda start, length: start + length - 1, r"image of sample 000000001 is damaged: expected crc32"),
        ("json", lambda start, length: start, r"JSON member of sample 000000001 is damaged: expected class_id, class_"),
        ("json", b"0,", r"sample 000000001: (the index says class 0, its JSON member 1\.|.* calls class 1 'finch')"),
        ("json", b"wren", r"sample 000000001: classes\.jsonl calls class 0 'wren', its JSON member 'vren'"),
        ("json", b"train", r"sample 000000001: expected split 'train', its JSON member says 'urain'"),
        ("json", b"train/wren", SHA256),  # the name of the source is written nowhere else
        ("json", lambda start, length: start + length, r"bytes after member 000000001\.json, which fill up its block"),
        (
            "image",
            lambda start, length: start - 512,
            r"header at byte \d+, of the image of sample 000000001 is damaged",
        ),
        ("image", lambda start, length: start - 512 + 130, r"header at byte \d+, of the image of sample 000000001 is"),
        (
            "json",
            lambda start, length: start - 512 + 155,
            r"header at byte \d+, of the JSON member of sample 000000001",
        ),
        ("json", lambda start, length: start - 1, r"header at byte \d+, of the JSON member of sample 000000001 is dam"),
    ],
)
def test_a_flipped_bit_is_named_by_its_member(
    copied: Path, kind: str, place: bytes | Callable[[int, int], int], message: str
) -> None:
    path, start, length = member(copied, 1, kind)
    flip(path, path.read_bytes().index(place, start) if isinstance(place, bytes) else place(start, length))
    assert_faults(found(copied), SHA256, message)


def test_damage_after_a_damaged_header_is_found_too(copied: Path) -> None:
    """Streaming readers take a damaged header for the end of the tar."""
    path, start, _ = member(copied, 0, "image")
    flip(path, start - 300)
    path, start, _ = member(copied, 2, "image")
    flip(path, start)
    assert_faults(
        found(copied), SHA256, "header at byte 0, of the image of sample 000000000", "image of sample 000000002"
    )


@pytest.mark.parametrize(("row", "kind"), [(1, "image"), (5, "json")])
def test_a_header_of_zeros_is_not_the_end(copied: Path, row: int, kind: str) -> None:
    path, start, _ = member(copied, row, kind)
    assert path.name == FIRST
    content = bytearray(path.read_bytes())
    content[start - 512 : start] = bytes(512)
    path.write_bytes(content)
    report = found(copied)
    assert_faults(report, SHA256, rf"header at byte \d+, of the .* of sample 00000000{row} is damaged: it is all zeros")
    assert report.samples == 15


def test_damage_without_an_index_is_still_named(copied: Path) -> None:
    (copied / FIRST.replace(".tar", ".index.npy")).unlink()
    path, start, _ = member_of_tar(copied / FIRST, "000000001.png")
    flip(path, start)
    flip(path, 20)
    report = found(copied)
    assert_faults(
        report,
        SHA256,
        r"its index is damaged, and the tar was checked without it: .*index\.npy cannot be read",
        r"the header at byte 0 is damaged",
        r"expected \d+ whole samples, got 0",
    )
    flip(path, 20)
    assert_faults(verify(copied, decode=True), SHA256, "its index is damaged", r"image of sample 000000001 is no image")


def member_of_tar(path: Path, name: str) -> tuple[Path, int, int]:
    with tarfile.open(path) as tar:
        info = tar.getmember(name)
        return path, info.offset_data, info.size


# Whole files.


@pytest.mark.parametrize("keep", ["members", "half", "one block", "nothing"])
def test_a_tar_cut_at_a_block(copied: Path, keep: str) -> None:
    path = copied / FIRST
    size = path.stat().st_size
    _, start, length = member(copied, 2, "image")
    end = start - (-length // 512) * 512
    left = {"members": end, "half": start - 512, "one block": size - 512, "nothing": 0}[keep]
    os.truncate(path, left)
    report = found(copied)
    assert report.faults[0] == f"{FIRST}: is cut: expected {size} bytes, got {left}."
    assert all(fault.startswith(FIRST) for fault in report.faults)
    if keep in ("members", "half", "nothing"):
        assert any("without the two empty blocks" in fault for fault in report.faults)
        assert report.warnings == ("samples per class and split were not compared, since samples are missing.",)
    else:
        assert_faults(report, "is cut", rf"must end at byte {size}, .* got {left}")


def test_a_tar_that_ends_inside_of_a_member(copied: Path) -> None:
    path, start, length = member(copied, 1, "image")
    os.truncate(path, start + 100)
    assert_faults(
        found(copied),
        "is cut",
        rf"header at byte {start - 512}, of .* is damaged: it says {length} bytes, and 100 are left",
        "ends inside of member at byte",
        r"the header at byte \d+, of the .* of sample 00000000\d is missing \(and of \d+ more members after it\)",
        "expected 6 whole samples, got 1|expected 3 whole samples, got 1",
        "sample 000000001 has no second member|sample 00000000. has no",
    )


@pytest.mark.parametrize("tail", [bytes(512), bytes(10240), b"x" * 512])
def test_bytes_after_the_end(copied: Path, tail: bytes) -> None:
    with (copied / FIRST).open("ab") as file:
        file.write(tail)
    faults = [r"is too long: expected \d+ bytes", r"must end at byte \d+, after its last member"]
    assert_faults(found(copied), *faults, *([r"has bytes after its last member"] if any(tail) else []))


@pytest.mark.parametrize("name", [FIRST, "shard-000002.index.npy", "classes.jsonl"])
def test_a_missing_file(copied: Path, name: str) -> None:
    (copied / name).unlink()
    report = found(copied)
    assert len(report.faults) == 1
    assert re.search(rf"{re.escape(name)} cannot be read \(No such file or directory\)", report.faults[0])


def test_swapped_shards(copied: Path) -> None:
    first, second = copied / FIRST, copied / "shard-000001.tar"
    first.rename(copied / "aside")
    second.rename(first)
    (copied / "aside").rename(second)
    report = found(copied)
    assert {fault.split(":")[0] for fault in report.faults} == {FIRST, "shard-000001.tar"}
    assert "sample 000000000: the index calls it" in "".join(report.faults) or "is cut" in "".join(report.faults)


def test_many_faults_of_a_shard_are_counted_and_some_listed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied / FIRST
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    monkeypatch.setattr("gcahng.data.shards.verify_tar.MAX_FAULTS", 4)
    report = found(copied)
    assert len(report.faults) == 4 < report.num_faults
    assert re.search(SHA256, report.faults[0])
    assert MAX_FAULTS > 4


def test_files_that_nobody_named_are_a_warning(copied: Path) -> None:
    (copied / "notes.txt").write_text("")
    report = found(copied)
    assert report.is_whole and report.warnings == ("notes.txt is not named by the manifest.",)


# What the manifest and the classes say.


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (lambda raw: raw.update(seed=8), []),
        (lambda raw: raw.update(window_bytes=8), []),
        (lambda raw: raw["extra"].update(more=1), []),
        (
            lambda raw: raw["shards"][0].update(sha256="ab" * 32),
            [r"^shard-000000\.tar: is damaged: expected sha256 (ab){32}, got"],
        ),
        (
            lambda raw: raw["shards"][1].update(bytes=512),
            [r"^shard-000001\.tar: is too long: expected 512", r"its index is damaged.* lies outside of its shard"],
        ),
        (lambda raw: raw["classes"].update(sha256="ab" * 32), [r"^classes\.jsonl: .*expected sha256 (ab){32}, got"]),
        (lambda raw: raw["shards"][0].update(index_sha256="ab" * 32), [r"its index is damaged.*sha256 (ab){32}, got"]),
        (
            lambda raw: raw["splits"]["test"].update(classes=3),
            [r"manifest\.json: split 'test': expected 3 classes and 6 images, got 2 classes and 6 images"],
        ),
    ],
)
@pytest.mark.parametrize("sign", [True, False])
def test_an_edited_manifest(copied: Path, change: Callable[[dict], object], faults: list[str], sign: bool) -> None:  # type: ignore[type-arg]
    edit_manifest(copied, change, sign=sign)
    own = [] if sign else [r"^manifest\.json: was changed after the conversion: expected manifest_sha256 [0-9a-f]{64}"]
    if faults + own:
        assert_faults(found(copied), *faults, *own)
    else:
        assert found(copied).is_whole


def rewrite_classes(folder: Path, change: Callable[[list[ClassInfo]], list[ClassInfo]], sign: bool) -> None:
    path = folder / "classes.jsonl"
    content = encode_classes(change(list(ClassList(path))))
    path.unlink()
    path.write_bytes(content)
    if sign:
        edit_manifest(folder, lambda raw: raw["classes"].update(sha256=hashlib.sha256(content).hexdigest()))


def with_change(class_id: int, **values: object) -> Callable[[list[ClassInfo]], list[ClassInfo]]:
    def change(infos: list[ClassInfo]) -> list[ClassInfo]:
        infos[class_id] = ClassInfo(**{**vars(infos[class_id]), **values})  # type: ignore[arg-type]
        return infos

    return change


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        ({"name": "rook"}, [r"shard-0.*: sample 00000000[678]: classes\.jsonl calls class 2 'rook', its .* 'owl'"]),
        ({"num_samples": 4}, [r"^classes\.jsonl: class 2 \('owl'\): expected 4 samples, got 3"]),
        ({"split": "test"}, [r"^classes\.jsonl: class 2 \('owl'\): expected split 'test', its first .* in 'train'"]),
        (
            {"name": "jay"},
            [r"^classes\.jsonl: the name 'jay' belongs to 2 classes", r"calls class 2 'jay', its JSON member 'owl'"],
        ),
    ],
)
def test_edited_classes(copied: Path, values: dict[str, object], faults: list[str]) -> None:
    rewrite_classes(copied, with_change(2, **values), sign=True)
    assert_faults(found(copied), *faults)
    rewrite_classes(copied, with_change(2, columns={"x": "y"}), sign=False)
    assert_faults(found(copied), r"^classes\.jsonl: .* differs from the manifest: expected sha256")


def test_a_damaged_line_of_the_classes(copied: Path) -> None:
    path = copied / "classes.jsonl"
    content = path.read_bytes().replace(b'"split": "train"', b'"split": 7', 1)
    path.write_bytes(content)
    edit_manifest(copied, lambda raw: raw["classes"].update(sha256=hashlib.sha256(content).hexdigest()))
    assert_faults(found(copied), r"^classes\.jsonl: .*line 1 is damaged")


def test_an_unreadable_manifest_is_an_error(copied: Path) -> None:
    (copied / "manifest.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(DataError, match="expected version 2, got 1"):
        verify(copied)


# Through a store that is no folder.


@pytest.fixture
def remote(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GCAHNG_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    place = f"memory://{tmp_path.name}"
    for path in whole.iterdir():
        files.pipe(f"{place}/{path.name}", path.read_bytes())
    return place


def test_a_url_is_read_where_it_is(remote: str) -> None:
    files = fsspec.filesystem("memory")
    report = verify(remote, decode=True)
    assert report.is_whole and report.samples == 15, report
    for name in ("shard-000001.tar", "shard-000001.index.npy", "classes.jsonl"):
        before = files.cat(f"{remote}/{name}")
        files.pipe(f"{remote}/{name}", before[:150] + bytes([before[150] ^ 1]) + before[151:])
        faults = verify(remote).faults
        assert faults and all(fault.startswith(name.replace(".index.npy", ".tar")) for fault in faults), faults
        files.pipe(f"{remote}/{name}", before)
    files.rm(f"{remote}/shard-000002.tar")
    assert [fault.split(": ")[:2] for fault in verify(remote).faults] == [["shard-000002.tar", "cannot be read"]]
