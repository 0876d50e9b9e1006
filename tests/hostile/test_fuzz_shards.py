"""Manifests, indexes, class lists and shards that a stranger may have made, their checksums made to fit."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from fuzzing import encode_tree, fuzz, many, mutate_bytes, mutate_tree
from shard_cases import samples_of, write_shards

from gcahng.data.images.decode import decode_picture
from gcahng.data.shards.class_list import load_classes
from gcahng.data.shards.index import INDEX_DTYPE, encode_index, load_index
from gcahng.data.shards.info import describe, describe_text
from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.verify import verify
from gcahng.errors import DataError

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of three classes; never written to."""
    path = tmp_path_factory.mktemp("fuzz") / "shards"
    samples = [
        *samples_of("train", "one", 3, 0),
        *samples_of("train", "two", 2, 9),
        *samples_of("test", "three", 2, 20),
    ]
    write_shards(path, samples)
    return path


@pytest.fixture
def copy(folder: Path, fast_folder: Path) -> Path:
    return Path(shutil.copytree(folder, fast_folder / "copy"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@many(2000)
def test_manifest(copy: Path, examples: int, record_property: Record) -> None:
    tree = json.loads((copy / "manifest.json").read_text())

    def read(draw: Random) -> None:
        (copy / "manifest.json").write_bytes(encode_tree(draw, mutate_tree(draw, tree)))
        Manifest.load(copy)

    tally = fuzz("manifest", examples, read, record_property)
    assert tally.tried >= examples and 0 < tally.refused < tally.tried


@many(800)
def test_folder_with_another_manifest(copy: Path, examples: int, record_property: Record) -> None:
    """All that opens a folder and looks at it: what is accepted must be readable, or refused when it is read."""
    tree = json.loads((copy / "manifest.json").read_text())

    def read(draw: Random) -> None:
        (copy / "manifest.json").write_bytes(encode_tree(draw, mutate_tree(draw, tree)))
        read_all(copy)
        if draw.randint(0, 7) == 0:
            verify(copy)
            describe_text(describe(ShardSet.open(copy), "there"))

    assert fuzz("shard folder by its manifest", examples, read, record_property).refused


def read_all(folder: Path) -> None:
    shards = ShardSet.open(folder)
    for split in shards.manifest.splits:
        shards.class_runs(split)
    for row in range(len(shards)):
        decode_picture(shards.read(row), name="an image")
        shards.meta(row)
    assert all(0 <= info.class_id < len(shards.classes) for info in shards.classes)


@many(1500)
def test_class_list(copy: Path, examples: int, record_property: Record) -> None:
    file = Manifest.load(copy).classes
    rows = [json.loads(line) for line in (copy / file.name).read_bytes().splitlines()]

    def read(draw: Random) -> None:
        changed = mutate_tree(draw, rows)
        lines = [encode_tree(draw, row) for row in changed] if isinstance(changed, list) else [b"x"]
        content = b"\n".join(lines) + b"\n" * draw.randint(0, 1)
        (copy / file.name).write_bytes(content)
        count = draw.choice((len(lines), content.count(b"\n"), 1 << 62))
        list(load_classes(copy / file.name, replace(file, sha256=sha256(content), count=count)))

    assert fuzz("class list", examples, read, record_property).refused


@many(1500)
def test_index(copy: Path, examples: int, record_property: Record) -> None:
    shard = Manifest.load(copy).shards[0]
    table = np.load(copy / shard.index_name)

    def read(draw: Random) -> None:
        content = changed_index(draw, table)
        (copy / shard.index_name).write_bytes(content)
        found = load_index(copy / shard.index_name, replace(shard, index_sha256=sha256(content)))
        assert found.dtype == INDEX_DTYPE and len(found) == shard.num_samples

    assert fuzz("index", examples, read, record_property).refused


def changed_index(draw: Random, table: np.ndarray) -> bytes:
    rows = table.copy()
    for _ in range(draw.randint(0, 2)):
        name = draw.choice(INDEX_DTYPE.names)
        largest = (1 << 31) - 1 if name == "class_id" else (1 << 32) - 1
        rows[name][draw.randint(0, len(rows) - 1)] = draw.choice((0, 1, 2, 3, 1 << 20, largest - 1, largest))
    content = encode_index([tuple(row.tolist()) for row in rows])
    return mutate_bytes(draw, content) if draw.randint(0, 1) else content


@many(300)
def test_shards(copy: Path, examples: int, record_property: Record) -> None:
    """Other bytes in tar and index, with checksums that say so: the reader, and `shards.verify`."""
    manifest = Manifest.load(copy)
    shard = manifest.shards[0]
    table, tar = np.load(copy / shard.index_name), (copy / shard.name).read_bytes()

    def read(draw: Random) -> None:
        index = changed_index(draw, table) if draw.randint(0, 1) else encode_index([tuple(r.tolist()) for r in table])
        changed = mutate_bytes(draw, tar)
        (copy / shard.index_name).write_bytes(index)
        (copy / shard.name).write_bytes(changed)
        fitting = replace(shard, bytes=len(changed), sha256=sha256(changed), index_sha256=sha256(index))
        replace(manifest, shards=(fitting, *manifest.shards[1:])).save(copy)
        report = verify(copy, decode=draw.randint(0, 1) == 1)
        assert report.is_whole == (report.faults == ())
        read_all(copy)

    assert fuzz("shards", examples, read, record_property).refused


def test_the_reader_itself_can_fail(record_property: Record) -> None:
    """What fuzzing is for: another error than ours, and an input that takes all memory, fail the test."""

    def raises(draw: Random) -> None:
        if draw.randint(0, 3) == 3:
            raise KeyError("name")
        raise DataError("refused")

    with pytest.raises(KeyError):
        fuzz("nothing", 200, raises, lambda *_: None)

    def fills(draw: Random) -> None:
        assert bytes((4 << 30) + draw.randint(0, 3)) is None

    with pytest.raises(MemoryError):
        fuzz("nothing", 20, fills, lambda *_: None)
