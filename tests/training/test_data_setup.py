"""From the data section to shards, class tables and loaders: what fits, what is reported, what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_server import serve
from run_cases import (
    assert_same_tensors,
    convert_patterns,
    draw_patterns,
    make_config,
    make_trainer,
    read_metrics,
    saved_tensors,
    train,
)

from gcahng.data.shards.reader import ShardSet
from gcahng.errors import ConfigError, DataError
from gcahng.training.config import TransformConfig
from gcahng.training.data_setup import build_train_loader, image_transform, open_data
from gcahng.training.evaluate_checkpoint import evaluate_checkpoint
from gcahng.training.results import results_text

BASELINE = {"graph.enabled": False, "generation.enabled": False}


def test_all_training_classes_without_validation(shards, shard_set, tmp_path) -> None:
    data = open_data(make_config(shards, tmp_path))
    assert data.table.num_classes == 8 and data.table.num_samples == 48
    assert data.validation_rows.size == 0
    assert sorted(data.table.rows.tolist()) == shard_set.split_samples("train").tolist()


def test_validation_takes_whole_classes(shards, shard_set, tmp_path) -> None:
    data = open_data(make_config(shards, tmp_path, {"data.validation": 0.25}))
    assert data.table.num_classes == 6 and data.validation_rows.size == 12
    both = np.concatenate([data.table.rows, data.validation_rows])
    assert sorted(both.tolist()) == shard_set.split_samples("train").tolist()
    again = open_data(make_config(shards, tmp_path, {"data.validation": 0.25, "train.epochs": 9}))
    assert again.validation_rows.tolist() == data.validation_rows.tolist()


def test_settings_reach_the_loader(shards, tmp_path) -> None:
    settings = {"batch.num_classes": 5, "batch.num_samples": 3, "data.transform.image_size": 12, "seed": 4}
    config = make_config(shards, tmp_path, settings)
    data = open_data(config)
    loader = build_train_loader(config, data)
    batch = next(iter(loader.epoch_iterator(0)))
    assert batch.images.shape == (15, 3, 12, 12) and batch.num_samples == 3
    assert torch.equal(batch.labels, batch.classes.repeat(3))
    class_ids = torch.from_numpy(data.table.class_ids.astype(np.int64))[batch.labels]
    assert torch.equal(class_ids, torch.from_numpy(data.shards.class_ids(batch.rows)))
    others = [settings | {"seed": 5}, settings | {"batch.sampler": "released"}]
    for other in others:
        config = make_config(shards, tmp_path, other)
        rows = next(iter(build_train_loader(config, data).epoch_iterator(0))).rows
        assert not torch.equal(rows, batch.rows)


def test_a_preset_with_values_of_its_own() -> None:
    transform = image_transform(TransformConfig(preset="sct_cub", image_size=64, flip=0.25))
    assert (transform.crop, transform.eval_crop, transform.flip) == (64, 64, 0.25)
    assert transform.train_crop == "random" and transform.mean == (0.4707, 0.4601, 0.4549)


@pytest.mark.parametrize(("validation", "left"), [(0.0, 8), (0.25, 6)])
def test_more_classes_per_batch_than_there_are(shards, tmp_path, validation: float, left: int) -> None:
    settings = {"data.validation": validation, "batch.num_classes": left}
    assert open_data(make_config(shards, tmp_path, settings)).table.num_classes == left
    message = rf"`batch.num_classes` must not exceed .*: expected at most {left}, got {left + 1}\. Lower it"
    with pytest.raises(ConfigError, match=message):
        open_data(make_config(shards, tmp_path, settings | {"batch.num_classes": left + 1}))


@pytest.mark.parametrize(("share", "got"), [(0.01, "0 classes"), (0.12, "1 classes of at most 6")])
def test_a_validation_share_that_holds_out_too_little(shards, tmp_path, share: float, got: str) -> None:
    message = rf"`data.validation` {share} of 8 training classes .* at least 2 classes .*: got {got}"
    with pytest.raises(ConfigError, match=message):
        open_data(make_config(shards, tmp_path, {"data.validation": share}))


@pytest.fixture(scope="module")
def uneven_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of 1, 2 and 6 images."""
    folder = tmp_path_factory.mktemp("uneven")
    sizes = [1, 2, 6, 6] * 4
    return convert_patterns(draw_patterns(folder / "images", images=sizes), folder / "shards")


def small_class_ids(shards: Path, below: int) -> list[int]:
    shard_set = ShardSet.open(shards)
    train_ids, counts = np.unique(shard_set.class_ids(shard_set.split_samples("train")), return_counts=True)
    return train_ids[counts < below].tolist()


@pytest.mark.parametrize(("fate", "words"), [("repeat", "their images are repeated"), ("drop", "left out")])
def test_small_classes_are_reported_once_with_their_number(
    uneven_shards, tmp_path, caplog, fate: str, words: str
) -> None:
    small = small_class_ids(uneven_shards, below=3)
    assert len(small) >= 3
    settings = {"batch.num_samples": 3, "data.small_classes": fate, "batch.num_classes": 2}
    train(uneven_shards, tmp_path / "run", BASELINE | settings | {"train.epochs": 2, "eval.ks": [1]})
    (record,) = [r for r in caplog.records if "fewer images" in r.message]
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"{len(small)} classes of {uneven_shards} have fewer images than")
    assert words in record.message and f"data.small_classes: {fate}" in record.message
    assert record.message.endswith(": " + ", ".join(map(str, small)))


def test_dropped_classes_are_no_training_classes(uneven_shards, tmp_path) -> None:
    settings = {"batch.num_samples": 3, "data.small_classes": "drop", "batch.num_classes": 2}
    small = small_class_ids(uneven_shards, below=3)
    table = open_data(make_config(uneven_shards, tmp_path, settings)).table
    assert table.num_classes == 8 - len(small)
    assert set(small).isdisjoint(table.class_ids.tolist())


def test_without_small_classes_nothing_is_reported(shards, tmp_path, caplog) -> None:
    open_data(make_config(shards, tmp_path))
    assert not caplog.records


def with_damaged_image(shards: Path, folder: Path) -> tuple[Path, str]:
    """A copy of the data set whose first training image is damaged, and that image's key."""
    damaged = Path(shutil.copytree(shards, folder))
    shard_set = ShardSet.open(damaged)
    row = int(shard_set.split_samples("train")[0])
    file = damaged / shard_set.shard_name(row)
    content = bytearray(file.read_bytes())
    content[shard_set.record(row).offset + 60] ^= 0xFF
    file.write_bytes(content)
    return damaged, shard_set.key(row)


ALL_IMAGES = {"batch.num_classes": 8, "batch.num_samples": 6, "train.epochs": 2}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_stops_the_run_and_is_named(shards, tmp_path, num_workers: int) -> None:
    damaged, key = with_damaged_image(shards, tmp_path / "damaged")
    settings = BASELINE | ALL_IMAGES | {"data.num_workers": num_workers}
    with pytest.raises(DataError, match=rf"the image of sample {key} is damaged: expected crc32"):
        train(damaged, tmp_path / "run", settings)


def test_a_skipped_image_is_counted_and_reported(shards, tmp_path, caplog) -> None:
    damaged, key = with_damaged_image(shards, tmp_path / "damaged")
    # One batch per epoch holds all 48 images, so the damaged one is met once per epoch.
    results = train(damaged, tmp_path / "run", BASELINE | ALL_IMAGES | {"data.on_error": "skip"})
    assert results["skipped_images"] == 2
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step"]
    assert [row["skipped_images"] for row in rows] == [1, 2]
    warnings = [r.message for r in caplog.records if r.message.startswith("Skipped:")]
    assert len(warnings) == 2 and all(key in warning for warning in warnings)


def test_repaired_draws_are_counted_and_reported(shards, tmp_path) -> None:
    """8 classes in batches of 5: some batch spans two passes whose orders share a class."""
    settings = BASELINE | {"batch.num_classes": 5, "batch.sampler": "sample", "batch.passes": 10, "train.epochs": 2}
    results = train(shards, tmp_path / "run", settings)
    config = make_config(shards, tmp_path / "again", settings)
    loader = build_train_loader(config, open_data(config))
    expected = [batch.repaired for epoch in (0, 1) for batch in loader.epoch_iterator(epoch)]
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step"]
    assert [row["repaired_draws"] for row in rows] == np.cumsum(expected).tolist()
    assert results["repaired_draws"] == sum(expected) > 0
    assert f"draws of the sampler repaired: {sum(expected)}" in results_text(results, "run")


def test_the_count_goes_on_after_a_resume(shards, tmp_path) -> None:
    damaged, _ = with_damaged_image(shards, tmp_path / "damaged")
    settings = BASELINE | ALL_IMAGES | {"data.on_error": "skip"}
    train(damaged, tmp_path / "run", settings | {"train.epochs": 1})
    results = train(damaged, tmp_path / "run", settings | {"train.resume": "auto"})
    assert results["skipped_images"] == 2


@pytest.mark.parametrize(("remote", "num_workers"), [("shards", 2), ("direct", 0)])
def test_a_run_reads_from_a_server_what_it_reads_from_a_folder(shards, tmp_path, remote: str, num_workers: int) -> None:
    settings = BASELINE | {"data.remote": remote, "data.num_workers": num_workers, "train.epochs": 2}
    settings |= {"data.cache_dir": str(tmp_path / "cache"), "data.cache_bytes": 10**8}
    local = train(shards, tmp_path / "local", settings | {"data.num_workers": 0})
    assert not (tmp_path / "cache").exists()
    with serve(shards) as server:
        found = train(server.url, tmp_path / "run", settings | {"train.epochs": 1})
        # Where the data lie and how they are cached may change between a run and its continuation.
        moved = {"train.resume": "auto", "data.cache_bytes": 10**9}
        found = train(server.url, tmp_path / "run", settings | moved)
        assert evaluate_checkpoint(tmp_path / "run" / "last")["recall_at_1"] == found["last"]["recall_at_1"]
    assert_same_tensors(saved_tensors(tmp_path / "run"), saved_tensors(tmp_path / "local"))
    assert found["last"] == local["last"]
    cached = list((tmp_path / "cache" / "shards").glob("*"))
    assert bool(cached) == (remote == "shards"), "whole shards are cached, or none"


def test_a_server_without_the_data_set_is_named_at_the_start(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with serve(tmp_path / "empty") as server, pytest.raises(DataError, match=f"`manifest.json` of {server.url}"):
        make_trainer(server.url, tmp_path / "run", {"data.cache_dir": str(tmp_path / "cache")})


def test_a_place_that_runs_commands_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="`pipe:` is refused as a place of shards"):
        make_trainer("pipe:cat shards", tmp_path / "run")


def test_no_data_set_at_the_path(tmp_path) -> None:
    with pytest.raises(DataError, match=r"nowhere/manifest.json is missing: .*no such folder"):
        make_trainer(tmp_path / "nowhere", tmp_path / "run")


def test_a_cut_shard_is_refused_at_the_start(shards, tmp_path) -> None:
    damaged = Path(shutil.copytree(shards, tmp_path / "damaged"))
    tar = sorted(damaged.glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(DataError, match=rf"{tar.name} is cut: expected \d+ bytes, got \d+"):
        make_trainer(damaged, tmp_path / "run")
