"""The writer: the bytes of webdataset's own writer, and where tars begin and end."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from gcahng.data.shards.manifest import Manifest, ShardInfo
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.writer import Sample, ShardWriter


def sample(class_name: str, split: str, size: int = 400, name: str = "x", **columns: str) -> Sample:
    return Sample(bytes([len(name)]) * size, "jpg", class_name, split, name, columns)


def write(directory: Path, samples: Sequence[Sample], shard_bytes: int, **columns: dict[str, str]) -> Manifest:
    directory.mkdir()
    writer = ShardWriter(directory, shard_bytes)
    for one in samples:
        writer.write(one)
    return writer.finish("test", 3, {"note": 1}, 77, columns)


def test_tars_are_those_of_webdataset(tmp_path: Path) -> None:
    import webdataset

    samples = [sample("a", "train", size, f"{size}") for size in (1, 511, 512, 513, 9000)]
    write(tmp_path / "out", samples, 1 << 20)
    buffer = io.BytesIO()
    writer = webdataset.TarWriter(buffer, encoder=False, mtime=0)
    for key, one in enumerate(samples):
        meta = {"class_id": 0, "class_name": "a", "split": "train", "source": one.source}
        writer.write({"__key__": f"{key:09d}", "jpg": one.image, "json": json.dumps(meta).encode()})
    writer.close()
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == buffer.getvalue()


def classes_of_tars(directory: Path) -> list[list[str]]:
    found = []
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = [tar.extractfile(m) for m in tar.getmembers() if m.name.endswith(".json")]
            found.append([json.load(file)["class_name"] for file in files if file])
    return found


def expected_tars(samples: Sequence[Sample], shard_bytes: int) -> list[list[str]]:
    """The rule once more: a sample of 400 bytes takes 4 blocks, header and content of image and JSON each."""
    tars: list[list[Sample]] = []
    for one in samples:
        size = 4 * 512 * len(tars[-1]) if tars else 0
        last = tars[-1][-1] if tars else one
        limit = shard_bytes if one.class_name != last.class_name else 2 * shard_bytes
        if not tars or one.split != last.split or size >= limit:
            tars.append([])
        tars[-1].append(one)
    return [[one.class_name for one in tar] for tar in tars]


@pytest.mark.parametrize("shard_bytes", [1, 2048, 2049, 5000, 9000, 20_000, 1 << 20])
def test_a_tar_ends_with_a_class_unless_the_class_is_big(tmp_path: Path, shard_bytes: int) -> None:
    sizes = {"train": (3, 1, 12, 2, 2, 5, 1), "query": (4, 2), "gallery": (1, 9)}
    samples = [
        sample(f"{split} {number}", split)
        for split, counts in sizes.items()
        for number, n in enumerate(counts)
        for _ in range(n)
    ]
    write(tmp_path / "out", samples, shard_bytes)
    assert classes_of_tars(tmp_path / "out") == expected_tars(samples, shard_bytes)


def test_class_ids_count_in_order_of_appearance(tmp_path: Path) -> None:
    samples = [sample("z", "train"), sample("b", "train"), sample("m", "query"), sample("m", "gallery")]
    manifest = write(tmp_path / "out", samples, 1 << 20, z={"super": "bird"})
    shards = ShardSet.open(tmp_path / "out", verify=True)
    assert [(c.name, c.split, c.num_samples, dict(c.columns)) for c in shards.classes] == [
        ("z", "train", 1, {"super": "bird"}),
        ("b", "train", 1, {}),
        ("m", "query", 2, {}),
    ]
    assert manifest.splits == {
        "train": {"classes": 2, "images": 2},
        "query": {"classes": 1, "images": 1},
        "gallery": {"classes": 1, "images": 1},
    }
    assert (manifest.window_bytes, manifest.seed, manifest.extra) == (77, 3, {"note": 1})


def test_columns_are_in_the_json_member_where_there_are_any(tmp_path: Path) -> None:
    write(tmp_path / "out", [sample("a", "train", view="left"), sample("a", "train")], 1 << 20)
    shards = ShardSet.open(tmp_path / "out")
    assert shards.meta(0)["columns"] == {"view": "left"}
    assert "columns" not in shards.meta(1)


def test_names_that_are_no_text_survive(tmp_path: Path) -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    write(tmp_path / "out", [sample(name, "train", name=name)], 1 << 20)
    shards = ShardSet.open(tmp_path / "out")
    assert (shards.meta(0)["class_name"], shards.source(0), shards.classes[0].name) == (name, name, name)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_writer_goes_on_after_finished_tars(tmp_path: Path, count: int) -> None:
    samples = [sample(f"{split} {i // 3}", split) for split in ("train", "test") for i in range(9)]
    finished: list[tuple[ShardInfo, int]] = []
    directory = tmp_path / "out"
    directory.mkdir()
    whole = write(tmp_path / "whole", samples, 3000)
    first = ShardWriter(directory, 3000, lambda shard: finished.append((shard, first.num_samples)))
    for one in samples[:14]:
        first.write(one)
    first.close()
    assert len(finished) >= 3
    second = ShardWriter(directory, 3000)
    start = finished[count - 1][1] if count else 0
    second.resume([shard for shard, _ in finished[:count]], [(s.class_name, s.split) for s in samples[:start]])
    for one in samples[start:]:
        second.write(one)
    assert second.finish("test", 3, {"note": 1}, 77) == whole
    for path in (tmp_path / "whole").iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()
