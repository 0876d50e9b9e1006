"""Shards: what is written is read back, by us and by webdataset; damage is found and named."""

import gc
import hashlib
import json
import os
import pickle
import shutil
import tarfile
import warnings
from collections.abc import Callable
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from gcahng.data.shards.index import INDEX_DTYPE
from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.writer import Sample, ShardWriter
from gcahng.data.stores.local import LocalStore
from gcahng.errors import DataError

SAMPLES = [
    Sample(
        image=bytes([number]) * (300 * (i + 1) + number),
        extension="jpg" if i % 2 else "png",
        class_name=f"{split} class {number}",
        split=split,
        source=f"{split}/{number}/{i}.jpg",
    )
    for split in ("train", "test")
    for number in range(3)
    for i in range(4)
]


def write(out: Path, samples: list[Sample] = SAMPLES, shard_bytes: int = 6000) -> Manifest:
    out.mkdir()
    with closing(ShardWriter(out, shard_bytes)) as writer:
        for sample in samples:
            writer.write(sample)
        return writer.finish("test", 7, {"note": 1})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "shards"
    write(out)
    return out


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_every_sample_is_read_back(written: Path) -> None:
    shards = ShardSet.open(written, verify=True)
    assert len(shards) == len(SAMPLES)
    for row, sample in enumerate(SAMPLES):
        assert shards.read(row) == sample.image
        assert shards.key(row) == f"{row:09d}"
        assert shards.source(row) == sample.source
        assert shards.classes[shards.class_ids([row])[0]].name == sample.class_name
        assert shards.meta(row) == {
            "class_id": int(shards.class_ids([row])[0]),
            "class_name": sample.class_name,
            "split": sample.split,
            "source": sample.source,
        }


def test_columns_and_splits(written: Path) -> None:
    shards = ShardSet.open(written)
    assert [shards.class_ids().dtype, shards.shard_of([0]).dtype] == ["i8", "i4"]
    assert shards.split_samples("train").tolist() == list(range(12))
    assert shards.split_samples("test").tolist() == list(range(12, 24))
    assert [c.split for c in shards.classes] == ["train"] * 3 + ["test"] * 3
    assert shards.manifest.splits["test"] == {"classes": 3, "images": 12}


def test_shards_keep_splits_apart_and_respect_the_size(written: Path) -> None:
    manifest = Manifest.load(written)
    assert len(manifest.shards) > 2
    for info in manifest.shards:
        content = (written / info.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (info.bytes, info.sha256)
        with tarfile.open(written / info.name) as tar:
            members = tar.getmembers()
            metas = [tar.extractfile(m) for m in members if m.name.endswith(".json")]
            splits = {json.load(meta)["split"] for meta in metas if meta is not None}
        assert splits == {info.split}
        assert {m.mtime for m in members} == {0}
        payload = sum(m.size for m in members)
        assert payload < 6000 + max(len(s.image) for s in SAMPLES) + 200


def test_webdataset_reads_the_shards(written: Path) -> None:
    import webdataset  # not above: the spawned process of another test would import it too

    urls = [str(written / info.name) for info in Manifest.load(written).shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        read = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert [s["__key__"] for s in read] == [f"{i:09d}" for i in range(len(SAMPLES))]
    for found, sample in zip(read, SAMPLES, strict=True):
        assert found[sample.extension] == sample.image
        assert json.loads(found["json"])["source"] == sample.source


def test_writing_twice_gives_equal_bytes(written: Path, tmp_path: Path) -> None:
    write(tmp_path / "again")
    for path in written.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_query_and_a_gallery_split_may_share_a_class(tmp_path: Path) -> None:
    samples = [Sample(b"x" * 9, "jpg", "shirt", split, split) for split in ("query", "gallery")]
    write(tmp_path / "out", samples)
    shards = ShardSet.open(tmp_path / "out")
    assert shards.class_ids().tolist() == [0, 0]
    assert [shards.split_samples(s).tolist() for s in ("query", "gallery")] == [[0], [1]]
    assert shards.manifest.splits["gallery"] == {"classes": 1, "images": 1}


def _read_all(shards: ShardSet) -> list[bytes]:
    return [shards.read(row) for row in range(len(shards))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_works_in_another_process_after_reading_here(written: Path, method: str) -> None:
    shards = ShardSet.open(written)
    here = _read_all(shards)
    with get_context(method).Pool(1) as pool:
        assert pool.apply(_digest_all, (str(written),)) == _digest(here)
    assert _read_all(pickle.loads(pickle.dumps(shards))) == here


def _digest(images: list[bytes]) -> str:
    return hashlib.sha256(b"".join(images)).hexdigest()


def _digest_all(directory: str) -> str:
    return _digest(_read_all(ShardSet.open(directory)))


def test_forked_child_shares_open_files(written: Path) -> None:
    shards = ShardSet.open(written)
    first = shards.read(0)
    child = os.fork()
    if child == 0:
        os._exit(0 if shards.read(0) == first and shards.read(5) == SAMPLES[5].image else 1)
    assert shards.read(5) == SAMPLES[5].image
    assert os.waitpid(child, 0)[1] == 0


def test_cut_shard_is_found_at_open(copied: Path) -> None:
    path = copied / "shard-000001.tar"
    size = path.stat().st_size
    os.truncate(path, 1024)  # at a block boundary: a tar reader sees the regular end of a file
    with pytest.raises(DataError, match=rf"shard-000001\.tar is cut: expected {size} bytes, got 1024\. Restore"):
        ShardSet.open(copied)


def test_too_long_shard(copied: Path) -> None:
    with (copied / "shard-000000.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"shard-000000\.tar is too long"):
        ShardSet.open(copied)


def test_missing_shard(copied: Path) -> None:
    (copied / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar cannot be read \(No such file"):
        ShardSet.open(copied)


def test_shard_that_vanishes_while_reading(copied: Path) -> None:
    shards = ShardSet.open(copied)
    (copied / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar cannot be read"):
        shards.read(0)


def test_shard_that_is_cut_while_reading(copied: Path) -> None:
    shards = ShardSet.open(copied)
    os.truncate(copied / "shard-000000.tar", 600)
    with pytest.raises(DataError, match=r"shard-000000\.tar ends inside of sample 000000001"):
        shards.read(1)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_flipped_byte_names_shard_and_key(copied: Path) -> None:
    shards = ShardSet.open(copied)
    row = 5
    name = shards.shard_name(row)
    flip(copied / name, shards.record(row).offset + 3)
    damaged = ShardSet.open(copied)  # sizes are right: found on reading, or by verify
    damaged.read(row - 1)
    with pytest.raises(DataError, match=rf"{name}: the image of sample 000000005 is damaged"):
        damaged.read(row)
    with pytest.raises(DataError, match=rf"{name} is damaged: expected sha256"):
        ShardSet.open(copied, verify=True)


def test_damaged_json_member(copied: Path) -> None:
    shards = ShardSet.open(copied)
    flip(copied / shards.manifest.shards[0].name, shards.record(1).meta_offset)
    with pytest.raises(DataError, match="JSON member of sample 000000001 is damaged"):
        shards.source(1)


def test_unknown_split(written: Path) -> None:
    with pytest.raises(DataError, match=r"Split 'dev' does not exist: expected .*\['test', 'train'\]"):
        ShardSet.open(written).split_samples("dev")


def test_damaged_index(copied: Path) -> None:
    flip(copied / "shard-000000.index.npy", 200)
    with pytest.raises(DataError, match=r"shard-000000\.index\.npy differs from the manifest"):
        ShardSet.open(copied)


def test_missing_index(copied: Path) -> None:
    (copied / "shard-000002.index.npy").unlink()
    with pytest.raises(DataError, match=r"shard-000002\.index\.npy cannot be read"):
        ShardSet.open(copied)


def _rows(change: Callable[[np.ndarray], None]) -> Callable[[np.ndarray], np.ndarray]:
    def apply(table: np.ndarray) -> np.ndarray:
        change(table)
        return table

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:-1], r"expected 4 rows of .*, got shape \(3,\)"),
        (lambda table: np.arange(3), r"expected 4 rows of .* got shape \(3,\) of int64"),
        (
            _rows(lambda t: t["block"].__setitem__(2, 10**6)),
            r"sample 000000002 lies outside of its shard: .* got offset 512000000",
        ),
        (_rows(lambda t: t["meta_length"].__setitem__(0, 0)), r"sample 000000000 lies outside"),
        (_rows(lambda t: t["block"].__setitem__(0, 0)), r"sample 000000000 lies outside .* got offset 0 and length"),
        (_rows(lambda t: t["class_id"].__setitem__(0, 5)), r"expected 3 classes in split 'train', got 4"),
        (_rows(lambda t: t["class_id"].__setitem__(0, 99)), r"expected class ids 0 to 5, got 0 to 99"),
        (b"nothing of the kind", r"is not a \.npy table"),
        (b"\x93NUMPY\x01\x00\x02\x00[\n", r"is not a \.npy table"),  # of these numpy raises what it does not document
        (b"\x93NUMPY\x01\x00\x47\x00{'descr':'<u4','fortran_order':False,'shape':(%d,)}\n" % 10**20, r"is not a \.npy"),
    ],
)
def test_index_that_contradicts_the_manifest(
    copied: Path, change: Callable[[np.ndarray], np.ndarray] | bytes, message: str
) -> None:
    path = copied / "shard-000000.index.npy"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        table = np.load(path)
        assert table.dtype == INDEX_DTYPE
        np.save(path, change(table))
    raw = json.loads((copied / "manifest.json").read_text())
    raw["shards"][0]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copied / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=message):
        ShardSet.open(copied)


class CountingStore(LocalStore):
    """A store of one's own: what a remote reader would replace."""

    reads = 0

    def read(self, name: str, offset: int, length: int) -> bytes:
        self.reads += 1
        return super().read(name, offset, length)


def test_another_store_serves_the_bytes(written: Path) -> None:
    store = CountingStore(written)
    shards = ShardSet.open(written, store=store)
    assert shards.read(2) == SAMPLES[2].image
    assert store.reads == 1
