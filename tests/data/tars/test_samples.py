"""Samples by WebDataset's rule, compared with webdataset itself; what it takes silently is an error here."""

import io
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from tar_cases import blocks, entry, open_tar, picture, write_tar

from gcahng.data.tars.samples import image_of, split_name, tar_samples
from gcahng.errors import DataError

MIXED = [
    ("__meta__/x.jpg", b"0"),
    ("train/0001.jpg", b"1"),
    ("train/0001.json", b"{}"),
    ("train/0001.left.png", b"2"),
    ("v1.5/0002.JPG", b"3"),
    ("v1.5/0002.cls", b"4"),
    ("0003.npy", b"5"),
    ("0003.webp", b"6"),
    ("0003.txt", b"7"),
    ("README", b"8"),
    (".hidden.jpg", b"9"),
    ("notes.txt", b"10"),
    ("0004.jpeg", b"11"),
    ("0004.pth", b"12"),
    ("0004.pyd", b"13"),
    ("0004.pickle", b"14"),
]


def read(path: Path, part: int = 0, parts: int = 1, counts: Counter[str] | None = None) -> list[tuple]:
    count = None if counts is None else lambda extension: counts.update([extension])
    return [(s.key, s.position, s.members) for s in tar_samples(open_tar(path), part, parts, count)]


def by_webdataset(path: Path) -> list[dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        return list(webdataset.WebDataset(str(path), shardshuffle=False))


@pytest.mark.parametrize("name", [name for name, _ in MIXED if not name.startswith((".", "__"))] + ["a/b.c/d.e.f", "x"])
def test_keys_are_those_of_webdataset(name: str) -> None:
    key, extension = webdataset.tariterators.base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, extension.lower()))


def test_hidden_files_have_no_key() -> None:
    assert [split_name(name) for name in (".a.jpg", "a/._b.jpg", "__meta__", "__meta__/b.jpg", "a.jpg/b")] == [None] * 5


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", MIXED)
    counts: Counter[str] = Counter()
    got = read(path, counts=counts)
    read_extensions = {"jpg", "jpeg", "png", "webp", "cls", "json"}
    want = []
    for sample in by_webdataset(path):
        members = {name: value for name, value in sample.items() if name in read_extensions}
        if members:
            want.append((sample["__key__"], len(want), members))
    assert got == want and len(got) == 4
    assert counts == Counter({"no key": 3, ".left.png": 1, ".npy": 1, ".txt": 2, ".pth": 1, ".pyd": 1, ".pickle": 1})


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_share_a_tar(tmp_path: Path, parts: int) -> None:
    path = write_tar(tmp_path / "a.tar", MIXED)
    whole = read(path)
    found = [read(path, part, parts) for part in range(parts)]
    assert [[sample[1] % parts for sample in share] for share in found] == [
        [part] * len(share) for part, share in enumerate(found)
    ]
    assert sorted((sample for share in found for sample in share), key=lambda sample: sample[1]) == whole


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jpg", "b.jpg", "a.json"], "has sample 'a' twice, or its members apart: .* member is 'b.jpg'"),
        (["a.jpg", "b.npy", "a.json"], "has sample 'a' twice, or its members apart"),
        (["a.jpg", "a.json", "b.jpg", "a.jpg"], "has sample 'a' twice"),
        (["b.jpg", "a.jpg", "a.json", "a.jpg"], "has member 'a.jpg' twice; the last whole member is 'a.json'"),
        (["a.jpg", "a.JPG"], "has member 'a.JPG' twice"),
        (["a.npy", "a.npy"], "has member 'a.npy' twice"),
    ],
)
def test_members_lie_together_and_come_once(tmp_path: Path, files: list[str], message: str, part: int) -> None:
    """Whichever part of the tar one reads."""
    path = write_tar(tmp_path / "a.tar", [(name, b"1") for name in files])
    with pytest.raises(DataError, match=message):
        read(path, part, 2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(tarfile.LNKTYPE, "hard link"), (tarfile.SYMTYPE, "symbolic link"), (tarfile.FIFOTYPE, "device or pipe")],
)
def test_an_image_that_is_a_link_is_no_image(tmp_path: Path, kind: bytes, name: str) -> None:
    """GNU tar writes hard links for files that share their content; webdataset leaves them out without a word."""
    raw = blocks(entry("a.jpg", 1), b"1") + blocks(entry("b.jpg", type=kind, linkname="a.jpg"))
    (tmp_path / "a.tar").write_bytes(raw + bytes(1024))
    assert len(by_webdataset(tmp_path / "a.tar")) == 1
    with pytest.raises(DataError, match=f"has 'b.jpg' as a {name}: expected a regular file; .* --hard-dereference"):
        read(tmp_path / "a.tar")


def test_links_and_folders_that_are_no_images_are_passed_over(tmp_path: Path) -> None:
    raw = b"".join(
        [
            blocks(entry("a.dir/", type=tarfile.DIRTYPE)),
            blocks(entry("a.jpg", 1), b"1"),
            blocks(entry("a.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
            blocks(entry("latest", type=tarfile.SYMTYPE, linkname="a.jpg")),
            bytes(1024),
        ]
    )
    (tmp_path / "a.tar").write_bytes(raw)
    counts: Counter[str] = Counter()
    assert read(tmp_path / "a.tar", counts=counts) == [("a", 0, {"jpg": b"1"})]
    assert counts == Counter({".npy": 1, "no key": 1})


def test_a_sample_comes_before_the_fault_that_follows(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")])
    path.write_bytes(path.read_bytes()[:2048])
    samples = tar_samples(open_tar(path))
    assert next(samples).key == "a"
    with pytest.raises(DataError, match="cut at byte 2048: .*; the last whole member is 'b.jpg'"):
        list(samples)


def test_what_webdataset_loses_at_a_cut_is_an_error(tmp_path: Path) -> None:
    """Ten samples, cut between two members: webdataset yields two and no error."""
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(10):
            writer.write({"__key__": f"{number}", "jpg": picture(number), "cls": number})
    with tarfile.open(path) as tar:
        third = [info.offset for info in tar][4]
    path.write_bytes(path.read_bytes()[:third])
    assert len(by_webdataset(path)) == 2
    with pytest.raises(DataError, match=r"is cut at byte \d+: .*; the last whole member is '1.jpg'"):
        read(path)


@pytest.mark.parametrize("found", [{}, {"json": b"{}"}, {"jpg": b"1", "png": b"2"}, {"jpg": b"", "jpeg": b""}])
def test_a_sample_has_one_image(tmp_path: Path, found: dict[str, bytes]) -> None:
    (sample,) = tar_samples(
        open_tar(write_tar(tmp_path / "a.tar", {"k.cls": b"1"} | {f"k.{e}": found[e] for e in found}))
    )
    images = ", ".join(sorted(set(found) - {"json"}, reverse=True)) if "png" not in found else "jpg, png"
    with pytest.raises(
        DataError, match=f"^Sample k must have one image: expected one .*, got {images or 'none'} .memb"
    ):
        image_of(sample, "Sample k")


def test_images_of_four_kinds(tmp_path: Path) -> None:
    for extension in ("jpg", "jpeg", "png", "webp"):
        buffer = io.BytesIO(extension.encode())
        path = write_tar(tmp_path / f"{extension}.tar", {f"k.{extension}": buffer.getvalue()})
        (sample,) = tar_samples(open_tar(path))
        assert image_of(sample, "k") == extension.encode()
