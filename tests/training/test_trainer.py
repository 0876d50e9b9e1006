"""A run from end to end on real images: what it leaves behind, and what each kind of run does."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import (
    STEPS_PER_EPOCH,
    assert_same_tensors,
    make_config,
    make_trainer,
    read_metrics,
    saved_tensors,
    train,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcahng.data.images.transforms import normalise
from gcahng.training import checkpoint
from gcahng.training.config import load_config
from gcahng.training.evaluation import EmbeddingSettings, evaluate
from gcahng.training.results import results_text

# Training classes are 5 of 8 when 0.375 of them are held out: 30 images, so 3 batches per epoch.
STEPS_WITH_VALIDATION = 3
BASELINE = {"graph.enabled": False, "generation.enabled": False}
LOSSES = {
    "metric_loss",
    "node_loss",
    "synthetic_loss",
    "total_loss",
    "classifier_loss",
    "classification_loss",
    "similarity_loss",
    "diversity_loss",
    "generation_loss",
}
STEP_KEYS = LOSSES | {
    "kind",
    "step",
    "epoch",
    "synthetic_weight",
    "pull_factor",
    "hard_negative_ratio",
    "embedding_std",
    "effective_rank",
    "mean_positive_distance",
    "mean_negative_distance",
    "active_synthetic_ratio",
    "coefficient_spread",
    "lr_metric_model",
    "lr_graph",
    "lr_classifier",
    "samples",
    "skipped_images",
    "repaired_draws",
    "step_seconds",
    "data_seconds",
}
EVALUATION_KEYS = {
    "kind",
    "step",
    "epoch",
    "split",
    "recall_at_1",
    "recall_at_2",
    "recall_at_4",
    "r_precision",
    "map_at_r",
    "mrr",
    "num_queries",
    "num_without_reference",
}


def rows_of(run_dir: Path, kind: str, split: str | None = None) -> list[dict[str, Any]]:
    rows = [row for row in read_metrics(run_dir, clocks=True) if row["kind"] == kind]
    return rows if split is None else [row for row in rows if row["split"] == split]


def test_the_run_folder_holds_the_resolved_configuration(finished_run, shards) -> None:
    settings = {"train.epochs": 3, "train.warm_up_epochs": 1, "data.validation": 0.375}
    want = make_config(shards, finished_run.dir, settings)
    assert load_config(finished_run.dir / "config.yaml") == want
    assert load_config(finished_run.dir / "last" / "config.yaml") == want


def test_every_step_is_logged_with_finite_numbers(finished_run) -> None:
    rows = rows_of(finished_run.dir, "step")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["epoch"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    for row in rows:
        assert set(row) == STEP_KEYS
        assert all(math.isfinite(row[key]) for key in STEP_KEYS - {"kind", "samples"})
        assert row["step_seconds"] >= row["data_seconds"] > 0
        want = row["metric_loss"] + row["node_loss"] + row["synthetic_weight"] * row["synthetic_loss"]
        assert row["total_loss"] == pytest.approx(want, rel=1e-5)
    assert len({row["samples"] for row in rows}) == 9  # other rows in each step


def test_epoch_averages_steer_the_next_epoch(finished_run) -> None:
    rows = rows_of(finished_run.dir, "step")
    for epoch in range(3):
        before = [row for row in rows if row["epoch"] == epoch - 1]
        metric_loss, generation_loss = (
            sum(row[key] for row in before) / len(before) if before else 1e6
            for key in ("metric_loss", "generation_loss")
        )
        for row in (row for row in rows if row["epoch"] == epoch):
            assert row["pull_factor"] == pytest.approx(math.exp(-5 / metric_loss), rel=1e-5)
            want = 1 - math.exp(-20 / generation_loss)
            assert row["synthetic_weight"] == pytest.approx(want, rel=1e-5)


def test_each_step_has_its_own_number_and_batch(shards, tmp_path) -> None:
    """The number is a coordinate of the random draws."""
    trainer = make_trainer(shards, tmp_path / "run", BASELINE | {"train.epochs": 2, "train.max_steps_per_epoch": 3})
    step, seen = trainer.steps.step, []

    def watched(images: torch.Tensor, labels: torch.Tensor, *rest: Any, **options: Any) -> dict[str, torch.Tensor]:
        seen.append((options["step"], images.clone(), labels.clone()))
        return step(images, labels, *rest, **options)

    trainer.steps.step = watched
    trainer.run()
    assert [number for number, _, _ in seen] == list(range(6))
    loader = make_trainer(shards, tmp_path / "other", BASELINE).loader
    batches = [batch for epoch in (0, 1) for batch in list(loader.epoch_iterator(epoch))[:3]]
    for (_, images, labels), batch in zip(seen, batches, strict=True):
        assert torch.equal(images, normalise(batch.images, trainer.data.transform))
        assert torch.equal(labels, batch.labels)
    assert not torch.equal(seen[0][1], seen[3][1])


def test_learning_rates_follow_their_schedules(finished_run) -> None:
    for row in rows_of(finished_run.dir, "step"):
        epoch = row["epoch"]
        assert row["lr_metric_model"] == pytest.approx(1e-2 * 0.5**epoch)
        assert row["lr_graph"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * epoch / 3)))
        assert row["lr_classifier"] == 1e-3


def test_every_epoch_is_evaluated_on_test_and_validation_classes(finished_run) -> None:
    rows = rows_of(finished_run.dir, "evaluation")
    assert [(row["epoch"], row["step"], row["split"]) for row in rows] == [
        (epoch, epoch * STEPS_WITH_VALIDATION, split) for epoch in (1, 2, 3) for split in ("test", "validation")
    ]
    for row in rows:
        assert set(row) == EVALUATION_KEYS
        assert 0 < row["map_at_r"] <= row["r_precision"] <= 1
        assert row["num_queries"] == {"test": 48, "validation": 18}[row["split"]]


def test_results_name_last_best_by_validation_and_best_by_test(finished_run) -> None:
    results = json.loads((finished_run.dir / "results.json").read_text())
    assert results == finished_run.results
    test, validation = (rows_of(finished_run.dir, "evaluation", s) for s in ("test", "validation"))

    def without_kind(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key != "kind"}

    best = max(validation, key=lambda row: row["map_at_r"])
    assert results["best_validation"] == without_kind(best)
    best_test = max(test, key=lambda row: (row["recall_at_1"], row["map_at_r"]))
    note = results["best_test"].pop("note")
    assert results["best_test"] == without_kind(best_test)
    assert "as the papers" in note
    assert results["last"] | {"step": 9} == without_kind(test[-1])
    assert results["steps"] == 9 and results["skipped_images"] == results["repaired_draws"] == 0
    assert results["seconds_per_step"] > 0 and results["peak_memory_bytes"] > 2**26
    text = results_text(results, "runs/x")
    for title in ("last ", "best by validation", "best by test R@1, as the papers choose"):
        assert title in text


def test_links_name_whole_checkpoints_and_older_ones_are_gone(finished_run) -> None:
    results, folder = finished_run.results, finished_run.dir
    want = {
        "last": "step-9",
        "best": f"step-{results['best_validation']['step']}",
        "best_test": f"step-{results['best_test']['step']}",
    }
    assert {name: (folder / name).readlink().name for name in want} == want
    assert {path.name for path in folder.glob("step-*")} == set(want.values())
    for name in want:
        checkpoint.verify((folder / name).resolve())
    assert not list(folder.rglob("*.partial"))


def test_tensorboard_holds_the_same_numbers(finished_run) -> None:
    board = EventAccumulator(str(finished_run.dir / "tensorboard"))
    board.Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in board.Scalars(tag)]

    for key in ("total_loss", "lr_graph"):
        want = [(row["step"], pytest.approx(row[key])) for row in rows_of(finished_run.dir, "step")]
        assert curve(f"step/{key}") == want
    for split in ("test", "validation"):
        rows = rows_of(finished_run.dir, "evaluation", split)
        want = [(row["step"], pytest.approx(row["map_at_r"])) for row in rows]
        assert curve(f"evaluation/{split}/map_at_r") == want


def test_training_finds_what_tells_unseen_classes_apart(shards, tmp_path) -> None:
    settings = BASELINE | {"train.epochs": 6, "optim.metric_model.schedule.name": "constant"}
    trainer = make_trainer(shards, tmp_path / "run", settings)
    fresh = EmbeddingSettings(trainer.data.transform, 48, 0, trainer.device)
    before = evaluate(trainer.parts.metric_model, trainer.data.shards, trainer.config.eval, fresh).result
    results = trainer.run()
    assert results["last"]["map_at_r"] > before.map_at_r + 0.1
    losses = [row["metric_loss"] for row in rows_of(tmp_path / "run", "step")]
    assert sum(losses[-STEPS_PER_EPOCH:]) < 0.7 * sum(losses[:STEPS_PER_EPOCH])
    assert not (tmp_path / "run" / "best").exists() and results["best_validation"] is None


def test_warm_up_trains_the_head_alone(shards, tmp_path) -> None:
    settings = {"train.epochs": 2, "train.warm_up_epochs": 1, "train.keep_last": 2}
    trainer = make_trainer(shards, tmp_path / "run", settings)
    names = [name for name, _ in trainer.parts.metric_model.named_parameters()]
    start = {name: p.detach().clone() for name, p in trainer.parts.metric_model.named_parameters()}
    start |= {f"graph.{n}": p.detach().clone() for n, p in trainer.parts.modules["graph"].named_parameters()}
    trainer.run()
    moved = {}
    for step in (5, 10):
        folder = tmp_path / "run" / f"step-{step}"
        saved = checkpoint.read_tensors(folder, "metric_model")
        saved |= {f"graph.{n}": t for n, t in checkpoint.read_tensors(folder, "graph").items()}
        moved[step] = {name for name in start if not torch.equal(saved[name], start[name])}
    assert {name for name in moved[5] if not name.startswith("graph.")} == {
        name for name in names if name.startswith("head.")
    }
    assert any(name.startswith("graph.") for name in moved[5])
    assert moved[10].issuperset(names)


KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "baseline": (BASELINE, {"metric_loss", "total_loss"}),
    "graph without generation": (
        {"generation.enabled": False},
        {"metric_loss", "node_loss", "total_loss"},
    ),
    "single coefficient": (
        {"graph.enabled": False, "generation.coefficients": "single"},
        LOSSES - {"node_loss", "diversity_loss"},
    ),
    "single coefficient beside the graph": (
        {"generation.coefficients": "single"},
        LOSSES - {"diversity_loss"},
    ),
    "proxies": ({"loss.metric": "proxy_anchor", "batch.num_samples": 3}, LOSSES),
    "sgd": (
        {"optim.metric_model.name": "sgd", "optim.metric_model.momentum": 0.9, "loss.metric": "n_pair"},
        LOSSES,
    ),
    "bf16": ({"train.precision": "bf16"}, LOSSES),
    "plain linear head, released sampler": (
        {"model.head": "linear", "model.pooling": "avg+max", "batch.sampler": "released"},
        LOSSES,
    ),
    "edge list, dropout per direction": (
        {"graph.backend": "scatter", "graph.edge_dropout": "independent", "graph.num_layers": 2},
        LOSSES,
    ),
    "no clipping, constant rates": (
        {"optim.clip_value": None, "optim.metric_model.schedule.name": "constant"},
        LOSSES,
    ),
}


@pytest.mark.filterwarnings("ignore:torch_scatter:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_trains(shards, tmp_path, kind: str) -> None:
    settings, losses = KINDS[kind]
    trainer = make_trainer(shards, tmp_path / "run", settings | {"train.max_steps_per_epoch": 2})
    start = {name: p.detach().clone() for name, p in trainer.parts.metric_model.named_parameters()}
    results = trainer.run()
    rows = rows_of(tmp_path / "run", "step")
    assert len(rows) == results["steps"] == 2
    for row in rows:
        assert {key for key in row if key.endswith("_loss") and not key.startswith("lr_")} == losses
        assert all(math.isfinite(row[key]) for key in losses)
    for name, parameter in trainer.parts.metric_model.named_parameters():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, start[name]), name
    assert results["last"]["num_queries"] == 48


def test_bf16_changes_the_numbers_and_only_a_little(shards, tmp_path) -> None:
    rows = {}
    for precision in ("fp32", "bf16"):
        settings = {"train.precision": precision, "train.max_steps_per_epoch": 1}
        train(shards, tmp_path / precision, settings)
        (rows[precision],) = rows_of(tmp_path / precision, "step")
    for loss in LOSSES:
        assert rows["bf16"][loss] != rows["fp32"][loss]
        # bf16 has 8 bits: products differ by about 2**-8.
        assert rows["bf16"][loss] == pytest.approx(rows["fp32"][loss], rel=5e-2)


def test_proxies_move_with_an_optimiser_of_their_own(shards, tmp_path) -> None:
    trainer = make_trainer(shards, tmp_path / "run", {"loss.metric": "proxy_anchor", "train.epochs": 2})
    before = trainer.parts.modules["metric_loss"].proxies.detach().clone()
    trainer.run()
    after = checkpoint.read_tensors(tmp_path / "run" / "last", "metric_loss")["proxies"]
    assert before.shape == after.shape == (8, 8) and not torch.equal(before, after)
    rates = [row["lr_metric_loss"] for row in rows_of(tmp_path / "run", "step")]
    assert rates == pytest.approx([1e-2] * 5 + [1e-3] * 5)


SHORT = {"train.epochs": 2, "train.max_steps_per_epoch": 2}


def test_the_seed_decides_every_bit(shards, tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(shards, tmp_path / name, SHORT | {"seed": seed})
    a, b, c = (saved_tensors(tmp_path / name) for name in "abc")
    assert_same_tensors(b, a)
    assert read_metrics(tmp_path / "b") == read_metrics(tmp_path / "a")
    weights = [name for name in a if name.endswith("weight") and "norm" not in name]
    assert weights and not any(torch.equal(a[name], c[name]) for name in weights)


def test_loader_processes_change_nothing(shards, tmp_path) -> None:
    for workers in (0, 2):
        train(shards, tmp_path / str(workers), SHORT | {"data.num_workers": workers})
    assert_same_tensors(saved_tensors(tmp_path / "2"), saved_tensors(tmp_path / "0"))
    assert read_metrics(tmp_path / "2") == read_metrics(tmp_path / "0")


def test_adding_the_graph_leaves_the_initial_weights_and_batches_alone(shards, tmp_path) -> None:
    settings = {"whole": {}, "baseline": BASELINE, "proxies": {"loss.metric": "proxy_anchor"}}
    trainers = {n: make_trainer(shards, tmp_path / n, s) for n, s in settings.items()}
    want = trainers["whole"].parts.metric_model.state_dict()
    for trainer in trainers.values():
        assert_same_tensors(trainer.parts.metric_model.state_dict(), want)
    batches = {n: next(iter(t.loader.epoch_iterator(0))) for n, t in trainers.items()}
    for batch in batches.values():
        assert torch.equal(batch.images, batches["whole"].images)


@pytest.mark.parametrize(("every", "epochs", "evaluated"), [(1, 2, [1, 2]), (2, 3, [2, 3]), (50, 2, [2])])
def test_evaluation_comes_every_few_epochs_and_at_the_end(
    shards, tmp_path, every: int, epochs: int, evaluated: list[int]
) -> None:
    settings = {"eval.every_epochs": every, "train.epochs": epochs, "train.max_steps_per_epoch": 1}
    results = train(shards, tmp_path / "run", BASELINE | settings)
    rows = rows_of(tmp_path / "run", "evaluation")
    assert [row["epoch"] for row in rows] == evaluated
    assert results["last"]["epoch"] == epochs


def test_steps_are_logged_every_few_steps(shards, tmp_path) -> None:
    train(shards, tmp_path / "run", BASELINE | {"train.log_every": 3, "train.epochs": 2})
    assert [row["step"] for row in rows_of(tmp_path / "run", "step")] == [3, 6, 9]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_cuda_is_close_to_one_on_the_cpu(shards, tmp_path, precision: str) -> None:
    settings = {"train.max_steps_per_epoch": 3}
    train(shards, tmp_path / "cpu", settings)
    on_cuda = settings | {"train.device": "cuda", "train.precision": precision}
    results = train(shards, tmp_path / "cuda", on_cuda)
    assert results["peak_memory_bytes"] == torch.cuda.max_memory_allocated()
    first = [rows_of(tmp_path / name, "step")[0] for name in ("cpu", "cuda")]
    for loss in LOSSES:
        # Convolutions on CUDA may use TF32 (10 bits), bf16 has 8.
        assert first[1][loss] == pytest.approx(first[0][loss], rel=5e-2)
