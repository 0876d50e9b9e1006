"""Any tool that reads WebDataset tars reads ours: webdataset itself, Python's tarfile, GNU tar."""

import io
import json
import subprocess
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from tar_cases import open_tar

from gcahng.data.conversion.convert import convert
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.folder import Folder
from gcahng.data.tars.samples import tar_samples

SHAPES = {"bird": 5, "cat": 3, "dög": 4, "emu": 1, "fox": 6, "gnu": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted by the converter, into several tars: JPEG and PNG files, six classes, two splits."""
    folder = tmp_path_factory.mktemp("compatible")
    draws = np.random.default_rng(0)
    for name, count in SHAPES.items():
        (folder / "images" / name).mkdir(parents=True)
        for number in range(count):
            pixels = draws.integers(0, 256, (16, 20, 3), dtype=np.uint8)
            extension = "png" if number % 2 else "jpg"
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.{extension}")
    convert(Folder(folder / "images", seed=1), folder / "shards", seed=1, shard_bytes=6000)
    return folder / "shards"


@pytest.fixture(scope="module")
def shards(folder: Path) -> ShardSet:
    shards = ShardSet.open(folder)
    assert len(shards.manifest.shards) > 3 and len(shards) == sum(SHAPES.values())
    return shards


@pytest.fixture
def tars(folder: Path, shards: ShardSet) -> list[str]:
    return [str(folder / info.name) for info in shards.manifest.shards]


@pytest.fixture
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        yield


def image_of(sample: dict) -> object:
    return sample["jpg"] if "jpg" in sample else sample["png"]


@pytest.mark.usefixtures("_quiet")
def test_webdataset_decodes_every_sample(shards: ShardSet, tars: list[str]) -> None:
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in read] == [shards.key(row) for row in range(len(shards))]
    for row, sample in enumerate(read):
        class_id = int(shards.class_ids([row])[0])
        info = shards.classes[class_id]
        assert (sample["json"]["class_id"], sample["json"]["class_name"]) == (class_id, info.name)
        assert sample["json"] == shards.meta(row)
        want = Image.open(io.BytesIO(shards.read(row))).convert("RGB")
        assert np.array_equal(np.asarray(image_of(sample)), np.asarray(want))
        assert sample["__url__"].endswith(shards.shard_name(row))


@pytest.mark.usefixtures("_quiet")
def test_a_webdataset_pipeline_of_pairs(shards: ShardSet, tars: list[str]) -> None:
    """The usual one: pictures and classes, in batches."""
    pipeline = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg;png", "json")
    pairs = list(pipeline.map_tuple(np.asarray, lambda record: record["class_id"]).batched(4, partial=True))
    classes = np.concatenate([labels for _, labels in pairs])
    assert classes.tolist() == shards.class_ids().tolist()


def test_classes_lie_together_and_splits_apart(shards: ShardSet, tars: list[str]) -> None:
    """Read by nothing but tarfile and json."""
    found: list[tuple[str, str]] = []
    for path, info in zip(tars, shards.manifest.shards, strict=True):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert all(m.isreg() and m.mtime == 0 and m.uid == m.gid == 0 for m in members)
            assert len(members) == 2 * info.num_samples
            names = [m.name for m in members]
            assert [n.partition(".")[0] for n in names[::2]] == [n.partition(".")[0] for n in names[1::2]]
            records = [json.load(tar.extractfile(m)) for m in members if m.name.endswith(".json")]
        assert {record["split"] for record in records} == {info.split}
        found += [(record["split"], record["class_name"]) for record in records]
    changes = [new for old, new in zip([None, *found], found, strict=False) if new != old]
    assert len(changes) == len(set(changes)) == len(SHAPES)
    assert {name: sum(name == other for _, other in found) for name in SHAPES} == SHAPES
    of_split: dict[str, set[str]] = {}
    for split, name in changes:
        of_split.setdefault(split, set()).add(name)
    assert of_split["train"].isdisjoint(of_split["test"])


def test_gnu_tar_lists_and_extracts(shards: ShardSet, tars: list[str], tmp_path: Path) -> None:
    listed: list[str] = []
    for path in tars:
        ended = subprocess.run(["tar", "tvf", path], capture_output=True, text=True, timeout=30, check=True)
        assert ended.stderr == ""  # no word of a lone zero block, or of what is unknown
        listed += [line.split()[-1] for line in ended.stdout.splitlines()]
        subprocess.run(["tar", "xf", path, "-C", tmp_path], timeout=30, check=True)
    assert [Path(name).stem for name in listed[::2]] == [shards.key(row) for row in range(len(shards))]
    for row in range(len(shards)):
        (image,) = [file for file in tmp_path.glob(f"{shards.key(row)}.*") if file.suffix != ".json"]
        assert image.read_bytes() == shards.read(row)


def test_our_strict_reader_agrees_with_the_index(shards: ShardSet, tars: list[str]) -> None:
    row = 0
    for path in tars:
        for sample in tar_samples(open_tar(Path(path))):
            assert sample.key == shards.key(row)
            (image,) = [content for extension, content in sample.members.items() if extension != "json"]
            assert image == shards.read(row)
            row += 1
    assert row == len(shards)
