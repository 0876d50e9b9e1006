"""The protocol check: published counts against what is listed and what is written."""

import logging
import re
from pathlib import Path

import pytest
from conversion_cases import Pictures, pictures

from gcahng.data.conversion.convert import convert, summary
from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.verify import verify
from gcahng.data.sources.source import Published
from gcahng.errors import DataError

COUNTS = {"train": (2, 6), "test": (1, 3)}


def birds(published: Published | None = None, **changed: object) -> Pictures:
    return pictures({"train": ["owl", "gull"], "test": ["crow"]}, images=3, published=published)


def test_as_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = convert(birds(Published("Birds-3", COUNTS)), tmp_path / "out")
    counts = {"train": {"classes": 2, "images": 6}, "test": {"classes": 1, "images": 3}}
    assert manifest.extra["protocol"] == {"name": "Birds-3", "published": counts, "found": counts, "matches": True}
    line = "protocol: Birds-3, train 2 classes / 6 images, test 1 classes / 3 images: as published"
    assert line in summary(manifest, tmp_path / "out").splitlines()
    assert not caplog.records


def test_nothing_is_said_of_sources_without_a_protocol(tmp_path: Path) -> None:
    manifest = convert(birds(), tmp_path / "out")
    assert "protocol" not in manifest.extra
    assert "protocol" not in summary(manifest, tmp_path / "out")


TABLE = r"""
  split +of +published +found +difference
  train +classes +3 +2 +-1
  train +images +6 +6 +none
  test +classes +1 +1 +none
  test +images +1 +3 +\+2"""
OTHER = Published("Birds-3", {"train": (3, 6), "test": (1, 1)})


def test_difference_stops_before_any_work(tmp_path: Path) -> None:
    source = birds(OTHER)
    message = (
        "Birds-3 as listed by source 'pictures' differs from what its authors published:"
        + TABLE
        + "\nComplete the data set, or pass --allow-mismatch to go on all the same\\.$"
    )
    with pytest.raises(DataError, match=message):
        convert(source, tmp_path / "out")
    assert source.loaded == []
    assert list(tmp_path.iterdir()) == []


def test_allowed_difference_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        manifest = convert(birds(OTHER), tmp_path / "out", allow_mismatch=True)
    (record,) = caplog.records
    assert re.search(TABLE, record.getMessage())
    protocol = Manifest.load(tmp_path / "out").extra["protocol"]
    assert protocol["matches"] is False
    assert protocol["published"]["train"] == {"classes": 3, "images": 6}
    assert protocol["found"] == manifest.splits
    text = summary(manifest, tmp_path / "out")
    assert "protocol: Birds-3, train 2 classes / 6 images, test 1 classes / 3 images: NOT as published" in text
    assert re.search(TABLE, text)


@pytest.mark.parametrize("counts", [{"train": (2, 6)}, {**COUNTS, "query": (1, 1)}])
def test_split_that_only_one_side_has(tmp_path: Path, counts: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(DataError, match=r"classes  (0 +1 +\+1|1 +0 +-1)".replace("  ", " +")):
        convert(birds(Published("Birds-3", counts)), tmp_path / "out")


def test_images_left_out_stop_at_the_end_and_the_work_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    published = Published("Birds-3", COUNTS)

    def source() -> Pictures:
        made = birds(published)
        made.unreadable = {"train/owl/1"}
        return made

    with pytest.raises(DataError) as error:
        convert(source(), out, on_error="skip")
    message = str(error.value)
    assert "Birds-3 as written, with 1 entries left out, differs from what its authors published" in message
    assert re.search(r"train +images +6 +5 +-1", message)
    assert message.endswith("(2 tars, 8 images): the same command continues there.")
    assert not out.exists()
    again = source()
    manifest = convert(again, out, on_error="skip", allow_mismatch=True)
    assert again.loaded == ["train/owl/1"]
    assert manifest.extra["protocol"]["found"]["train"] == {"classes": 2, "images": 5}
    assert manifest.extra["protocol"]["matches"] is False


def hotels(published: Published, test: list[str]) -> Pictures:
    return pictures({"train": ["ritz", "plaza", "savoy"], "test": test}, images=2, published=published)


def test_protocol_that_tests_on_training_classes(tmp_path: Path) -> None:
    published = Published("Hotels", {"train": (3, 6), "test": (2, 4)}, test_in_train=True)
    manifest = convert(hotels(published, ["savoy", "ritz"]), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out", verify=True)
    assert (len(shards.classes), manifest.splits["test"]) == (3, {"classes": 2, "images": 4})
    assert {shards.classes[int(i)].name for i in shards.class_ids(shards.split_samples("test"))} == {"savoy", "ritz"}
    assert manifest.extra["protocol"]["test_classes_not_in_train"] == 0
    text = summary(manifest, tmp_path / "out")
    assert "protocol: Hotels, train 3 classes / 6 images, test 2 classes / 4 images: as published" in text
    assert "tests on classes of train: all test classes are in train" in text


def test_test_class_that_train_lacks(tmp_path: Path) -> None:
    published = Published("Hotels", {}, test_in_train=True)
    with pytest.raises(DataError, match=r"test classes that train lacks: expected none, got 1 \('adlon'\)"):
        convert(hotels(published, ["adlon", "ritz"]), tmp_path / "out")
    manifest = convert(hotels(published, ["adlon", "ritz"]), tmp_path / "out", allow_mismatch=True)
    assert manifest.extra["protocol"]["test_classes_not_in_train"] == 1
    assert manifest.extra["protocol"]["matches"] is False
    text = summary(manifest, tmp_path / "out")
    assert "1 test classes are not in train" in text
    assert "difference" not in text  # no counts are published that could differ


def test_protocol_without_counts(tmp_path: Path) -> None:
    manifest = convert(hotels(Published("Hotels", {}, test_in_train=True), ["ritz"]), tmp_path / "out")
    assert "test 1 classes / 2 images: no counts are checked" in summary(manifest, tmp_path / "out")


def test_shared_classes_are_refused_without_such_a_protocol(tmp_path: Path) -> None:
    for published in (None, Published("Hotels", {})):
        source = hotels(Published("x", {}), ["savoy", "ritz"])
        source.parts["published"] = published
        with pytest.raises(DataError, match=r"Class 'ritz' \(and 1 more\) is in train and in test: expected"):
            convert(source, tmp_path / "out")
        manifest = convert(source, tmp_path / f"out-{published is None}", allow_mismatch=True)
        assert manifest.extra["classes_shared_with_train"] == 2
        text = summary(manifest, tmp_path / "out")
        assert "NOT class-disjoint: 2 classes are in train and in another split" in text.splitlines()
        assert verify(tmp_path / f"out-{published is None}").is_whole
