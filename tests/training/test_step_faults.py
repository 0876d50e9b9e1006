"""Steps that meet numbers that are not finite are left out as if they had not been, and counted."""

import json
import logging
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import MEMORY, Driven, Switch, bad_features, bad_metric_gradient, over_ranks
from rank_group import run_ranks
from run_cases import assert_same_tensors, make_trainer, read_metrics, read_state, saved_tensors
from torch import Tensor, nn

from gcahng.errors import TrainingError
from gcahng.training import finite_checks
from gcahng.training import trainer as trainer_module
from gcahng.training.kept_state import KeptState
from gcahng.training.make_backend import make_backend
from gcahng.training.observers import RunObserver
from gcahng.training.parts import build_parts, build_step
from gcahng.training.progress import Progress
from gcahng.training.run_start import alone
from gcahng.training.trainer import Trainer


@pytest.mark.parametrize("fault", ["features", "metric gradient", "metric loss"])
@pytest.mark.parametrize("loss", ["n_pair_plus", "memory"])
def test_a_step_left_out_leaves_nothing_behind(shards: Path, tmp_path: Path, fault: str, loss: str) -> None:
    if loss == "memory":
        pytest.importorskip("pytorch_metric_learning")
    settings = MEMORY if loss == "memory" else {"loss.metric": loss}
    settings = settings | {"graph.enabled": loss == "memory", "generation.enabled": loss == "memory"}
    run = Driven.of(shards, tmp_path / "run", settings)
    assert run.train({0: None, 1: fault, 2: None, 3: None}) == [False, True, False, False]
    never = Driven.of(shards, tmp_path / "never", settings)
    never.train({0: None, 2: None, 3: None})
    assert any("running_mean" in name for name in never.tensors())
    assert any("queue" in name or "memory" in name for name in never.tensors()) == (loss == "memory")
    assert_same_tensors(run.tensors(), never.tensors())
    parameters = [p for module in run.trainer.parts.modules.values() for p in module.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in parameters)


@pytest.mark.parametrize(("fault", "moves"), [("classifier loss", 1), ("generation gradient", 2)])
def test_what_earlier_passes_moved_stays_moved(shards: Path, tmp_path: Path, fault: str, moves: int) -> None:
    pytest.importorskip("pytorch_metric_learning")
    run = Driven.of(shards, tmp_path / "run", MEMORY)
    run.train({0: None})
    before = run.tensors()
    moved: list[dict[str, Tensor]] = []
    step = run.trainer.backend.step

    def watched(names: Any, reach: str) -> None:
        step(names, reach)
        moved.append(run.tensors())

    run.trainer.backend.step = watched  # type: ignore[method-assign]
    assert run.train({1: fault}) == [True] and len(moved) == moves
    modules = run.trainer.parts.modules
    kept = {f"{part}.{name}" for part, module in modules.items() for name, _ in module.named_parameters()}
    kept |= {name for name in before if "/" in name}
    # Parameters and what moves them are those behind the last good pass; all else is from before the step.
    want = {name: (moved[-1] if name in kept else before)[name] for name in before}
    assert_same_tensors(run.tensors(), want)
    assert any(not torch.equal(moved[-1][name], before[name]) for name in before.keys() - kept - {"averages"})
    assert run.train({2: None}) == [False]


@pytest.mark.parametrize("kinds", [("ddp", "zero-2"), pytest.param(("zero-0", "zero-1"), marks=pytest.mark.full)])
def test_ranks_leave_it_out_together(shards: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """The fault is on the last rank alone; DDP's and DeepSpeed's engines go on as if nothing had been."""
    pytest.importorskip("pytorch_metric_learning")
    pytest.importorskip("deepspeed")
    for of_rank in run_ranks(2, over_ranks, shards, tmp_path, kinds):
        for kind in kinds:
            out, tensors, never = of_rank[kind]
            assert out == [False, True, True, False, False], kind
            assert_same_tensors(tensors, never)


@pytest.mark.parametrize("what", ["overflow", "broken"])
def test_a_loss_scaler_s_overflows_are_no_faults(shards: Path, tmp_path: Path, what: str) -> None:
    run = Driven.of(shards, tmp_path / "run", {"graph.enabled": False, "generation.enabled": False})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 if what == "overflow" else 8.0)
    run.trainer.backend.scaler = scaler  # type: ignore[attr-defined]
    start = run.tensors()
    if what == "overflow":
        assert not any(run.train(dict.fromkeys(range(12))))
        assert scaler.get_scale() < 2.0**126 and run.tensors().keys() != start.keys()  # moved in the end
        return
    # No scale helps against a gradient that is NaN: once it is below 1 the scaler has failed.
    found = [run.train({step: "metric gradient"})[0] for step in range(6)]
    assert found == [False] * 4 + [True] * 2 and scaler.get_scale() == 0.5


class Listener(RunObserver):
    def __init__(self) -> None:
        self.heard: list[tuple[int, int, str]] = []

    def dropped(self, progress: Progress, reason: str) -> None:
        self.heard.append((progress.step, progress.dropped, reason))


def with_faults(trainer: Trainer, at: dict[int, str]) -> Listener:
    """Faults at these steps of the run; what the observer hears."""
    switches = {"features": Switch(), "metric gradient": Switch()}
    bad_features(trainer, switches["features"])
    bad_metric_gradient(trainer, switches["metric gradient"])

    def begin(module: nn.Module, inputs: Any) -> None:
        for name, switch in switches.items():
            switch.on = at.get(trainer.progress.step) == name and module.training

    trainer.parts.metric_model.register_forward_pre_hook(begin)
    listener = Listener()
    trainer.observers._observers.append(listener)
    return listener


RUN = {"train.epochs": 2, "train.save_every_steps": 1, "eval.every_epochs": 2, "health.skip_non_finite": 3}


def test_a_run_counts_and_logs_what_it_leaves_out(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = RUN | {"train.log_every": 2}
    trainer = make_trainer(shards, tmp_path / "run", settings)
    listener = with_faults(trainer, {0: "features", 3: "metric gradient", 6: "features"})
    with caplog.at_level(logging.WARNING):
        results = trainer.run()
    rows = read_metrics(tmp_path / "run")
    dropped = [row for row in rows if row["kind"] == "dropped"]
    assert [(row["step"], row["epoch"]) for row in dropped] == [(1, 0), (4, 0), (7, 1)]
    assert "Step 0: 8 embeddings" in dropped[0]["reason"] and "Samples: " in dropped[0]["reason"]
    assert "Gradients of `metric_model`" in dropped[1]["reason"]
    # Step 4 is to be logged, and has nothing to log.
    assert [row["step"] for row in rows if row["kind"] == "step"] == [2, 6, 8, 10]
    assert listener.heard == [(row["step"], n, row["reason"]) for n, row in enumerate(dropped, 1)]
    assert results["dropped_steps"] == read_state(tmp_path / "run")["progress"]["dropped"] == 3
    assert sum("Left out" in record.getMessage() for record in caplog.records) == 3
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == len(results)


def test_one_more_ends_the_run_and_a_resume_counts_on(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = RUN | {"health.skip_non_finite": 1, "train.keep_last": 9}
    with_faults(trainer := make_trainer(shards, folder, settings), {1: "features", 4: "metric gradient"})
    with pytest.raises(TrainingError, match=r"Step 4: Gradients .* 1 steps were left out before .*skip_non_finite=1"):
        trainer.run()
    # Set back by a checkpoint: the row of the step that was left out is cut back with it, and comes again.
    (folder / "step-4").rename(tmp_path / "gone")
    (folder / "step-3").rename(tmp_path / "gone as well")
    for link in ("last", "best", "best_test"):
        (folder / link).unlink(missing_ok=True)
    with_faults(again := make_trainer(shards, folder, settings | {"train.resume": "auto"}), {4: "features"})
    assert (again.progress.step, again.progress.dropped) == (2, 1)
    with pytest.raises(TrainingError, match="Step 4: .* 1 steps were left out"):
        again.run()
    assert [row["step"] for row in read_metrics(folder) if row["kind"] == "dropped"] == [2]


def test_an_undisturbed_run_is_the_same_whatever_may_be_left_out(shards: Path, tmp_path: Path) -> None:
    plain = {"train.epochs": 1}
    for name, more in (("stop", {"health.keep_dumps": 0}), ("skip", {"health.skip_non_finite": 5})):
        make_trainer(shards, tmp_path / name, plain | more).run()
    assert_same_tensors(saved_tensors(tmp_path / "skip"), saved_tensors(tmp_path / "stop"))
    assert not (tmp_path / "skip" / "faults").exists()


def test_steps_that_may_be_left_out_are_checked_at_once(shards: Path, tmp_path: Path) -> None:
    for skip in (0, 1):
        trainer = make_trainer(shards, tmp_path / str(skip), {"health.skip_non_finite": skip})
        backend = make_backend(trainer.config, trainer.parts, alone(trainer.config), deferred_checks=True)
        assert (backend.checks.gate is None) == bool(skip)


@pytest.mark.parametrize(("deferred", "kept"), [(False, 1), (True, 3)])
def test_no_batch_is_kept_longer_than_a_finding_may_be_about_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deferred: bool, kept: int
) -> None:
    monkeypatch.setattr(trainer_module, "build_step", partial(build_step, deferred_checks=deferred))
    monkeypatch.setattr(trainer_module, "build_parts", partial(build_parts, fused=deferred))
    run = Driven.of(shards, tmp_path / "run", {"health.skip_non_finite": 0})
    monkeypatch.setattr(finite_checks._Arrival, "arrived", False)
    batches = list(run.trainer.loader.epoch_iterator(0))
    alive = []
    for step, batch in enumerate(batches):
        images = batch.images.clone()
        alive.append(weakref.ref(images))
        run.trainer.steps.run(images, batch.labels, batch.rows, step, None, 0)
        del images
    assert len(batches) > 3 and sum(images() is not None for images in alive) == kept


class Odd(nn.Module):
    """Buffers that come, go and change, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lazy", None)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("apart", torch.ones(2), persistent=False)
        self.weight = nn.Parameter(torch.ones(2))
        self.seen = [1]

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_everything_but_parameters_is_put_back() -> None:
    odd = Odd()
    kept = KeptState({"odd": odd})
    for _ in range(2):
        kept.take()
        odd.lazy = torch.ones(4)
        odd.mean = odd.mean + torch.nan  # another tensor
        odd.apart.fill_(torch.inf)
        odd.seen.append(2)
        with torch.no_grad():
            odd.weight += 1
        kept.put_back()
        assert odd.lazy is None and odd.mean.tolist() == [0, 0, 0] and odd.apart.tolist() == [1, 1]
        assert odd.seen == [1]
    assert odd.weight.tolist() == [3, 3]
