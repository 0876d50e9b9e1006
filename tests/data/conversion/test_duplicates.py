"""Duplicates, compared with a dictionary that holds every image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conversion_cases import encoded, pictures

from gcahng.data.conversion.convert import convert, summary
from gcahng.data.conversion.duplicates import NUM_EXAMPLES, find_duplicates, image_digest
from gcahng.data.sources.source import SourceItem
from gcahng.errors import DataError


def counted(images: Sequence[bytes], class_ids: Sequence[int], is_train: Sequence[bool]) -> tuple[int, int, int]:
    """Within a class, across classes, across splits: image by image."""
    places: dict[bytes, dict[bool, dict[int, int]]] = {}
    for image, class_id, train in zip(images, class_ids, is_train, strict=True):
        classes = places.setdefault(image, {}).setdefault(train, {})
        classes[class_id] = classes.get(class_id, 0) + 1
    sides = [classes for both in places.values() for classes in both.values()]
    within = sum(count - 1 for classes in sides for count in classes.values())
    across = sum(len(classes) - 1 for classes in sides)
    leaked = sum(sum(both[False].values()) for both in places.values() if True in both and False in both)
    return within, across, leaked


@pytest.mark.parametrize("seed", range(30))
def test_counts_are_those_of_a_plain_loop(seed: int) -> None:
    draws = np.random.default_rng(seed)
    count = int(draws.integers(0, 60))
    images = [bytes([number]) for number in draws.integers(0, 1 + seed * 3, count)]
    class_ids = draws.integers(0, 5, count).astype(np.int32)
    is_train = draws.random(count) < 0.5
    digests = np.frombuffer(b"".join(map(image_digest, images)), dtype="<u8").reshape(-1, 2)
    found = find_duplicates(digests, class_ids, is_train)
    pairs = (found.within_class, found.across_classes, found.across_splits)
    assert tuple(map(len, pairs)) == counted(images, class_ids.tolist(), is_train.tolist())
    for kind, same_class, same_side in (
        (found.within_class, True, True),
        (found.across_classes, False, True),
        (found.across_splits, None, False),
    ):
        assert (np.diff(kind[:, 1]) >= 0).all()
        for first, second in kind.tolist():
            assert images[first] == images[second]
            assert (is_train[first] == is_train[second]) == same_side
            assert same_class in (None, class_ids[first] == class_ids[second])
            assert is_train[first] or same_side


def test_digests_that_share_their_first_half_differ() -> None:
    digests = np.array([[5, 1], [5, 2], [5, 1]], dtype=np.uint64)
    found = find_duplicates(digests, np.zeros(3, np.int32), np.ones(3, bool))
    assert found.within_class.tolist() == [[0, 2]]
    assert (len(found.across_classes), len(found.across_splits)) == (0, 0)


def test_examples_name_class_split_and_image(tmp_path: Path) -> None:
    source = pictures({"train": ["owl", "gull"], "query": ["crow"], "gallery": ["crow"]}, images=3)
    same = encoded(1)
    source.contents = {"train/owl/0": same, "train/owl/2": same, "train/gull/1": same, "gallery/crow/2": same}
    out = tmp_path / "out"
    manifest = convert(source, out, shard_bytes=5000)
    duplicates = dict(manifest.extra["duplicates"])
    examples = duplicates.pop("examples")
    assert duplicates == {"within_class": 1, "across_classes": 1, "across_splits": 1}
    owls = [{"class": "owl", "split": "train", "source": f"train/owl/{i}"} for i in (0, 2)]
    gull = {"class": "gull", "split": "train", "source": "train/gull/1"}
    crow = {"class": "crow", "split": "gallery", "source": "gallery/crow/2"}
    by_kind = {example["kind"]: example["images"] for example in examples}
    assert len(examples) == 3
    assert by_kind["within_class"] == owls
    assert gull in by_kind["across_classes"]
    assert by_kind["across_splits"][1] == crow
    assert by_kind["across_splits"][0]["split"] == "train"
    text = summary(manifest, out)
    assert "duplicates, byte by byte (all kept): 1 within a class, 1 across classes, 1 across train and other" in text
    assert "  within class: train/owl/0 (train, owl) = train/owl/2 (train, owl)" in text
    assert " = gallery/crow/2 (gallery, crow)" in text


def test_few_examples_of_many_duplicates(tmp_path: Path) -> None:
    source = pictures({"train": ["owl"], "test": ["crow"]}, images=20)
    source.contents = {f"train/owl/{i}": encoded(1) for i in range(20)}
    duplicates = convert(source, tmp_path / "out").extra["duplicates"]
    assert duplicates["within_class"] == 19
    assert len(duplicates["examples"]) == NUM_EXAMPLES


def test_the_same_image_in_query_and_gallery_of_a_class_counts_within_it(tmp_path: Path) -> None:
    source = pictures({"train": ["owl"], "query": ["crow"], "gallery": ["crow"]}, images=2)
    source.contents = {"query/crow/0": encoded(1), "gallery/crow/0": encoded(1)}
    duplicates = convert(source, tmp_path / "out").extra["duplicates"]
    assert (duplicates["within_class"], duplicates["across_classes"], duplicates["across_splits"]) == (1, 0, 0)


def test_image_that_is_listed_twice(tmp_path: Path) -> None:
    source = pictures({"train": ["owl", "gull"], "test": ["crow"]}, images=2)
    source.items = [*source.items, SourceItem("crow", "test", "train/owl/1"), SourceItem("owl", "train", "train/owl/1")]
    message = r"Cannot convert train/owl/1: the image is listed twice, in class 'owl' of train and in class 'crow' of"
    with pytest.raises(DataError, match=message):
        convert(source, tmp_path / "out")
    manifest = convert(source, tmp_path / "out", on_error="skip")
    assert manifest.num_samples == 6
    assert [entry["source"] for entry in manifest.extra["skipped"]] == ["train/owl/1"] * 2
    assert "skipped: 2" in summary(manifest, tmp_path / "out")
