"""Plain tars give the metrics of the same images in a shard folder; embeddings as a file."""

import errno
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from run_cases import make_config
from tar_cases import arrays, picture, write_tar

from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.writer import Sample, ShardWriter
from gcahng.errors import ConfigError, DataError, TrainingError
from gcahng.metrics import retrieval
from gcahng.models import Embedder
from gcahng.training import evaluation
from gcahng.training.config import EvalConfig
from gcahng.training.embedding import embed_tars
from gcahng.training.evaluate_checkpoint import embedding_settings, evaluate_checkpoint, load_metric_model
from gcahng.training.evaluation import EmbeddingSettings, TarSets, as_row, embed_rows, evaluate, evaluate_tars
from gcahng.training.parts import build_metric_model

MODEL = {"model.backbone_args": {"widths": [4]}}


@pytest.fixture(scope="module")
def model(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    torch.manual_seed(0)
    return build_metric_model(make_config(shards, tmp_path_factory.mktemp("model"), MODEL).model).eval()


@pytest.fixture(scope="module")
def settings(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingSettings:
    return embedding_settings(make_config(shards, tmp_path_factory.mktemp("settings"), MODEL))


def write_rows(shard_set: ShardSet, rows: np.ndarray, folder: Path, label: str, num_tars: int = 3) -> list[str]:
    """The images of rows in plain tars by webdataset's own writer."""
    folder.mkdir()
    with webdataset.ShardWriter(
        f"{folder}/test-%03d.tar", maxcount=-(-len(rows) // num_tars), verbose=0, mtime=0
    ) as writer:
        for row in rows.tolist():
            class_id = int(shard_set.class_ids([row])[0])
            labels = {
                "cls": {"cls": class_id},
                "class_name": {"json": {"class_name": shard_set.classes[class_id].name}},
                "species": {"json": {"species": class_id, "class_name": "always the same"}},
            }[label]
            writer.write({"__key__": f"image-{row}", "png": shard_set.read(row), "txt": "caption"} | labels)
    return [f"{folder}/test-{{000..{num_tars - 1:03d}}}.tar"]


@pytest.fixture(scope="module")
def shuffled(shard_set: ShardSet) -> np.ndarray:
    """The test rows in another order."""
    return np.random.default_rng(3).permutation(shard_set.split_samples("test"))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("label", ["cls", "class_name", "species"])
def test_tars_give_the_metrics_of_the_shard_folder(
    shard_set, shuffled, model, settings, tmp_path, label: str, num_workers: int
) -> None:
    """In another order, in other batches, with labels of another kind."""
    config = EvalConfig(ks=(1, 2, 10))
    locations = write_rows(shard_set, shuffled, tmp_path / "tars", label)
    sets = TarSets(locations, label_field="species" if label == "species" else None)
    got = evaluate_tars(model, sets, config, replace(settings, batch_size=5, num_workers=num_workers), num_neighbours=1)
    want = evaluate(model, shard_set, config, settings, rows=shuffled, num_neighbours=1)
    assert as_row(got) == pytest.approx(as_row(want), rel=1e-12)
    assert as_row(got) == pytest.approx(as_row(evaluate(model, shard_set, config, settings)), rel=1e-12)
    assert torch.equal(got.result.neighbours, want.result.neighbours) and got.result.num_queries == 48


@pytest.mark.parametrize("num_workers", [0, 2])
def test_embeddings_come_in_the_order_of_the_tars(
    shard_set, shuffled, model, settings, tmp_path, num_workers: int, caplog
) -> None:
    caplog.set_level(logging.INFO)
    locations = write_rows(shard_set, shuffled, tmp_path / "tars", "cls")
    found = embed_tars(model, locations, replace(settings, batch_size=7, num_workers=num_workers))
    embeddings, labels = embed_rows(model, shard_set, shuffled, settings)
    # Batches of other sizes round differently in the last bits.
    torch.testing.assert_close(found.embeddings, embeddings, rtol=1e-5, atol=1e-6)
    assert found.labels == labels.tolist() and found.keys == [f"image-{row}" for row in shuffled.tolist()]
    assert found.tars == [f"{tmp_path}/tars/test-{place // 16:03d}.tar" for place in range(48)]
    assert "Members of the tars that were passed over: 48 x .txt." in caplog.text


def test_shards_of_a_folder_are_plain_tars_too(shards, shard_set, model, settings) -> None:
    """Whole, without looking at manifest or index."""
    got = evaluate_tars(model, TarSets([f"{shards}/*.tar"]), EvalConfig(), settings)
    want = evaluate(model, shard_set, EvalConfig(), settings, rows=np.arange(len(shard_set)))
    assert as_row(got) == pytest.approx(as_row(want), rel=1e-12) and got.result.num_queries == 96


QUERY_GALLERY = EvalConfig(protocol="query_gallery", ks=(1, 10))


def test_tars_search_other_tars(shard_set, shuffled, model, settings, tmp_path) -> None:
    # A class that only the gallery has, first by name: numbers of the classes must be those of both sets together.
    classes = shard_set.class_ids(shuffled)
    first = min(set(classes.tolist()), key=lambda class_id: shard_set.classes[class_id].name)
    query, gallery = shuffled[classes != first][:20], shuffled[classes != first][20:]
    gallery = np.concatenate([gallery, shuffled[classes == first]])
    sets = TarSets(
        write_rows(shard_set, query, tmp_path / "query", "class_name"),
        write_rows(shard_set, gallery, tmp_path / "gallery", "class_name"),
    )
    save_to = tmp_path / "saved.npz"
    got = evaluate_tars(model, sets, QUERY_GALLERY, settings, save_to=save_to)
    want = retrieval(
        *embed_rows(model, shard_set, query, settings), *embed_rows(model, shard_set, gallery, settings), ks=(1, 10)
    )
    assert as_row(got) == pytest.approx(as_row(want), rel=1e-12)
    saved = arrays(save_to)
    assert saved["keys"].tolist() == [f"image-{row}" for row in query]
    assert saved["gallery_keys"].tolist() == [f"image-{row}" for row in gallery]
    names = dict(zip(saved["class_ids"].tolist(), saved["class_names"].tolist(), strict=True))
    for prefix, rows in (("", query), ("gallery_", gallery)):
        got_names = [names[label] for label in saved[f"{prefix}labels"].tolist()]
        assert got_names == [shard_set.classes[i].name for i in shard_set.class_ids(rows).tolist()]


def test_a_protocol_with_a_gallery_asks_for_one(model, settings) -> None:
    with pytest.raises(ConfigError, match="is query_gallery: expected a gallery .--gallery-tars. beside the tars"):
        evaluate_tars(model, TarSets(["q"]), QUERY_GALLERY, settings)


def tar_of(path: Path, labels: list[bytes]) -> str:
    files = []
    for number, label in enumerate(labels):
        files += [(f"{number}.jpg", picture(number)), (f"{number}.cls" if label.isdigit() else f"{number}.json", label)]
    return str(write_tar(path, files))


def test_what_tars_cannot_answer(model, settings, tmp_path) -> None:
    pair = tar_of(tmp_path / "pair.tar", [b"1", b"1", b"2"])
    lonely = tar_of(tmp_path / "lonely.tar", [b"1", b"2", b"3"])
    named = tar_of(tmp_path / "named.tar", [b'{"label": "x"}'] * 12)
    empty = str(write_tar(tmp_path / "e.tar", {"a.txt": b"", "README": b""}))
    cases = [
        (TarSets([pair]), EvalConfig(ks=(1, 3)), ConfigError, "`eval.ks` must not exceed .* at most 2, got 3"),
        (TarSets([lonely]), EvalConfig(ks=(1,)), DataError, "No image of the tars has another .* Check --tars"),
        (TarSets([pair], [named]), QUERY_GALLERY, DataError, "of one kind: .* got 1 and 'x'. Name the field"),
        (TarSets([empty]), EvalConfig(), DataError, r"1 tars have no images, .*e.tar .*: 1 x .txt, 1 x no key\)"),
    ]
    for sets, config, error, message in cases:
        with pytest.raises(error, match=message):
            evaluate_tars(model, sets, config, settings)


def test_a_non_finite_embedding_names_its_key(shard_set, shuffled, settings, model, tmp_path) -> None:
    locations = write_rows(shard_set, shuffled, tmp_path / "tars", "cls")

    def poison(module: Embedder, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        output[3] = torch.nan
        return output

    handle = model.register_forward_hook(poison)
    try:
        with pytest.raises(TrainingError, match=f"1 embeddings .* the first of sample image-{shuffled[3]}\\. "):
            embed_tars(model, locations, settings)
    finally:
        handle.remove()


def test_saved_embeddings_of_a_shard_folder(finished_run, shard_set, tmp_path) -> None:
    save_to = tmp_path / "test.npz"
    row = evaluate_checkpoint(finished_run.dir / "last", save_to=save_to)
    assert row == evaluate_checkpoint(finished_run.dir / "last")
    saved = arrays(save_to)
    assert sorted(saved) == ["class_ids", "class_names", "embeddings", "keys", "labels", "shards"]
    rows = shard_set.split_samples("test")
    model, config = load_metric_model(finished_run.dir / "last")
    embeddings, labels = embed_rows(model, shard_set, rows, embedding_settings(config))
    assert saved["embeddings"].dtype == np.float32 and np.array_equal(saved["embeddings"], embeddings.numpy())
    assert saved["labels"].dtype == np.int64 and saved["labels"].tolist() == labels.tolist()
    assert saved["keys"].tolist() == [shard_set.key(row) for row in rows.tolist()]
    assert saved["shards"].tolist() == [shard_set.shard_name(row) for row in rows.tolist()]
    assert saved["class_ids"].tolist() == sorted(set(labels.tolist()))
    assert saved["class_names"].tolist() == [shard_set.classes[i].name for i in saved["class_ids"].tolist()]
    assert [file.name for file in tmp_path.iterdir()] == ["test.npz"]


def test_saved_embeddings_of_a_query_and_a_gallery_split(model, settings, tmp_path) -> None:
    (tmp_path / "shards").mkdir()
    writer = ShardWriter(tmp_path / "shards")
    for number in range(12):
        split = "query" if number < 4 else "gallery"
        writer.write(Sample(picture(number), "jpg", f"class {number % 4}", split, str(number)))
    writer.finish("test", 0, {})
    shard_set = ShardSet.open(tmp_path / "shards")
    config = EvalConfig(protocol="query_gallery", split="query", gallery_split="gallery", ks=(1,))
    evaluate(model, shard_set, config, settings, save_to=tmp_path / "both.npz")
    saved = arrays(tmp_path / "both.npz")
    for prefix, split in (("", "query"), ("gallery_", "gallery")):
        embeddings, labels = embed_rows(model, shard_set, shard_set.split_samples(split), settings)
        assert np.array_equal(saved[f"{prefix}embeddings"], embeddings.numpy())
        assert saved[f"{prefix}labels"].tolist() == labels.tolist()
    assert saved["class_names"].tolist() == [f"class {number}" for number in range(4)]


def test_saved_numbers_of_tars_are_the_labels(model, settings, tmp_path) -> None:
    locations = [tar_of(tmp_path / "a.tar", [b"70", b"5", b"70", b"5"])]
    evaluate_tars(model, TarSets(locations), EvalConfig(ks=(1,)), settings, save_to=tmp_path / "a.npz")
    saved = arrays(tmp_path / "a.npz")
    assert saved["labels"].tolist() == [70, 5, 70, 5] and saved["shards"].tolist() == locations * 4
    assert (saved["class_ids"].tolist(), saved["class_names"].tolist()) == ([5, 70], ["5", "70"])


def test_a_file_that_cannot_be_saved_is_refused_first(shard_set, model, settings, tmp_path, monkeypatch) -> None:
    def unexpected(*args: object, **options: object) -> None:
        raise AssertionError("embedded")

    monkeypatch.setattr("gcahng.training.evaluation.embed_part", unexpected)
    monkeypatch.setattr("gcahng.training.evaluation.embed_tars", unexpected)
    cases = [
        (tmp_path / "a.npy", "expected a name that ends in .npz"),
        (tmp_path / "no" / "a.npz", "the folder does not exist"),
        (tmp_path, "expected a name that ends"),
    ]
    for path, message in cases:
        with pytest.raises(ConfigError, match=f"`--save-embeddings` {path}: {message}"):
            evaluate(model, shard_set, EvalConfig(), settings, save_to=path)
        with pytest.raises(ConfigError, match=f"`--save-embeddings` {path}: {message}"):
            evaluate_tars(model, TarSets(["x"]), EvalConfig(), settings, save_to=path)
    (tmp_path / "query.tar").touch()
    with pytest.raises(DataError, match="No file matches"):
        evaluate_tars(model, TarSets([tmp_path / "query.tar"], [f"{tmp_path}/no*.tar"]), QUERY_GALLERY, settings)


def test_embeddings_are_saved_before_they_are_searched(shard_set, model, settings, tmp_path, monkeypatch) -> None:
    """What took hours is not lost where the search runs out of memory."""

    def out_of_memory(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(evaluation, "search_sets", out_of_memory)
    with pytest.raises(MemoryError):
        evaluate(model, shard_set, EvalConfig(), settings, save_to=tmp_path / "a.npz")
    assert len(arrays(tmp_path / "a.npz")["embeddings"]) == len(shard_set.split_samples("test"))


def test_a_save_that_fails_leaves_what_was_there(shard_set, model, settings, tmp_path, monkeypatch) -> None:
    def full_disk(file: Any, **arrays: Any) -> None:
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    (tmp_path / "a.npz").write_bytes(b"earlier")
    with pytest.raises(ConfigError, match="`--save-embeddings` .*a.npz cannot be written .No space left on device"):
        evaluate(model, shard_set, EvalConfig(), settings, save_to=tmp_path / "a.npz")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.npz", b"earlier")]
