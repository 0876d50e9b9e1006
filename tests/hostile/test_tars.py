"""Tars and zip files of strangers: nothing leaves its place, nothing is followed, nothing has no end."""

import os
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from fuzzing import limited
from tar_cases import blocks, entry, open_tar, picture, write_tar

from gcahng.data.sources.omniglot import Omniglot
from gcahng.data.sources.read_file import MAX_FILE_BYTES, read_file
from gcahng.data.sources.source import SourceItem
from gcahng.data.stores import open_store
from gcahng.data.tars.labels import read_label
from gcahng.data.tars.locations import find_tars
from gcahng.data.tars.samples import MAX_LABEL_BYTES, tar_samples
from gcahng.errors import DataError, InputError

END = bytes(1024)


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "a/..", "..", "../x", "../x.pickle"])
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_paths_that_lead_out_are_refused(tmp_path: Path, name: str, tar_format: int) -> None:
    files = [("a/1.jpg", picture(0)), (name, picture(1))]
    path = write_tar(tmp_path / "a.tar", files, tar_format=tar_format)
    found = []
    with pytest.raises(
        DataError, match="whose path leads out of the tar: expected a path below its top; the last whole"
    ):
        found.extend(tar_samples(open_tar(path)))


# The name's part from its first dot on is the field: `.jpg` is none of an image, and is passed over.
@pytest.mark.parametrize(
    ("name", "keys"),
    [("./a/1.jpg", ["./a/1"]), ("a..b/1.jpg", ["a..b/1"]), ("...jpg/1.jpg", ["...jpg/1"]), ("a/1..jpg", [])],
)
def test_harmless_dots_are_read(tmp_path: Path, name: str, keys: list[str]) -> None:
    path = write_tar(tmp_path / "a.tar", [(name, picture(0))])
    assert [sample.key for sample in tar_samples(open_tar(path))] == keys


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused_as_images_and_passed_over_elsewhere(tmp_path: Path, kind: bytes) -> None:
    target = {"type": kind, "linkname": "/etc/passwd"}
    path = tmp_path / "a.tar"
    path.write_bytes(blocks(entry("a/1.jpg", **target)) + END)
    with pytest.raises(DataError, match=r"has 'a/1.jpg' as a .*: expected a regular file"):
        list(tar_samples(open_tar(path)))
    path.write_bytes(blocks(entry("a/1.txt", **target)) + END)
    passed: list[str] = []
    assert list(tar_samples(open_tar(path), passed_over=passed.append)) == [] and passed == [".txt"]


def test_a_label_is_small(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.jpg": picture(0), "1.json": b"[" * (MAX_LABEL_BYTES + 1)})
    with pytest.raises(DataError, match=f"too large: expected at most {MAX_LABEL_BYTES} bytes"):
        list(tar_samples(open_tar(path)))
    path = write_tar(tmp_path / "b.tar", {"1.jpg": picture(0), "1.json": b"[" * MAX_LABEL_BYTES})
    (sample,) = tar_samples(open_tar(path))
    with pytest.raises(DataError, match=r"has a damaged .json"):
        read_label(sample, None, "the sample")


def test_a_member_larger_than_the_tar_is_no_reason_to_ask_for_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(blocks(entry("1.jpg", 1 << 62), tar_format=tarfile.GNU_FORMAT) + END)
    with pytest.raises(DataError, match="is cut inside of member '1.jpg'"):
        list(tar_samples(open_tar(path)))


@pytest.mark.parametrize("location", ["pipe:touch ran", "pipe:curl x|tar x", "file:pipe:touch ran", "PIPE:touch ran"])
def test_commands_are_never_run(tmp_path: Path, location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        find_tars(location)
    with pytest.raises(InputError):
        open_store(location).size("manifest.json")
    assert os.listdir(tmp_path) == []


def character(path: Path, content: bytes, name: str = "Greek/character01/1.png") -> Omniglot:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Latin/character01/1.png", picture(0, "PNG"))
        archive.writestr(name, content)
    return Omniglot(path, train_alphabets=["Latin"])


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    source = character(tmp_path / "a.zip", bytes(MAX_FILE_BYTES + 1))
    assert (tmp_path / "a.zip").stat().st_size < 1 << 20
    item = SourceItem("x", "test", "Greek/character01/1.png")
    with limited(), pytest.raises(DataError, match=f"unpacks to more than {MAX_FILE_BYTES} bytes"):
        source.load(item)


@pytest.mark.parametrize("name", ["../../Greek/character01/1.png", "/Greek/character01/1.png"])
def test_a_zip_file_writes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    source = character(tmp_path / "deep" / "er" / "a.zip", picture(1, "PNG"), name)
    with suppress(InputError):  # one alphabet is left, which trains
        for item in source.listing().items:
            source.load(item)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "deep", "er"]


def test_a_pipe_in_a_source_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.jpg")
    with limited(), pytest.raises(DataError, match="is a device or a pipe: expected a regular file"):
        read_file(tmp_path / "1.jpg")
    (tmp_path / "large.jpg").touch()
    os.truncate(tmp_path / "large.jpg", 1 << 40)  # a hole
    with limited(), pytest.raises(DataError, match=f"the file has more than {MAX_FILE_BYTES} bytes"):
        read_file(tmp_path / "large.jpg")
