"""A manifest is complete and consistent, or one error says what is wrong with which file."""

import json
from pathlib import Path

import pytest

from gcahng.data.shards.manifest import ClassInfo, Manifest, ShardInfo
from gcahng.errors import DataError


def shard(number: int, split: str, num_samples: int) -> ShardInfo:
    return ShardInfo(f"{number}.tar", 10240, "aa", num_samples, f"{number}.npy", "bb", split)


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        version=1,
        source="folder",
        seed=3,
        shards=(shard(0, "train", 5), shard(1, "test", 2)),
        classes=(
            ClassInfo(0, "sparrow", "train", 3),
            ClassInfo(1, "wren \u00e9", "train", 2),
            ClassInfo(2, "finch", "test", 2),
        ),
        splits={"train": {"classes": 2, "images": 5}, "test": {"classes": 1, "images": 2}},
        extra={"skipped": []},
    )


def damage(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps(raw))


def test_saved_manifest_loads_equal(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert manifest.num_samples == 7


def test_digest_follows_the_bytes_only(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    damage(tmp_path, extra={"note": "other"})
    assert Manifest.load(tmp_path).digest() == manifest.digest()
    raw = json.loads((tmp_path / "manifest.json").read_text())
    raw["shards"][1]["sha256"] = "cc"
    damage(tmp_path, shards=raw["shards"])
    assert Manifest.load(tmp_path).digest() != manifest.digest()


@pytest.mark.parametrize(("make", "got"), [(True, "a folder without a manifest"), (False, "no such folder")])
def test_missing_manifest_names_file_and_repair(tmp_path: Path, make: bool, got: str) -> None:
    directory = tmp_path / "shards"
    if make:
        directory.mkdir()
    with pytest.raises(DataError, match=rf"shards/manifest\.json is missing: .* got {got}.*did not finish.*again"):
        Manifest.load(directory)


def test_not_json(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"version": 1,')
    with pytest.raises(DataError, match=r"manifest\.json is not readable JSON"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(("content", "got"), [('{"version": 9}', "9"), ("[1]", "None")])
def test_wrong_version(tmp_path: Path, content: str, got: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=rf"expected version 1, got {got}\. Convert"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "three"}, r"`seed` is malformed: expected int, got three"),
        ({"splits": {"train": 5}}, r"`splits\.train` is malformed: .* got 5"),
        ({"shards": [{"name": "0.tar"}]}, r"ShardInfo is malformed: expected \{name: str"),
        ({"classes": [7]}, r"ClassInfo is malformed: .* got 7"),
    ],
)
def test_malformed_entries(manifest: Manifest, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    manifest.save(tmp_path)
    damage(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("table", "row", "field", "value", "message"),
    [
        ("shards", 0, "name", "../0.tar", r"with a path: expected \[\], got \['\.\./0\.tar'\]"),
        ("shards", 1, "name", "0.tar", r"repeated file names: expected \[\], got \['0\.tar'\]"),
        ("classes", 1, "class_id", 5, r"class ids: expected 0\.\.2, got \[0, 5, 2\]"),
        ("classes", 1, "name", "finch", r"repeated class names: expected \[\], got \['finch'\]"),
        ("classes", 0, "num_samples", 4, r"samples of all classes: expected 7, got 8"),
        ("classes", 0, "split", "dev", r"splits of classes: expected \[\], got \['dev'\]"),
    ],
)
def test_contradictions(
    manifest: Manifest,
    tmp_path: Path,
    table: str,
    row: int,
    field: str,
    value: object,
    message: str,
) -> None:
    manifest.save(tmp_path)
    raw = json.loads((tmp_path / "manifest.json").read_text())
    raw[table][row][field] = value
    damage(tmp_path, **{table: raw[table]})
    with pytest.raises(DataError, match=f"contradicts itself: .*{message}"):
        Manifest.load(tmp_path)


def test_split_counts_must_match_the_shards(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    damage(tmp_path, splits={"train": {"classes": 2, "images": 7}})
    with pytest.raises(DataError, match="images per split: expected .*'test': 2"):
        Manifest.load(tmp_path)
