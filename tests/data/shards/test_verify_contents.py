"""`shards.verify` on folders whose checksums are right and whose contents are not."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from shard_cases import edit_manifest, picture, samples_of, write_shards

from gcahng.data.shards.index import INDEX_DTYPE
from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.verify import verify
from gcahng.data.shards.writer import Sample

META = b'{"class_id": 0, "class_name": "wren", "split": "train", "source": "s"}'


def sign(folder: Path, number: int = 0) -> None:
    """Make the manifest say what a tar and its index are."""
    tar, index = (folder / f"shard-{number:06d}{end}" for end in (".tar", ".index.npy"))

    def change(raw: dict) -> None:  # type: ignore[type-arg]
        raw["shards"][number] |= {
            "bytes": tar.stat().st_size,
            "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
            "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
        }

    edit_manifest(folder, change)


def one_class(folder: Path, count: int = 2) -> Path:
    write_shards(folder, samples_of("train", "wren", count, 0), shard_bytes=1 << 20)
    return folder


def with_tar(folder: Path, members: Sequence[tuple[str, bytes]], rows: Sequence[tuple[int, int]]) -> Path:
    """A folder of one class with this tar and an index that fits it.

    Args:
        folder: Created.
        members: Name and content of each.
        rows: Places in `members` of the image and the JSON of each sample.
    """
    one_class(folder, len(rows))
    offsets = []
    with tarfile.open(folder / "shard-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            offsets.append(tar.offset // 512 + 1)
            tar.addfile(info, io.BytesIO(content))
    table = np.load(folder / "shard-000000.index.npy")
    for row, (image, meta) in zip(table, rows, strict=True):
        row["block"], row["length"] = offsets[image], len(members[image][1])
        row["meta_block"], row["meta_length"] = offsets[meta], len(members[meta][1])
        row["crc32"] = zlib.crc32(members[image][1])
    np.save(folder / "shard-000000.index.npy", table)
    sign(folder)
    return folder


IMAGE = picture(0, "JPEG")
PAIR = [("000000000.jpg", IMAGE), ("000000000.json", META)]


def other_meta(**values: str) -> list[tuple[str, bytes]]:
    text = META.decode()
    for name, value in values.items():
        start = text.index(f'"{name}": ') + len(name) + 4
        end = min(place for place in (text.find(mark, start) for mark in ",}") if place > 0)
        text = text[:start] + value + text[end:]
    return [PAIR[0], (PAIR[1][0], text.encode())]


@pytest.mark.parametrize(
    ("members", "rows", "faults"),
    [
        (PAIR, [(0, 1)], []),
        ([("000000000.json", META), ("000000000.png", IMAGE)], [(1, 0)], []),
        (other_meta(source='"x", "columns": {"colour": "red"}'), [(0, 1)], []),
        (
            PAIR[::-1],
            [(1, 0)],
            ["sample 000000000: expected an image and a .json in alphabetical order, got .json and"],
        ),
        ([("000000007.jpg", IMAGE), ("000000007.json", META)], [(0, 1)], ["000000007: the index calls it 000000000"]),
        (
            [("1.jpg", IMAGE), ("1.json", META)],
            [(0, 1)],
            ["member 1.jpg: expected a key of 9 digits and .jpg, .png or"],
        ),
        ([("000000000.exe", IMAGE), PAIR[1]], [(0, 1)], ["member 000000000.exe: expected a key of 9 digits and .jpg"]),
        ([PAIR[0], ("000000001.json", META)], [(0, 1)], ["sample 000000000 has no second member"]),
        ([*PAIR, ("000000001.jpg", IMAGE)], [(0, 1)], ["member 000000001.jpg at byte", "000000001 has no second"]),
        ([*PAIR, ("x/y", b"z")], [(0, 1)], ["member x/y at byte 2560 is not in the index"]),
        (
            other_meta(class_id="1"),
            [(0, 1)],
            ["expected a class of 1, got class 1", "index says class 0, its JSON member 1"],
        ),
        (other_meta(class_name='"owl"'), [(0, 1)], ["classes.jsonl calls class 0 'wren', its JSON member 'owl'"]),
        (other_meta(split='"test"'), [(0, 1)], ["expected split 'train', its JSON member says 'test'"]),
        (other_meta(source="7"), [(0, 1)], ["the JSON member of sample 000000000 is damaged: expected class_id"]),
        (other_meta(source='"x", "more": 1'), [(0, 1)], ["the JSON member of sample 000000000 is damaged: expected"]),
        (other_meta(source='"x", "columns": {"a": 1}'), [(0, 1)], ["the JSON member of sample 000000000 is damaged"]),
        ([PAIR[0], (PAIR[1][0], b"[" * 5000)], [(0, 1)], ["the JSON member of sample 000000000 is damaged"]),
    ],
)
def test_members(
    tmp_path: Path, members: list[tuple[str, bytes]], rows: list[tuple[int, int]], faults: list[str]
) -> None:
    report = verify(with_tar(tmp_path / "set", members, rows))
    text = "\n".join(report.faults)
    assert all(fault in text for fault in faults), text
    assert report.is_whole == (not faults), text


def test_a_link_is_no_member(tmp_path: Path) -> None:
    folder = one_class(tmp_path / "set", 1)
    info = tarfile.TarInfo("000000000.jpg")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    content[:512] = info.tobuf(tarfile.USTAR_FORMAT)
    (folder / "shard-000000.tar").write_bytes(content)
    sign(folder)
    (fault,) = verify(folder).faults
    assert (
        "the header at byte 0, of the image of sample 000000000 is damaged: expected the plain header of a re" in fault
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda table: table["crc32"].__setitem__(1, 5),
            "image of sample 000000001 is damaged: expected crc32 00000005",
        ),
        (
            lambda table: table["class_id"].__setitem__(1, 1),
            "sample 000000001: the index says class 1, its JSON member 0",
        ),
        (lambda table: table["key"].__setitem__(1, 9), "sample 000000001: the index calls it 000000009"),
        (lambda table: table["length"].__setitem__(1, 90), "member 000000001.png: the index says 90 bytes, the tar "),
        (
            lambda table: table["meta_length"].__setitem__(1, 1),
            "member 000000001.json: the index says 1 bytes, the tar",
        ),
        (
            lambda table: table["block"].__setitem__(1, 2),
            "the header at byte 512, of the image of sample 000000001 is mis",
        ),
        (
            lambda table: table["meta_block"].__setitem__(slice(None), table["meta_block"][::-1].copy()),
            "sample 000000000: the index gives its two members to different samples",
        ),
    ],
)
def test_index_rows(tmp_path: Path, change: Callable[[np.ndarray], None], fault: str) -> None:
    folder = one_class(tmp_path / "set", 2)
    table = np.load(folder / "shard-000000.index.npy")
    assert table.dtype == INDEX_DTYPE
    change(table)
    np.save(folder / "shard-000000.index.npy", table)
    sign(folder)
    report = verify(folder)
    assert any(fault in found for found in report.faults), report.faults


def test_images_are_decoded_on_request(tmp_path: Path) -> None:
    folder = with_tar(tmp_path / "set", [("000000000.jpg", IMAGE[:-60]), PAIR[1]], [(0, 1)])
    assert verify(folder).is_whole
    (fault,) = verify(folder, decode=True).faults
    assert fault.startswith("shard-000000.tar: the image of sample 000000000 cannot be decoded as JPEG")


def test_repeated_keys_are_found_within_and_over_shards(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    one_class(folder, 2)
    with_tar(tmp_path / "twice", [*PAIR, *PAIR], [(0, 1), (2, 3)])
    assert any(
        "manifest.json: key 000000000 occurs more than once, in shard-000000.tar." in fault
        for fault in verify(tmp_path / "twice").faults
    )
    # The same shard under two names, with a class list that says twice as many samples.
    for end in (".tar", ".index.npy"):
        (folder / f"shard-000001{end}").write_bytes((folder / f"shard-000000{end}").read_bytes())
    listed = (folder / "classes.jsonl").read_bytes().replace(b'"num_samples": 2', b'"num_samples": 4')
    (folder / "classes.jsonl").write_bytes(listed)

    def change(raw: dict) -> None:  # type: ignore[type-arg]
        names = {"name": "shard-000001.tar", "index_name": "shard-000001.index.npy"}
        raw["shards"].append(raw["shards"][0] | names)
        raw["splits"]["train"]["images"] = 4
        raw["classes"]["sha256"] = hashlib.sha256(listed).hexdigest()

    edit_manifest(folder, change)
    where = "occurs more than once, in shard-000000.tar, shard-000001.tar."
    assert verify(folder).faults == tuple(f"manifest.json: key 00000000{i} {where}" for i in range(2))


def shared_class(folder: Path, **extra: object) -> Manifest:
    samples = samples_of("train", "wren", 2, 0) + samples_of("train", "owl", 2, 9) + samples_of("test", "owl", 1, 5)
    return write_shards(folder, samples, **extra)


def test_a_test_class_that_training_sees(tmp_path: Path) -> None:
    shared_class(tmp_path / "set")
    assert verify(tmp_path / "set").faults == (
        "manifest.json: 1 classes are in train and in test, expected none: class 1.",
    )
    shared_class(tmp_path / "hotels", protocol={"name": "Hotels", "test_in_train": True})
    assert verify(tmp_path / "hotels").is_whole


def test_query_and_gallery_may_share_classes(tmp_path: Path) -> None:
    samples = [s for split in ("query", "gallery") for s in samples_of(split, "shirt", 2, 0)]
    write_shards(tmp_path / "set", samples)
    report = verify(tmp_path / "set")
    assert report.is_whole and report.warnings == ()


def test_a_class_that_does_not_lie_together_is_a_warning(tmp_path: Path) -> None:
    wren, owl = samples_of("train", "wren", 4, 0), samples_of("train", "owl", 1, 9)
    parted: list[Sample] = [*wren[:2], *owl, *wren[2:]]
    write_shards(tmp_path / "set", parted)
    report = verify(tmp_path / "set")
    assert report.is_whole
    assert report.warnings == (
        "1 classes of split 'train' do not lie together, the first is class 0: reading them takes longer.",
    )
    write_shards(tmp_path / "long", samples_of("train", "wren", 9, 0), shard_bytes=1000)  # goes on in the next tar
    assert verify(tmp_path / "long").warnings == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-1],
        lambda content: content + b"\n",
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: content.replace(b": ", b":  ", 1),
    ],
    ids=["cut", "longer", "line ends", "blank"],
)
def test_a_manifest_that_says_the_same_in_other_bytes(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = one_class(tmp_path / "shards") / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    assert verify(path.parent).faults == (
        "manifest.json: was changed after the conversion: it says the same in other bytes (blanks, line ends).",
    )
