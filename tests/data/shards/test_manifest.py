"""A manifest is complete and consistent, or one error says what is wrong with which file."""

import dataclasses
import json
from pathlib import Path

import pytest

from gcahng.data.shards.manifest import ClassesFile, Manifest, ShardInfo, own_checksum, read_manifest_json
from gcahng.data.shards.reader import ShardSet
from gcahng.errors import DataError


def shard(number: int, split: str, num_samples: int) -> ShardInfo:
    return ShardInfo(f"{number}.tar", 10240, "a" * 64, num_samples, f"{number}.npy", "b" * 64, split)


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        version=2,
        source="folder",
        seed=3,
        window_bytes=1 << 20,
        shards=(shard(0, "train", 5), shard(1, "test", 2)),
        classes=ClassesFile("classes.jsonl", 3, "d" * 64),
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
    raw["shards"][1]["sha256"] = "c" * 64
    damage(tmp_path, shards=raw["shards"])
    assert Manifest.load(tmp_path).digest() != manifest.digest()


@pytest.mark.parametrize(("make", "got"), [(True, "a folder without a manifest"), (False, "no such folder")])
def test_missing_manifest_names_file_and_repair(tmp_path: Path, make: bool, got: str) -> None:
    directory = tmp_path / "shards"
    if make:
        directory.mkdir()
    with pytest.raises(DataError, match=rf"shards/manifest\.json is missing: .* got {got}.*did not finish.*again"):
        Manifest.load(directory)


def test_place_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json cannot be read \(File name too long\)\. Check"):
        ShardSet.open(tmp_path / ("x" * 300))


def test_not_json(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"version": 1,')
    with pytest.raises(DataError, match=r"manifest\.json is not readable JSON"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(("content", "got"), [('{"version": 1}', "1"), ('{"version": true}', "True"), ("[1]", "None")])
def test_wrong_version(tmp_path: Path, content: str, got: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=rf"expected version 2, got {got}\. Convert"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "three"}, r"`seed` is malformed: expected int, got three"),
        ({"splits": {"train": 5}}, r"`splits\.train` is malformed: .* got 5"),
        ({"shards": [{"name": "0.tar"}]}, r"an entry of `shards` is malformed: expected \{name: str"),
        ({"shards": [7]}, r"an entry of `shards` is malformed: expected \{name: str.* got 7"),
        ({"window_bytes": "8G"}, r"`window_bytes` is malformed: expected int, got 8G"),
        ({"seed": True}, r"`seed` is malformed: expected int, got True"),
        ({"classes": [7]}, r"`classes` is malformed: expected dict, got \[7\]"),
        ({"classes": {"name": 1}}, r"`classes` is malformed: expected \{name: str, count: int, sha256: str\}"),
    ],
)
def test_malformed_entries(manifest: Manifest, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    manifest.save(tmp_path)
    damage(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("shards", 0, "name"), "../0.tar", r"with a path: expected \[\], got \['\.\./0\.tar'\]"),
        (("shards", 0, "index_name"), "..", r"with a path: expected \[\], got \['\.\.'\]"),
        (("shards", 0, "name"), "a?b.tar", r"with a path: expected \[\], got \['a\?b\.tar'\]"),
        (("classes", "name"), "/etc/classes", r"with a path: expected \[\], got \['/etc/classes'\]"),
        (("shards", 0, "sha256"), "../../home/me/thesis", r"hexadecimal digits: expected \[\], got \['\.\./\.\./home"),
        (("shards", 1, "index_sha256"), "", r"hexadecimal digits: expected \[\], got \[''\]"),
        (("classes", "sha256"), "D" * 64, r"hexadecimal digits: expected \[\], got \['DDDD"),
        (("shards", 1, "name"), "0.tar", r"repeated file names: expected \[\], got \['0\.tar'\]"),
        (("classes", "name"), "manifest.json", r"repeated file names: expected \[\], got \['manifest\.json'\]"),
        (("shards", 1, "num_samples"), 0, r"shards without samples: expected \[\], got \['1\.tar'\]"),
        (("shards", 1, "bytes"), 0, r"shards without bytes: expected \[\], got \['1\.tar'\]"),
        (("window_bytes",), 0, r"window_bytes: expected at least 1, got 0"),
        (("splits", "train", "classes"), 9, r"splits with .* than all classes: expected \[\], got \['train'\]"),
        (("splits", "test", "classes"), 0, r"splits with fewer than 1 .*: expected \[\], got \['test'\]"),
        (("classes", "count"), 4, r"classes over all splits: expected at least 4, got 3"),
    ],
)
def test_contradictions(
    manifest: Manifest,
    tmp_path: Path,
    path: tuple[str | int, ...],
    value: object,
    message: str,
) -> None:
    manifest.save(tmp_path)
    raw = json.loads((tmp_path / "manifest.json").read_text())
    place = raw
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    damage(tmp_path, **raw)
    with pytest.raises(DataError, match=f"contradicts itself: .*{message}"):
        Manifest.load(tmp_path)


def test_split_counts_must_match_the_shards(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    damage(tmp_path, splits={"train": {"classes": 2, "images": 7}})
    with pytest.raises(DataError, match="images per split: expected .*'test': 2"):
        Manifest.load(tmp_path)


def test_digest_follows_windows_and_classes(manifest: Manifest) -> None:
    others = [
        dataclasses.replace(manifest, window_bytes=1),
        dataclasses.replace(manifest, classes=ClassesFile("classes.jsonl", 3, "ee")),
    ]
    assert len({manifest.digest(), *(other.digest() for other in others)}) == 3


def test_a_copy_under_another_name_is_called_by_its_place(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    copy = (tmp_path / "manifest.json").rename(tmp_path / "0f3a.copy")
    assert Manifest.load(copy, where="https://host/set/manifest.json") == manifest
    copy.write_text("{}")
    with pytest.raises(DataError, match=r"^https://host/set/manifest\.json: expected version 2, got None"):
        Manifest.load(copy, where="https://host/set/manifest.json")


def test_a_manifest_of_any_version_is_read_unchecked(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"version": 1, "source": "glyphs"}')
    assert read_manifest_json(tmp_path) == ({"version": 1, "source": "glyphs"}, str(tmp_path / "manifest.json"))


def test_own_checksum_covers_everything_but_itself(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    raw, _ = read_manifest_json(tmp_path)
    assert raw["manifest_sha256"] == own_checksum(raw)
    assert own_checksum(raw | {"manifest_sha256": ""}) == raw["manifest_sha256"]
    assert own_checksum(raw | {"seed": 4}) != raw["manifest_sha256"]
    assert own_checksum(raw | {"extra": {"skipped": [], "more": 1}}) != raw["manifest_sha256"]


def test_numbers_as_keys_are_signed_as_they_are_read(manifest: Manifest, tmp_path: Path) -> None:
    dataclasses.replace(manifest, extra={"images of size": {2: 1, 10: 3}}).save(tmp_path)
    raw, _ = read_manifest_json(tmp_path)
    assert raw["extra"] == {"images of size": {"2": 1, "10": 3}}
    assert raw["manifest_sha256"] == own_checksum(raw)
