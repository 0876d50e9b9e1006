"""The strict tar reader: what the standard library writes is read, and every cut and flipped bit is an error."""

import gzip
import io
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from tar_cases import blocks, entry, open_tar, read_tar, write_tar

from gcahng.data.stores.local import LocalStore
from gcahng.data.tars.members import Kind
from gcahng.errors import DataError

LONG = "folder/" * 40 + "name.jpg"
FILES = [
    ("a.jpg", b"x" * 700),
    ("a.json", b"{}"),
    ("b.jpg", b""),
    ("ünï/c.jpg", b"y" * 512),
    (LONG, b"z" * 1025),
    ("d.cls", b"7"),
]


@pytest.mark.parametrize("part_bytes", [512, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, tar_format: int, part_bytes: int) -> None:
    path = write_tar(tmp_path / "a.tar", FILES, tar_format)
    assert [(member.name, content) for member, content in read_tar(path, part_bytes=part_bytes)] == FILES


def test_a_long_name_of_ustar_has_a_prefix(tmp_path: Path) -> None:
    name = "p" * 100 + "/" + "q" * 90 + ".jpg"
    assert read_tar(write_tar(tmp_path / "a.tar", {name: b"1"}))[0][0].name == name


@pytest.mark.parametrize("tar_format", ["ustar", "pax", "gnu", "v7"])
def test_gnu_tar_writes_what_is_read(tmp_path: Path, tar_format: str) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name, content in {"in/a.jpg": b"1" * 5000, "in/sub/b.cls": b"3"}.items():
        (tmp_path / name).write_bytes(content)
    command = ["tar", f"--format={tar_format}", "--sort=name", "-cf", "a.tar", "in"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=30)
    found = read_tar(tmp_path / "a.tar")
    assert [(m.name, m.kind, len(content)) for m, content in found] == [
        ("in", Kind.DIRECTORY, 0),
        ("in/a.jpg", Kind.FILE, 5000),
        ("in/sub", Kind.DIRECTORY, 0),
        ("in/sub/b.cls", Kind.FILE, 1),
    ]


def test_contents_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(100_000)) for i in range(20)])
    fetched = 0

    class Counting(LocalStore):
        def read(self, name: str, offset: int, length: int) -> bytes:
            nonlocal fetched
            fetched += length
            return super().read(name, offset, length)

    tar = open_tar(path, part_bytes=4096)
    tar._store = Counting(tmp_path)
    assert len(list(tar)) == 20
    assert fetched <= 22 * 4096 + 20_480


def test_a_whole_tar_is_never_in_memory(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(30_000)) for i in range(50)])
    largest = 0

    class Watching(LocalStore):
        def read(self, name: str, offset: int, length: int) -> bytes:
            nonlocal largest
            largest = max(largest, length)
            return super().read(name, offset, length)

    tar = open_tar(path, part_bytes=65_536)
    tar._store = Watching(tmp_path)
    assert [len(tar.content()) for _ in tar] == [30_000] * 50
    assert largest == 65_536


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    """Also one between two members, which tarfile takes for the end."""
    whole = write_tar(tmp_path / "a.tar", FILES, tarfile.PAX_FORMAT).read_bytes()
    end = len(whole.rstrip(b"\0")) + (-len(whole.rstrip(b"\0")) % 512)
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end + 1024, 256), 1, 513, end + 1023]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"^Tar {cut} is (cut|empty)"):
            read_tar(cut)
    for length in (end + 1024, end + 1025, len(whole)):  # what is missing is padding
        cut.write_bytes(whole[:length])
        assert len(read_tar(cut)) == len(FILES)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2560, "is cut at byte 2560: expected another member, or the two zero blocks that end a tar; LAST 'a.json'"),
        (2048, "is cut inside of member 'a.json': expected 2 bytes at 2048, got 0; LAST 'a.jpg'"),
        (1636, "is cut inside of the header at byte 1536: expected 512 bytes, got 100; LAST 'a.jpg'"),
        (600, "is cut inside of member 'a.jpg': expected 700 bytes at 512, got 88; no member comes before it"),
    ],
)
def test_a_cut_tar_names_the_last_whole_member(tmp_path: Path, length: int, message: str) -> None:
    whole = write_tar(tmp_path / "a.tar", FILES, tarfile.GNU_FORMAT).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:length])
    with pytest.raises(DataError) as caught:
        read_tar(cut)
    assert str(caught.value) == (
        f"Tar {cut} {message.replace('LAST', 'the last whole member is')}. Copy the tar again, or make it again."
    )


def test_every_flipped_bit_of_a_header_is_an_error(tmp_path: Path) -> None:
    whole = bytearray(write_tar(tmp_path / "a.tar", FILES, tarfile.GNU_FORMAT).read_bytes())
    header = 1536
    assert whole[header : header + 6] == b"a.json"
    for offset in range(0, 512, 7):
        damaged = bytearray(whole)
        damaged[header + offset] ^= 0x10
        (tmp_path / "b.tar").write_bytes(damaged)
        with pytest.raises(DataError, match="has a damaged header at byte 1536 .*; the last whole member is 'a.jpg'"):
            read_tar(tmp_path / "b.tar")


def test_a_zeroed_header_is_not_the_end(tmp_path: Path) -> None:
    whole = bytearray(write_tar(tmp_path / "a.tar", FILES, tarfile.GNU_FORMAT).read_bytes())
    whole[1536:2048] = bytes(512)
    (tmp_path / "a.tar").write_bytes(whole)
    with tarfile.open(tmp_path / "a.tar", "r|*") as tar:
        assert len(list(tar)) == 1  # the silent loss that this reader refuses
    with pytest.raises(DataError, match=r"damaged header at byte 1536 \(a single zero block amid the members\)"):
        read_tar(tmp_path / "a.tar")


def test_zeroed_headers_and_contents_are_not_the_end(tmp_path: Path) -> None:
    whole = bytearray(write_tar(tmp_path / "a.tar", FILES, tarfile.GNU_FORMAT).read_bytes())
    whole[1536:2560] = bytes(1024)
    (tmp_path / "a.tar").write_bytes(whole)
    with pytest.raises(DataError, match="goes on after its two zero blocks at byte 1536: expected zeros"):
        read_tar(tmp_path / "a.tar", part_bytes=512)


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", FILES, tarfile.GNU_FORMAT).read_bytes()
    (tmp_path / "b.tar").write_bytes(one + one)
    with pytest.raises(DataError, match="goes on after its two zero blocks .* Give tars that were joined as they"):
        read_tar(tmp_path / "b.tar")


def test_a_download_that_was_laid_out_but_not_finished(tmp_path: Path) -> None:
    content = blocks(entry("a.jpg", 3), b"abc")
    (tmp_path / "a.tar").write_bytes(content + bytes((1 << 20) + 1024))
    assert len(read_tar(tmp_path / "a.tar")) == 1
    (tmp_path / "a.tar").write_bytes(content + bytes((1 << 20) + 1025))
    with pytest.raises(DataError, match="ends in 1048577 bytes of padding, as an interrupted download leaves them"):
        read_tar(tmp_path / "a.tar")


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return blocks(entry("header", len(records), type=kind), records)


END = bytes(1024)
FILE = blocks(entry("a.jpg", 3), b"abc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: expected members, got 0 bytes"),
        (b"\xff\xd8\xff" + bytes(2000), "is no tar: expected a tar header, got b'"),
        (gzip.compress(FILE + END) + bytes(512), "is compressed with gzip: expected a plain tar"),
        (b"\x28\xb5\x2f\xfd" + bytes(512), "is compressed with zstd"),
        (FILE + blocks(entry("b.jpg", type=b"Z")) + END, "member 'b.jpg' is of the unknown type b'Z'"),
        (FILE + blocks(entry("b.jpg", type=tarfile.GNUTYPE_SPARSE)) + END, "holds 'b.jpg' as a sparse file"),
        (
            FILE + blocks(entry("b.jpg", -5), tar_format=tarfile.GNU_FORMAT) + END,
            "header at byte 1024 (size -5)",
        ),
        (FILE + pax(b"22 GNU.sparse.major=1\n") + FILE + END, "holds 'a.jpg' as a sparse file"),
        (FILE + pax(b"8 size=3\n") + FILE + END, "malformed pax record"),
        (FILE + pax(b"11 size=-3\n") + FILE + END, "size '-3'"),
        (FILE + pax(b"99 path=b\n") + FILE + END, "malformed pax record"),
        (FILE + pax(b"10 path=b\n") + END, "an extended header without a member"),
        (FILE + pax(b"15 size=999999\n") + FILE + END, "is cut inside of member 'a.jpg': expected 999999 bytes"),
        (FILE + blocks(entry("x", 2 << 20, type=b"L")) + FILE + END, "an extended header of 2097152 bytes"),
    ],
)
def test_what_is_no_sound_tar(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_tar(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    if content.startswith(FILE):
        assert "the last whole member is 'a.jpg'" in str(caught.value)


def test_pax_headers_rename_and_resize(tmp_path: Path) -> None:
    """A global one holds until the end, a local one for its member, GNU's long name goes between."""
    raw = (
        pax(b"12 path=g.a\n", b"g")
        + FILE
        + pax(b"12 path=x.b\n" + b"9 size=5\n")
        + blocks(entry("c", 3))[:512]
        + b"hello".ljust(512, b"\0")
        + FILE
        + END
    )
    (tmp_path / "a.tar").write_bytes(raw)
    with tarfile.open(tmp_path / "a.tar") as tar:
        want = [(info.name, info.size) for info in tar]
    got = read_tar(tmp_path / "a.tar")
    assert [(member.name, member.size) for member, _ in got] == want == [("g.a", 3), ("x.b", 5), ("g.a", 3)]
    assert got[1][1] == b"hello"


def test_kinds(tmp_path: Path) -> None:
    kinds = {
        b"0": Kind.FILE,
        b"\0": Kind.FILE,
        b"7": Kind.FILE,
        b"1": Kind.HARD_LINK,
        b"2": Kind.SYMBOLIC_LINK,
        b"3": Kind.DEVICE,
        b"4": Kind.DEVICE,
        b"5": Kind.DIRECTORY,
        b"6": Kind.DEVICE,
    }
    raw = b"".join(blocks(entry("m", type=kind, linkname="a")) for kind in kinds)
    (tmp_path / "a.tar").write_bytes(raw + END)
    assert [member.kind for member, _ in read_tar(tmp_path / "a.tar")] == list(kinds.values())


def test_a_name_that_is_not_utf_8_stays_apart(tmp_path: Path) -> None:
    names = [b"a\xff.jpg", b"a\xfe.jpg"]
    raw = b""
    for name in names:
        header = bytearray(entry("a" * len(name), 1).tobuf(tarfile.USTAR_FORMAT))
        header[: len(name)] = name
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        raw += bytes(header) + b"1".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(raw + END)
    assert [member.name for member, _ in read_tar(tmp_path / "a.tar")] == [r"a\xff.jpg", r"a\xfe.jpg"]


def test_a_member_may_be_too_large(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"1" * 10, "b.bin": b"2" * 1000, "c.jpg": b"3" * 11})
    tar = open_tar(path, max_member_bytes=10)
    members = iter(tar)
    assert next(members).name == "a.jpg" and tar.content() == b"1" * 10
    next(members)  # large, and passed over
    next(members)
    with pytest.raises(DataError, match="too large: expected at most 10 bytes, got 11 in 'c.jpg'; .* 'b.bin'"):
        tar.content()


def test_a_tar_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(5000)) for i in range(9)])
    tar = open_tar(path, part_bytes=4096)
    members = iter(tar)
    next(members)
    with path.open("r+b") as file:
        file.truncate(7000)
    with pytest.raises(DataError, match=r"became shorter while it was read: expected 61440 bytes; the last whole"):
        list(members)


def test_a_tar_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "a.tar"))):
        open_tar(tmp_path / "a.tar")


def test_an_empty_archive_is_a_sound_one(tmp_path: Path) -> None:
    tarfile.open(fileobj=io.BytesIO(), mode="w").close()
    assert read_tar(write_tar(tmp_path / "a.tar", {})) == []
