import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from gcahng.data.stores.cache_folder import CacheFolder
from gcahng.data.stores.cache_room import make_room
from gcahng.data.stores.file_lock import lock_file
from gcahng.data.stores.store import FileFacts

# Names and ages (larger is older): neither the names' order nor the order of writing.
AGES = {"b": 3, "c": 1, "a": 4, "d": 2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four shards of 100 bytes and a set that nobody reads, 50 bytes, older than all but one."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "sets" / "old").mkdir(parents=True)
    (tmp_path / "sets" / "old" / "in_use").touch()
    (tmp_path / "sets" / "old" / "index").write_bytes(bytes(50))
    for name, age in AGES.items():
        path = tmp_path / "shards" / name
        path.write_bytes(bytes(100))
        os.utime(path, (10_000 - age, 10_000 - age))
    for path in (tmp_path / "sets" / "old").iterdir():
        os.utime(path, (10_000 - 3.5, 10_000 - 3.5))
    return tmp_path


def left(root: Path) -> set[str]:
    return {path.name for path in root.rglob("*") if path.is_file()} - {"in_use"}


@pytest.mark.parametrize(
    ("needed", "gone"),
    [(0, ""), (50, ""), (51, "a"), (150, "a"), (151, "a index"), (201, "a index b"), (500, "a index b c d")],
)
def test_the_oldest_go_first_and_no_more_than_needed(root: Path, needed: int, gone: str) -> None:
    assert make_room(root, needed, 500, own_set="new")
    assert left(root) == {"a", "b", "c", "d", "index"} - set(gone.split())


def test_nothing_goes_where_it_would_not_be_enough(root: Path) -> None:
    assert not make_room(root, 501, 500, own_set="new")
    assert not make_room(root, 300, 500, {"a", "b", "c"}, own_set="new")
    assert left(root) == {"a", "b", "c", "d", "index"}


def test_what_is_given_goes_last_and_in_order(root: Path) -> None:
    assert make_room(root, 200, 500, {"c"}, ["b", "a"], own_set="new")
    assert left(root) == {"a", "b", "c"}
    assert make_room(root, 300, 500, {"c"}, ["b", "a"], own_set="new")
    assert left(root) == {"a", "c"}


def test_sets_in_use_and_files_being_fetched_stay(root: Path) -> None:
    in_use = lock_file(root / "sets" / "old" / "in_use", wait=False, shared=True)
    part = lock_file(root / "shards" / "e.part", wait=False)
    assert in_use is not None
    assert part is not None
    os.ftruncate(part.handle, 100)
    assert not make_room(root, 351, 500, own_set="new")
    assert make_room(root, 350, 500, own_set="new")
    assert left(root) == {"index", "e.part"}
    part.close()
    in_use.close()
    assert make_room(root, 500, 500, own_set="new")
    assert left(root) == set()


def test_the_own_set_stays(root: Path) -> None:
    assert not make_room(root, 451, 500, own_set="old")
    assert make_room(root, 450, 500, own_set="old")
    assert left(root) == {"index"}


def test_a_disk_that_holds_less_than_the_bound(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 % of its 10000 bytes stay free, so that 300 more bytes ask for 150 of the 450 that are there."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10_000, free=350))
    assert make_room(root, 300, 1 << 40, own_set="new")
    assert left(root) == {"b", "c", "d"}
    assert not make_room(root, 10_000, 1 << 40, own_set="new")
    assert left(root) == {"b", "c", "d"}


def test_a_shard_that_another_process_finished_meanwhile(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path / "cache", 1000, "set")
    facts = FileFacts(100, "a" * 64)
    draft = cache.begin_shard(facts, [], [])
    assert not isinstance(draft, str)
    assert cache.begin_shard(facts, [], []) == "elsewhere"
    draft.write(0, bytes(100))
    draft.finish()
    assert cache.begin_shard(facts, [], []) == "here"
    assert cache.begin_shard(FileFacts(901, "b" * 64), [facts], []) == "no room"
    assert [path.name for path in (tmp_path / "cache" / "shards").iterdir()] == [facts.sha256]
