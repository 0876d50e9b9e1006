"""`ShardSet` over many shards: rows, classes and runs, against plain lists; small pickles and bounded files."""

import os
import pickle
import resource
import shutil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from shard_cases import edit_manifest, samples_of, write_indexes, write_shards

from gcahng.data.shards import reader
from gcahng.data.shards.index_tables import IndexTables
from gcahng.data.shards.reader import ShardSet
from gcahng.data.stores.local import LocalStore
from gcahng.errors import DataError, InputError

Shards = list[tuple[str, list[int]]]


def random_shards(seed: int) -> tuple[Shards, int]:
    """Shards of two splits in any order; runs of random length, also over the ends of shards."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(3, 30))
    splits = {"train": rng.integers(0, num_classes, 40), "test": rng.integers(0, num_classes, 40)}
    splits["train"] = np.concatenate([np.arange(num_classes), splits["train"]])
    rows = {split: np.repeat(ids, rng.integers(1, 9, ids.size)).tolist() for split, ids in splits.items()}
    shards: Shards = []
    while any(rows.values()):
        split = str(rng.choice([s for s in rows if rows[s]]))
        count = int(rng.integers(1, 40))
        shards.append((split, rows[split][:count]))
        rows[split] = rows[split][count:]
    return shards, num_classes


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("slots", [1, 3, 256])
def test_rows_classes_and_runs(tmp_path: Path, seed: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IndexTables, "_SLOTS", slots)
    content, num_classes = random_shards(seed)
    write_indexes(tmp_path / "set", content, num_classes)
    shards = ShardSet.open(tmp_path / "set")
    flat = [(position, split, label) for position, (split, ids) in enumerate(content) for label in ids]
    labels = np.array([label for *_, label in flat])
    assert len(shards) == len(flat)
    assert np.array_equal(shards.class_ids(), labels)
    asked = np.random.default_rng(seed).integers(0, len(flat), 90)
    assert np.array_equal(shards.class_ids(asked), labels[asked])
    assert np.array_equal(shards.shard_of(asked), [flat[row][0] for row in asked])
    assert [shards.key(int(row)) for row in asked[:9]] == [f"{row:09d}" for row in asked[:9]]
    for split in ("train", "test"):
        rows = [row for row, (_, of, _) in enumerate(flat) if of == split]
        assert shards.split_samples(split).tolist() == rows
        assert shards.split_shards(split).tolist() == [i for i, (of, _) in enumerate(content) if of == split]
        runs: list[list[int]] = []
        for row in rows:
            if runs and runs[-1][0] == labels[row] and row == runs[-1][1] + runs[-1][2]:
                runs[-1][2] += 1
            else:
                runs.append([int(labels[row]), row, 1])
        found = shards.class_runs(split)
        assert [part.dtype for part in found] == ["i8"] * 3
        assert np.stack(found, axis=1).tolist() == runs


def test_class_ids_of_no_rows(tmp_path: Path) -> None:
    write_indexes(tmp_path / "set", [("train", [0, 0, 1])], 2)
    found = ShardSet.open(tmp_path / "set").class_ids([])
    assert found.shape == (0,) and found.dtype == np.int64


@pytest.mark.parametrize("row", [-1, 3, 10**12])
def test_rows_that_do_not_exist(tmp_path: Path, row: int) -> None:
    write_indexes(tmp_path / "set", [("train", [0, 0, 1])], 2)
    shards = ShardSet.open(tmp_path / "set")
    message = rf"Row {row} does not exist: expected 0 to 2 in .*set\. Take rows"
    for ask in (shards.key, shards.read, shards.record, shards.shard_name, shards.meta):
        with pytest.raises(InputError, match=message):
            ask(row)
    for ask_many in (shards.class_ids, shards.shard_of):
        with pytest.raises(InputError, match=message):
            ask_many([0, row])


def test_pickle_holds_no_rows_and_opens_elsewhere(tmp_path: Path) -> None:
    rows = 20_000
    write_indexes(tmp_path / "set", [("train", [i] * rows) for i in range(4)], 4)
    shards = ShardSet.open(tmp_path / "set")
    shards.class_ids()
    content = pickle.dumps(shards)
    assert len(content) < 5000  # the indexes have 2 MB
    assert np.array_equal(pickle.loads(content).class_ids(), shards.class_ids())
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(_facts, (shards,)) == (4 * rows, [0, 2, 3], "class 3")


def _facts(shards: ShardSet) -> tuple[int, list[int], str]:
    return len(shards), shards.class_ids([0, 59_999, 79_999]).tolist(), shards.classes[3].name


def test_more_shards_than_a_process_may_have_files(tmp_path: Path) -> None:
    write_indexes(tmp_path / "set", [("train", [i, i]) for i in range(400)], 400)
    context = get_context("fork")
    worker = context.Process(target=_read_with_few_files, args=(tmp_path / "set",))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0


def _read_with_few_files(folder: Path) -> None:
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 300, used + 300))
    shards = ShardSet.open(folder)
    assert shards.class_ids().tolist() == [i for i in range(400) for _ in range(2)]
    assert shards.class_ids([799, 0, 13]).tolist() == [399, 0, 6]


def test_tables_are_mapped_and_read_only(tmp_path: Path) -> None:
    write_indexes(tmp_path / "set", [("train", [0, 0, 1])], 2)
    shards = ShardSet.open(tmp_path / "set")
    (again,) = pickle.loads(pickle.dumps(shards))._tables._paths
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(again)) == 1
    tables = [shards._tables[0], pickle.loads(pickle.dumps(shards))._tables[0]]
    assert Path("/proc/self/maps").read_text().count(str(again)) == 2
    assert np.array_equal(*tables) and not any(table.flags.writeable for table in tables)


class RecordingStore(LocalStore):
    """Gives copies away under other names, as a cache does, and remembers what it was told."""

    def __init__(self, directory: Path, cache: Path) -> None:
        super().__init__(directory)
        self.location = "https://host/set"
        self.cache = cache
        self.asked: list[tuple[str, str | None]] = []
        self.expected: list[tuple[list[str], list[str]]] = []

    def local_copy(self, name: str, sha256: str | None = None) -> Path:
        self.asked.append((name, sha256))
        return Path(shutil.copy(self.directory / name, self.cache / f"copy-of-{name}"))

    def expect(self, present, following) -> None:  # type: ignore[no-untyped-def]
        self.expected.append((list(present), list(following)))


@pytest.fixture
def recording(tmp_path: Path) -> RecordingStore:
    samples = [s for i in range(4) for s in samples_of("train", f"bird {i}", 3, 10 * i)]
    write_shards(tmp_path / "set", samples, shard_bytes=4000)
    (tmp_path / "cache").mkdir()
    return RecordingStore(tmp_path / "set", tmp_path / "cache")


def test_small_files_come_through_the_store(recording: RecordingStore) -> None:
    shards = ShardSet.open("nowhere", store=recording)
    manifest = shards.manifest
    assert recording.asked == [
        ("manifest.json", None),
        (manifest.classes.name, manifest.classes.sha256),
        *((info.index_name, info.index_sha256) for info in manifest.shards),
    ]
    assert shards.classes[0].name == "bird 0"
    assert shards.source(4) == "train/bird 1/1"


def test_a_copy_that_was_cleared_away_is_fetched_again(
    recording: RecordingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IndexTables, "_SLOTS", 1)
    shards = ShardSet.open("nowhere", store=recording)
    for path in recording.cache.glob("*.npy"):
        path.unlink()
    assert shards.class_ids().tolist() == [i for i in range(4) for _ in range(3)]


def test_an_index_that_was_replaced_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IndexTables, "_SLOTS", 1)
    content: Shards = [("train", [0, 0, 1]), ("train", [1, 1, 1])]
    write_indexes(tmp_path / "set", content, 2)
    shards = pickle.loads(pickle.dumps(ShardSet.open(tmp_path / "set")))
    path = tmp_path / "set" / "0.npy"
    same = path.read_bytes()
    path.unlink()
    path.write_bytes(same)  # another file with the right content
    assert shards.class_ids().tolist() == [0, 0, 1, 1, 1, 1]
    path.unlink()
    write_indexes(tmp_path / "other", [("train", [0, 1, 1])], 2)
    shutil.copy(tmp_path / "other" / "0.npy", path)
    with pytest.raises(DataError, match=r"0\.npy differs from the manifest: expected sha256"):
        shards.class_ids()


def test_messages_name_the_place_and_not_the_copy(recording: RecordingStore) -> None:
    edit_manifest(recording.directory, lambda raw: raw.update(version=1))
    with pytest.raises(DataError, match=r"^https://host/set/manifest\.json: expected version 2, got 1\. Convert"):
        ShardSet.open("nowhere", store=recording)


def test_expect_names_the_shards(recording: RecordingStore) -> None:
    shards = ShardSet.open("nowhere", store=recording)
    shards.expect(np.array([1, 0]), np.array([], dtype=np.int64))
    names = [info.name for info in shards.manifest.shards]
    assert len(names) > 1
    assert recording.expected == [([names[1], names[0]], [])]


def test_a_class_without_samples(tmp_path: Path) -> None:
    write_indexes(tmp_path / "set", [("train", [0, 1]), ("test", [1, 1]), ("query", [0, 1])], 3)
    with pytest.raises(DataError, match=r"contradict the manifest: a class of 3 has no sample"):
        ShardSet.open(tmp_path / "set")


def test_hash_blocks_cover_the_whole_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_HASH_BLOCK", 1000)
    write_shards(tmp_path / "set", samples_of("train", "bird", 3, 0) + samples_of("train", "wren", 3, 9))
    ShardSet.open(tmp_path / "set", verify=True)
    tar = sorted((tmp_path / "set").glob("*.tar"))[-1]
    whole = tar.read_bytes()
    for place in (0, 999, 1000, len(whole) - 1):
        tar.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match="is damaged: expected sha256"):
            ShardSet.open(tmp_path / "set", verify=True)
