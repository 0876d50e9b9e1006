"""The working folder of a conversion: what it takes over, what it leaves, what it does not touch."""

import re
from pathlib import Path

import pytest
from conversion_cases import Pictures, contents, pictures

from gcahng.data.conversion.convert import convert
from gcahng.data.conversion.partial_folder import PartialFolder
from gcahng.errors import DataError, InputError


def birds() -> Pictures:
    return pictures({"train": ["owl", "gull"], "test": ["crow"]}, images=2)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    convert(birds(), tmp_path / "out")
    return tmp_path / "out"


def test_existing_folder_is_kept_unless_overwritten(out: Path) -> None:
    before = contents(out)
    source = birds()
    with pytest.raises(DataError, match=r"out exists already\. .* --overwrite"):
        convert(source, out, seed=1)
    assert (contents(out), source.loaded) == (before, [])
    convert(birds(), out, seed=1, overwrite=True)
    assert contents(out) != before
    assert list(out.parent.iterdir()) == [out]


def test_link_leads_to_the_place_that_is_written(out: Path, tmp_path: Path) -> None:
    before = contents(out)
    (tmp_path / "link").symlink_to(out)
    convert(birds(), tmp_path / "link", seed=1, overwrite=True)
    assert contents(out) != before
    assert (tmp_path / "link").readlink() == out
    (tmp_path / "other").symlink_to("elsewhere/birds")
    convert(birds(), tmp_path / "other", seed=1)
    assert contents(tmp_path / "elsewhere" / "birds") == contents(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link", "other", "out"]


def test_link_to_itself_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    source = birds()
    with pytest.raises(DataError, match=r"link is a link that leads back to itself\. Delete it"):
        convert(source, tmp_path / "link")
    assert not source.loaded


@pytest.mark.parametrize("out", [".", "/", "..", "a/.."])
def test_out_must_end_in_a_name(out: str) -> None:
    with pytest.raises(InputError, match=f"`out` must end in the name of the folder to create, got '{re.escape(out)}'"):
        convert(birds(), out)


def test_mounted_disk_is_refused_at_once() -> None:
    source = birds()
    with pytest.raises(DataError, match=r"/dev is where a disk is mounted, .* Give a folder inside of it\."):
        convert(source, "/dev", overwrite=True)
    assert not source.loaded


def test_overwrite_spares_folders_that_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(DataError, match=r"is not a shard folder .* --overwrite does not delete"):
        convert(birds(), tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(birds(), tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 6


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_someone_else_is_not_touched(tmp_path: Path, overwrite: bool) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "letters.txt").write_text("dear")
    with pytest.raises(DataError, match=r"out\.partial is in the way: .* got one with letters\.txt\. Move or delete"):
        convert(birds(), tmp_path / "out", overwrite=overwrite)
    assert [path.name for path in partial.iterdir()] == ["letters.txt"]


def test_out_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = birds()
    load = source.load

    def load_and_make(item: object) -> bytes:
        out.mkdir(exist_ok=True)
        (out / "mine").write_text("")
        return load(item)  # type: ignore[arg-type]

    source.load = load_and_make  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"out exists already\. .* the same command continues there\."):
        convert(source, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    rest = birds()
    convert(rest, out)
    assert rest.loaded == []


def test_lock_of_a_folder_that_was_removed_meanwhile_does_not_count(tmp_path: Path) -> None:
    first = PartialFolder(tmp_path / "out")
    first.__enter__()
    first.__exit__(RuntimeError, None, None)
    assert list(tmp_path.iterdir()) == []
    second = PartialFolder(tmp_path / "out")
    second.__enter__()
    with pytest.raises(DataError, match="Another conversion is writing"):
        PartialFolder(tmp_path / "out").__enter__()
    second.__exit__(RuntimeError, None, None)


def test_replaced_folder_comes_back_if_its_replacement_was_killed(out: Path, tmp_path: Path) -> None:
    before = contents(out)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    out.rename(partial / "replaced")
    with pytest.raises(DataError, match="out exists already"):
        convert(birds(), out)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_place_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.partial \(File name too long\)\. Give another --out"):
        convert(birds(), tmp_path / ("x" * 300))
