"""The working folder of a conversion: what it takes over, what it leaves, what it does not touch."""

from pathlib import Path

import pytest
from conversion_cases import Pictures, contents, pictures

from gcahng.data.conversion.convert import convert
from gcahng.data.conversion.partial_folder import PartialFolder
from gcahng.errors import DataError


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


def test_linked_folder_is_replaced_by_a_folder(out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    convert(birds(), tmp_path / "link", seed=1, overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


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
