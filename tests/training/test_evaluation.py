"""Evaluating a split: every image once and in order, the protocols, what cannot be evaluated."""

import hashlib
import io
import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import convert_patterns, draw_patterns, make_config, make_trainer, read_metrics

from gcahng.data.images.transforms import eval_transform, normalise
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.writer import Sample, ShardWriter
from gcahng.errors import ConfigError, DataError, TrainingError
from gcahng.metrics import retrieval
from gcahng.models import Embedder
from gcahng.training.config import EvalConfig
from gcahng.training.evaluate_checkpoint import embedding_settings, evaluate_checkpoint, load_metric_model
from gcahng.training.evaluation import (
    EmbeddingSettings,
    as_row,
    check_evaluation,
    embed_rows,
    evaluate,
    recall_at_1,
    usable_ks,
)
from gcahng.training.parts import build_metric_model

SETTINGS = {"model.backbone_args": {"widths": [4]}}


@pytest.fixture
def model(shards: Path, tmp_path: Path) -> Embedder:
    torch.manual_seed(0)
    return build_metric_model(make_config(shards, tmp_path, SETTINGS).model)


@pytest.fixture
def settings(shards: Path, tmp_path: Path) -> EmbeddingSettings:
    return embedding_settings(make_config(shards, tmp_path, SETTINGS))


def picture(shards: ShardSet, row: int) -> Image.Image:
    return Image.open(io.BytesIO(shards.read(row))).convert("RGB")


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (5, 0), (64, 0), (5, 2)])
def test_every_row_once_and_in_the_order_asked_for(
    shard_set, model, settings, batch_size: int, num_workers: int
) -> None:
    rows = np.random.default_rng(0).permutation(len(shard_set))[:23]
    got, labels = embed_rows(model, shard_set, rows, replace(settings, batch_size=batch_size, num_workers=num_workers))
    model.eval()
    images = torch.stack([eval_transform(picture(shard_set, int(r)), settings.transform) for r in rows])
    with torch.no_grad():
        want = model(normalise(images, settings.transform))
    assert got.dtype == torch.float32 and not got.requires_grad
    # Batches of other sizes round differently in the last bits.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == shard_set.class_ids(rows).tolist()


@pytest.mark.parametrize("training", [True, False])
def test_embedding_changes_nothing_in_the_model(shard_set, model, settings, training: bool) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    embed_rows(model, shard_set, np.arange(9), settings)
    assert model.training is training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_bf16_embeds_in_bf16(shard_set, model, settings) -> None:
    full, _ = embed_rows(model, shard_set, np.arange(9), settings)
    half, _ = embed_rows(model, shard_set, np.arange(9), replace(settings, matmul_dtype=torch.bfloat16))
    assert half.dtype == torch.float32
    error = (half - full).norm() / full.norm()
    assert 1e-5 < error < 2e-2


def test_self_retrieval_ranks_a_split_among_itself(shard_set, model, settings) -> None:
    result = evaluate(model, shard_set, EvalConfig(ks=(1, 5)), settings)
    rows = shard_set.split_samples("test")
    want = retrieval(*embed_rows(model, shard_set, rows, settings), ks=(1, 5))
    assert as_row(result) == as_row(want)
    assert set(as_row(result)) == {
        "recall_at_1",
        "recall_at_5",
        "r_precision",
        "map_at_r",
        "mrr",
        "num_queries",
        "num_without_reference",
    }
    assert result.result.num_queries == rows.size == 48


def test_given_rows_are_ranked_among_themselves(shard_set, model, settings) -> None:
    rows = shard_set.split_samples("train")[:18]
    result = evaluate(model, shard_set, EvalConfig(ks=(1, 17, 18, 100)), settings, rows=rows, num_neighbours=3)
    want = retrieval(*embed_rows(model, shard_set, rows, settings), ks=(1, 17), num_neighbours=3)
    assert as_row(result) == as_row(want)
    assert torch.equal(result.result.neighbours, want.neighbours)


def test_recall_at_1_needs_no_k_of_1(street_and_shop, model, settings) -> None:
    """Queries without a reference are left out, as in every other mean."""
    result = evaluate(model, street_and_shop, QUERY_GALLERY, settings)
    without = evaluate(model, street_and_shop, replace(QUERY_GALLERY, ks=(3,)), settings)
    assert result.result.num_without_reference > 0
    assert recall_at_1(without) == recall_at_1(result) == result.result.recall_at_k[1]


@pytest.mark.parametrize(
    ("ks", "candidates", "want"),
    [((1, 2, 4, 8), 5, (1, 2, 4)), ((1, 10), 10, (1, 10)), ((10, 20), 5, (1,))],
)
def test_small_validation_sets_drop_large_ks(ks, candidates, want) -> None:
    assert usable_ks(ks, candidates) == want


@pytest.fixture(scope="module")
def street_folder(pattern_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training classes, and classes whose first images query their last ones."""
    folder = tmp_path_factory.mktemp("street") / "shards"
    folder.mkdir()
    writer = ShardWriter(folder)
    classes = sorted(pattern_folder.iterdir())

    def write(split: str, members: list[Path], images: slice) -> None:
        for member in members:
            for file in sorted(member.iterdir())[images]:
                writer.write(Sample(file.read_bytes(), "png", member.name, split, str(file)))

    write("train", classes[:8], slice(None))
    write("query", classes[8:], slice(0, 2))
    write("gallery", classes[8:14], slice(2, None))
    writer.finish("street", 0, {})
    return folder


@pytest.fixture(scope="module")
def street_and_shop(street_folder: Path) -> ShardSet:
    return ShardSet.open(street_folder)


QUERY_GALLERY = EvalConfig(protocol="query_gallery", split="query", gallery_split="gallery", ks=(1, 10))


def test_one_split_queries_another(street_and_shop, model, settings) -> None:
    result = evaluate(model, street_and_shop, QUERY_GALLERY, settings, num_neighbours=2)
    query, gallery = (
        embed_rows(model, street_and_shop, street_and_shop.split_samples(split), settings)
        for split in ("query", "gallery")
    )
    want = retrieval(*query, *gallery, ks=(1, 10), num_neighbours=2)
    assert as_row(result) == as_row(want)
    assert torch.equal(result.result.neighbours, want.neighbours)
    # Classes 14 and 15 are not in the gallery.
    assert (result.result.num_queries, result.result.num_without_reference) == (16, 4)


def test_training_with_a_query_and_a_gallery_split(street_folder, tmp_path) -> None:
    trainer = make_trainer(
        street_folder,
        tmp_path / "run",
        {
            "eval.protocol": "query_gallery",
            "eval.split": "query",
            "eval.gallery_split": "gallery",
            "data.validation": 0.25,
            "train.max_steps_per_epoch": 1,
        },
    )
    results = trainer.run()
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "evaluation"]
    assert [(row["split"], row["num_queries"]) for row in rows] == [("test", 16), ("validation", 12)]
    assert results["last"]["num_without_reference"] == 4


def test_validation_classes_are_no_training_classes(shards, shard_set, tmp_path) -> None:
    data = make_trainer(shards, tmp_path / "run", {"data.validation": 0.375}).data
    held_out = set(shard_set.class_ids(data.validation_rows).tolist())
    assert len(held_out) == 3
    assert held_out.isdisjoint(data.table.class_ids.tolist())
    test = set(shard_set.class_ids(shard_set.split_samples("test")).tolist())
    assert test.isdisjoint(held_out | set(data.table.class_ids.tolist()))
    assert held_out | set(data.table.class_ids.tolist()) == set(
        shard_set.class_ids(shard_set.split_samples("train")).tolist()
    )


def test_best_is_the_highest_validation_score_of_all_epochs(shards, tmp_path, monkeypatch) -> None:
    """The scores are given, so that the second epoch is best and the last is not.

    By test it is the third: R@1 decides, as in the papers, then MAP@R, then the earlier epoch.
    """
    from gcahng.training import trainer as module

    scores = {"test": [0.9, 0.2, 0.3, 0.3], "validation": [0.5, 0.7, 0.7, 0.6]}
    test_recalls = [0.1, 0.6, 0.6, 0.6]
    original = module.as_row

    def scored(result: object) -> dict[str, object]:
        row = original(result)
        split = "validation" if row["num_queries"] == 18 else "test"
        return row | {"map_at_r": scores[split].pop(0)}

    monkeypatch.setattr(module, "as_row", scored)
    monkeypatch.setattr(module, "recall_at_1", lambda result: test_recalls.pop(0))
    settings = {"train.epochs": 4, "train.max_steps_per_epoch": 1, "data.validation": 0.375}
    results = make_trainer(shards, tmp_path / "run", settings).run()
    assert results["best_validation"]["epoch"] == 2 and results["best_validation"]["map_at_r"] == 0.7
    assert results["best_test"]["epoch"] == 3 and results["last"]["epoch"] == 4
    links = {name: (tmp_path / "run" / name).readlink().name for name in ("best", "best_test", "last")}
    assert links == {"best": "step-2", "best_test": "step-3", "last": "step-4"}


def test_a_non_finite_embedding_names_its_sample(shard_set, model, settings) -> None:
    rows = shard_set.split_samples("test")[:12]
    bad = eval_transform(picture(shard_set, int(rows[8])), settings.transform)
    poisoned = normalise(bad[None], settings.transform)[0]

    def poison(module: Embedder, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        hit = (inputs[0] == poisoned).flatten(1).all(1)
        return output.masked_fill(hit[:, None], torch.nan)

    model.register_forward_hook(poison)
    key = shard_set.key(int(rows[8]))
    with pytest.raises(TrainingError, match=rf"1 embeddings .* the first of sample {key}\. "):
        embed_rows(model, shard_set, rows, settings)
    assert model.training  # put back although it failed


def test_an_unreadable_test_image_names_its_sample(shards, model, settings, tmp_path) -> None:
    """A metric over the rest would be another metric, whatever `data.on_error` says."""
    damaged = Path(shutil.copytree(shards, tmp_path / "damaged"))
    shard_set = ShardSet.open(damaged)
    row = int(shard_set.split_samples("test")[3])
    file = damaged / shard_set.shard_name(row)
    content = bytearray(file.read_bytes())
    content[shard_set.record(row).offset + 40] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"sample {shard_set.key(row)} is damaged: expected crc32"):
        evaluate(model, ShardSet.open(damaged), EvalConfig(), settings)


def test_a_gallery_must_be_named(shard_set, model, settings) -> None:
    config = EvalConfig(protocol="query_gallery")
    message = "`eval.gallery_split` is missing"
    with pytest.raises(ConfigError, match=message):
        evaluate(model, shard_set, config, settings)
    with pytest.raises(ConfigError, match=message):
        check_evaluation(shard_set, config)


def test_what_can_be_evaluated_passes_the_check(shard_set, street_and_shop) -> None:
    check_evaluation(shard_set, EvalConfig(ks=(1, 47)))
    check_evaluation(street_and_shop, replace(QUERY_GALLERY, ks=(24,)))
    with pytest.raises(ConfigError, match=r"`eval.ks` .* at most 24, got 25\. Drop"):
        check_evaluation(street_and_shop, replace(QUERY_GALLERY, ks=(25,)))


def test_a_split_of_single_images_has_nothing_to_find(tmp_path) -> None:
    lonely = ShardSet.open(convert_patterns(draw_patterns(tmp_path / "images", 6, images=1), tmp_path / "shards"))
    with pytest.raises(DataError, match="No image of split 'test' has another image of its class to find"):
        check_evaluation(lonely, EvalConfig(ks=(1,)))


def test_a_checkpoint_gives_the_metrics_of_its_run(finished_run) -> None:
    for link in ("last", "best"):
        step = int((finished_run.dir / link).readlink().name.removeprefix("step-"))
        got = evaluate_checkpoint(finished_run.dir / link)
        (want,) = [
            row
            for row in read_metrics(finished_run.dir)
            if row["kind"] == "evaluation" and row["split"] == "test" and row["step"] == step
        ]
        assert got == {key: want[key] for key in got}


def test_a_checkpoint_of_an_earlier_version_loads_without_its_retired_settings(finished_run, tmp_path, caplog) -> None:
    folder = Path(shutil.copytree(finished_run.dir / "last", tmp_path / "step-9"))
    file = folder / "config.yaml"
    file.write_text(
        re.sub(r"  memory_mb: \d+\n(?:  \w+: .*\n)*?(?=  protocol)", "  chunk_size: 1024\n", file.read_text())
    )
    assert "chunk_size" in file.read_text() and "memory_mb" not in file.read_text()
    listing = json.loads((folder / "manifest.json").read_text())
    content = file.read_bytes()
    listing["config.yaml"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(listing))
    caplog.set_level(logging.WARNING)
    assert evaluate_checkpoint(folder) == evaluate_checkpoint(finished_run.dir / "last")
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("eval.chunk_size (") and line.endswith(
        "is no setting any more and is ignored: the search takes `eval.memory_mb` of memory instead."
    )


def test_a_run_is_evaluated_in_its_own_precision(shards, tmp_path) -> None:
    trainer = make_trainer(shards, tmp_path / "run", {"train.precision": "bf16", "train.max_steps_per_epoch": 1})
    dtypes = set()

    def watch(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if not module.training:
            dtypes.add(output.dtype)

    trainer.parts.metric_model.backbone.network.register_forward_hook(watch)
    results = trainer.run()
    assert dtypes == {torch.bfloat16}
    got = evaluate_checkpoint(tmp_path / "run" / "last")
    assert got == {key: results["last"][key] for key in got}


def test_an_fp16_run_is_evaluated_in_fp32_without_cuda(finished_run, shards, tmp_path, caplog) -> None:
    """Its configuration says cpu, which training in fp16 refuses."""
    caplog.set_level(logging.INFO)
    got = evaluate_checkpoint(finished_run.dir / "last", ["train.precision=fp16"])
    assert got == evaluate_checkpoint(finished_run.dir / "last")
    lines = [record.message for record in caplog.records if "fp16" in record.message]
    assert lines == ["Embedding in fp32: train.precision fp16 needs CUDA, the device is cpu."]
    config = load_metric_model(finished_run.dir / "last", ["train.precision=fp16"])[1]
    assert (config.train.precision, config.train.device) == ("fp16", "cpu")
    with pytest.raises(ConfigError, match="train.precision .command line.: must be one of fp32, bf16, fp16"):
        load_metric_model(finished_run.dir / "last", ["train.precision=fp17"])


def test_a_checkpoint_is_checked_before_anything_is_embedded(finished_run, monkeypatch) -> None:
    def unexpected(*args: object, **options: object) -> None:
        raise AssertionError("embedded")

    monkeypatch.setattr("gcahng.training.evaluation.embed_part", unexpected)
    with pytest.raises(ConfigError, match=r"`eval.ks` must not exceed .* at most 47, got 50"):
        evaluate_checkpoint(finished_run.dir / "last", ["eval.ks=[1,50]"])


def test_settings_reach_the_embedding(shards, tmp_path) -> None:
    settings = {"eval.batch_size": 9, "data.num_workers": 3, "train.precision": "bf16", "data.transform.image_size": 12}
    config = make_config(shards, tmp_path, settings)
    got = embedding_settings(config, progress_bars=True)
    want = EmbeddingSettings(got.transform, 9, 3, torch.device("cpu"), torch.bfloat16, progress=True)
    assert got == want and got.transform.eval_crop == 12


def test_a_checkpoint_carries_its_own_settings(finished_run, shards) -> None:
    model, config = load_metric_model(finished_run.dir / "last", ["eval.ks=[3]"])
    assert not model.training
    assert config.eval.ks == (3,) and config.data.dir == str(shards) and config.train.epochs == 3
    with pytest.raises(ConfigError, match="does not fit part `metric_model`"):
        load_metric_model(finished_run.dir / "last", ["model.embedding_dim=4"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_cuda_embeds_like_the_cpu(shard_set, model, settings, dtype) -> None:
    rows = np.arange(20)
    want, _ = embed_rows(model, shard_set, rows, settings)
    cuda = torch.device("cuda")
    got, _ = embed_rows(model.to(cuda), shard_set, rows, replace(settings, device=cuda, matmul_dtype=dtype))
    assert got.device.type == "cpu"
    assert (got - want).norm() / want.norm() < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_ranking_runs_where_the_model_is(shard_set, street_and_shop, model, settings, monkeypatch) -> None:
    from gcahng.training import protocols as module

    devices = []
    search = module.retrieval_over_ranks

    def watched(*tensors: torch.Tensor, **options: object) -> object:
        devices.extend(tensor.device.type for tensor in tensors)
        return search(*tensors, **options)

    monkeypatch.setattr(module, "retrieval_over_ranks", watched)
    cuda = replace(settings, device=torch.device("cuda"))
    for shards, config in ((shard_set, EvalConfig(ks=(1, 5))), (street_and_shop, QUERY_GALLERY)):
        want = as_row(evaluate(model.cpu(), shards, config, settings))
        devices.clear()
        result = evaluate(model.cuda(), shards, config, cuda)
        assert set(devices) == {"cuda"} and result.result.first_hit_rank.device.type == "cpu"
        assert as_row(result) == pytest.approx(want, abs=0.05)
