"""Batches from shards on a real web server: the same as from the folder, and what becomes of them when it fails."""

from pathlib import Path

import faulty_server as faults
import pytest
from faulty_server import FaultyServer, serve
from loader_cases import assert_same, load, write_shards
from store_cases import QUICK

from gcahng.data.shards.reader import ShardSet
from gcahng.data.stores import CacheSettings, open_store
from gcahng.errors import DataError


def open_remote(server: FaultyServer, cache: Path, mode: str = "direct") -> ShardSet:
    settings = CacheSettings(dir=cache, max_bytes=30_000, mode=mode)
    return ShardSet.open(server.url, store=open_store(server.url, settings, QUICK))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("mode", ["shards", "direct"])
def test_remote_batches_are_those_of_the_folder(tmp_path, mode, num_workers):
    local = write_shards(tmp_path / "shards")
    with serve(tmp_path / "shards") as server:
        assert_same(load(open_remote(server, tmp_path / "cache", mode), num_workers), load(local))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_place_that_does_not_answer_is_no_damaged_image(tmp_path, num_workers):
    """Skipping would ask for every other image of the class, each in all tries."""
    write_shards(tmp_path / "shards")
    with serve(tmp_path / "shards") as server:
        shards = open_remote(server, tmp_path / "cache")
        before = len(server.requests)
        server.fault = faults.status(503)
        with pytest.raises(DataError, match=r"3 tries, the last one: HTTP status 503"):
            load(shards, num_workers, on_error="skip")
        images_asked_for = {request.range for request in server.requests[before:]}
    assert len(images_asked_for) <= max(1, 2 * num_workers)  # the first image of every batch that is under way


def test_an_outage_of_a_moment_replaces_no_image(tmp_path):
    local = write_shards(tmp_path / "shards")
    with serve(tmp_path / "shards") as server:
        shards = open_remote(server, tmp_path / "cache")
        server.fault = faults.times(2, faults.reset)
        assert_same(load(shards, on_error="skip"), load(local))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_of_a_remote_shard_is_skipped(tmp_path, num_workers):
    write_shards(tmp_path / "shards", broken=(13,))
    local = load(ShardSet.open(tmp_path / "shards"), on_error="skip", num_classes=6)
    assert sum(batch.skipped for batch in local) >= 1
    with serve(tmp_path / "shards") as server:
        remote = load(open_remote(server, tmp_path / "cache"), num_workers, on_error="skip", num_classes=6)
    assert_same(remote, local)
