"""Search in a store: what a brute-force search finds, in bounded memory; images and models that do not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import ALONE
from store_files import rows_of, vectors, write_index
from tar_cases import write_tar

from gcahng.data.shards.reader import ShardSet
from gcahng.errors import ConfigError, DataError, InputError
from gcahng.search.embed import embed_checkpoint
from gcahng.search.lookup import (
    Match,
    approximate_index,
    embed_files,
    image_files,
    load_query_model,
    matches,
    nearest_stored,
    printable,
)
from gcahng.search.store import EmbeddingStore, StoredRow
from gcahng.search.stored_images import stored_images
from gcahng.search.unfinished import IndexTarget


def brute_force(queries: np.ndarray, gallery: np.ndarray, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """In float64, one pair after the other; equal scores: the lower row first."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries.astype(float), gallery)]
    scores, found = [], []
    for query in unit[0]:
        ranked = sorted((-round(float(query @ row), 7), number) for number, row in enumerate(unit[1]))
        scores.append([-score for score, _ in ranked[:k]])
        found.append([number for _, number in ranked[:k]])
    return scores, found


@pytest.mark.parametrize("layout", ["npy", "parquet"])
@pytest.mark.parametrize("block_rows", [9, 1000])
def test_search_finds_what_brute_force_finds(tmp_path: Path, layout: str, block_rows: int) -> None:
    sizes, dim = [30, 25, 40], 6
    gallery = np.concatenate([vectors(size, dim, part) for part, size in enumerate(sizes)])
    write_index(tmp_path / "index", sizes, dim, layout)
    store = EmbeddingStore.open(tmp_path / "index")
    queries = vectors(13, dim, seed=9)
    scores, found = brute_force(queries, gallery, 11)
    got = nearest_stored(store, torch.from_numpy(queries), 11, block_bytes=4 * dim * block_rows)
    assert got[1].tolist() == found and got[0].dtype == torch.float32
    np.testing.assert_allclose(got[0].numpy(), scores, atol=2e-7)
    rows = rows_of(95)
    assert matches(store, *got)[4][2] == Match(
        3, float(got[0][4, 2]), found[4][2], StoredRow(*rows[found[4][2]], f"name of {rows[found[4][2]].label}")
    )


def test_equal_images_come_in_the_order_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part holds the same embeddings, some scaled: ties across blocks and inside of them."""
    same = vectors(6, 5)
    monkeypatch.setattr("store_files.vectors", lambda count, dim, part: same[:count] * 2.0**part)
    write_index(tmp_path / "index", [6, 6, 6], 5)
    store = EmbeddingStore.open(tmp_path / "index")
    for block_rows in (1, 7):
        _, rows = nearest_stored(store, torch.from_numpy(same), 3, block_bytes=20 * block_rows)
        assert rows.tolist() == [[i, i + 6, i + 12] for i in range(6)]


def test_wrong_queries(tmp_path: Path) -> None:
    write_index(tmp_path / "index", [5], 4)
    store = EmbeddingStore.open(tmp_path / "index")
    for queries, k, message in (
        (torch.ones(2, 5), 1, r"`queries` must be \(Q, 4\)"),
        (torch.ones(4), 1, r"`queries` must be \(Q, 4\)"),
        (torch.ones(2, 4), 0, "`k` must be from 1 to the 5 embeddings"),
        (torch.ones(2, 4), 6, "`k` must be from 1 to the 5 embeddings"),
        (torch.full((2, 4), torch.nan), 1, "finite"),
    ):
        with pytest.raises(InputError, match=message):
            nearest_stored(store, queries, k)


@pytest.fixture(scope="module")
def index(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the test split; never written to."""
    out = tmp_path_factory.mktemp("index") / "index"
    embed_checkpoint(trained.checkpoint, IndexTarget(out), ALONE)
    return out


def test_a_stored_image_finds_itself(trained: Any, index: Path) -> None:
    store = EmbeddingStore.open(index)
    model, settings = load_query_model(store.info)
    shards = ShardSet.open(trained.shards)
    rows = shards.split_samples("test")[[3, 20, 47]].tolist()
    files = [trained.images / shards.source(row) for row in rows]
    embeddings = embed_files(model, files, settings)
    torch.testing.assert_close(embeddings, store.embeddings()[[3, 20, 47]], rtol=1e-5, atol=1e-6)
    assert nearest_stored(store, embeddings, 1)[1].flatten().tolist() == [3, 20, 47]


def test_the_model_must_be_the_one_of_the_index(trained: Any, index: Path, tmp_path: Path) -> None:
    info = EmbeddingStore.open(index).info
    assert info is not None
    other = shutil.copytree(trained.checkpoint, tmp_path / "other")
    load_query_model(info, other)
    # The right weights under other settings of the model, which would embed otherwise.
    with pytest.raises(ConfigError, match="its settings of `model` have sha256"):
        load_query_model(info, other, ["model.pooling=max"])
    made_with = {**info.made_with, "checkpoint": {**info.checkpoint, "metric_model_sha256": "0" * 64}}
    with pytest.raises(ConfigError, match="is not the one that made the index: its weights have sha256 [0-9a-f]{64}"):
        load_query_model(replace(info, made_with=made_with), other)
    made_with = {**info.made_with, "checkpoint": {**info.checkpoint, "path": str(tmp_path / "gone")}}
    with pytest.raises(ConfigError, match=r"made by .*gone, which is not there\. Name the checkpoint"):
        load_query_model(replace(info, made_with=made_with))
    with pytest.raises(ConfigError, match="do not say which model made them"):
        load_query_model(None)
    assert load_query_model(None, other)[0].embedding_dim == 8


def test_the_transform_is_the_one_of_the_index(trained: Any, tmp_path: Path) -> None:
    target = IndexTarget(tmp_path / "index")
    info = embed_checkpoint(trained.checkpoint, target, ALONE, ["data.transform.eval_resize=18"])
    assert info is not None
    assert load_query_model(info)[1].transform.eval_resize == 18
    for transform in ({"eval_resize": -1}, {"no_such": 1}):
        with pytest.raises(InputError, match="impossible"):
            load_query_model(replace(info, made_with={**info.made_with, "transform": transform}))


def test_files_and_folders_of_images(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "sub/c.webp", ".hidden/d.png", "sub/.e.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in image_files([tmp_path / "notes.txt", tmp_path])]
    assert names == ["notes.txt", "a.jpg", "b.PNG", "sub/c.webp"]
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path / "empty", "has no image")):
        with pytest.raises(DataError, match=message):
            image_files([path])


def test_files_that_are_no_images(trained: Any, index: Path, tmp_path: Path) -> None:
    model, settings = load_query_model(EmbeddingStore.open(index).info)
    (tmp_path / "a.jpg").write_bytes(b"GIF89a no picture")
    with pytest.raises(DataError, match=r"a\.jpg is no image: expected JPEG, PNG, WEBP"):
        embed_files(model, [tmp_path / "a.jpg"], settings)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(DataError, match=r"large\.png is too large: expected at most 67108864 bytes"):
        embed_files(model, [tmp_path / "large.png"], settings)
    with pytest.raises(DataError, match="cannot be read"):
        embed_files(model, [tmp_path], settings)


def found_in(store: EmbeddingStore, *rows: int) -> list[Match]:
    return [Match(1, 1.0, row, store.row(row)) for row in rows]


def test_images_of_a_shard_folder(trained: Any, index: Path, tmp_path: Path) -> None:
    store = EmbeddingStore.open(index)
    shards = ShardSet.open(trained.shards)
    rows = shards.split_samples("test").tolist()
    moved = shutil.copytree(trained.shards, tmp_path / "moved")
    for data in (None, str(moved)):
        images = stored_images(store.info, found_in(store, 5, 40), data)
        for place, image in images.items():
            with Image.open(trained.images / shards.source(rows[place])) as want:
                assert np.array_equal(np.asarray(image), np.asarray(want.convert("RGB")))
        assert sorted(images) == [5, 40]
    info = store.info
    assert info is not None
    wrong = replace(info, made_with={**info.made_with, "data": {**info.data, "manifest": "0" * 64}})
    with pytest.raises(DataError, match="is not the shard folder that was embedded: its manifest differs"):
        stored_images(wrong, found_in(store, 5))
    far = replace(info, made_with={**info.made_with, "data": {**info.data, "location": "http://127.0.0.1:9/x"}})
    with pytest.raises(DataError, match=r"The images are at http://127\.0\.0\.1:9/x\. Name their place"):
        stored_images(far, found_in(store, 5))
    stranger = [Match(1, 1.0, 5, StoredRow("999999999", "shard-000001.tar", 8, "x"))]
    with pytest.raises(DataError, match="Row 5 of the index is not 999999999 of"):
        stored_images(info, stranger)
    with pytest.raises(DataError, match="do not say where their images are"):
        stored_images(None, found_in(store, 5))


def test_images_of_plain_tars(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet.open(trained.shards)
    files = [f"{trained.images / shards.source(row)}" for row in range(6)]
    for number in range(2):
        members: dict[str, bytes] = {}
        for row in range(3 * number, 3 * number + 3):
            members |= {f"s{row}.cls": str(row).encode(), f"s{row}.png": Path(files[row]).read_bytes()}
        write_tar(tmp_path / f"{number}.tar", members)
    monkeypatch.chdir(tmp_path)
    embed_checkpoint(trained.checkpoint, IndexTarget(Path("index")), ALONE, tars=["*.tar"])
    store = EmbeddingStore.open("index")
    monkeypatch.chdir("/")  # the index knows the whole paths
    store = EmbeddingStore.open(tmp_path / "index")
    images = stored_images(store.info, found_in(store, 1, 5, 3))
    for row, image in images.items():
        with Image.open(files[row]) as want:
            assert np.array_equal(np.asarray(image), np.asarray(want.convert("RGB")))
    assert sorted(images) == [1, 3, 5]
    (tmp_path / "1.tar").unlink()
    with pytest.raises(DataError, match=r"The images of 1\.tar are not on this machine any more"):
        stored_images(store.info, found_in(store, 5))


def test_an_approximate_index_is_kept_with_its_embeddings(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    write_index(tmp_path / "index", [60, 60], 6)
    store = EmbeddingStore.open(tmp_path / "index")
    built = approximate_index(store, "flat")
    kept = tmp_path / "index" / "approximate-flat.faiss"
    before = kept.stat().st_mtime_ns
    loaded = approximate_index(store, "flat")
    assert kept.stat().st_mtime_ns == before and loaded.measured == built.measured
    queries = torch.from_numpy(vectors(4, 6, seed=9))
    assert torch.equal(loaded.search(queries, 5).indices, nearest_stored(store, queries, 5)[1])
    write_index(tmp_path / "other", [50], 6)
    for file in kept.parent.glob("approximate-*"):
        shutil.copy(file, tmp_path / "other")
    with pytest.raises(DataError, match="is of other embeddings. Remove it"):
        approximate_index(EmbeddingStore.open(tmp_path / "other"), "flat")


def test_names_that_would_write_on_the_terminal() -> None:
    assert printable("hue\x1b[31m é 龍\n\u202e") == "hue\\x1b[31m é 龍\\n\\u202e"
    assert json.loads(json.dumps(printable("plain"))) == "plain"
