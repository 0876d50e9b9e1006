"""A whole run whose checks are deferred, as on CUDA: same numbers, same errors, and nothing bad is saved."""

from functools import partial

import pytest
import torch
from run_cases import assert_same_tensors, make_trainer, read_metrics, saved_tensors

from gcahng.errors import TrainingError
from gcahng.training import finite_checks
from gcahng.training import trainer as trainer_module
from gcahng.training.optimizers import obeys_gate
from gcahng.training.parts import build_parts, build_step
from gcahng.training.trainer import Trainer

BASELINE = {"graph.enabled": False, "generation.enabled": False}


def trainer_with(shards, run_dir, settings, *, deferred: bool) -> Trainer:
    """A trainer whose optimisers are fused, as on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "build_parts", partial(build_parts, fused=True))
        patch.setattr(trainer_module, "build_step", partial(build_step, deferred_checks=deferred))
        return make_trainer(shards, run_dir, settings)


@pytest.mark.parametrize("late", [False, True])
def test_a_deferred_run_is_the_immediate_one(monkeypatch, shards, tmp_path, late: bool) -> None:
    settings = {"train.epochs": 2, "train.log_every": 2, "train.max_steps_per_epoch": 3}
    if late:
        monkeypatch.setattr(finite_checks._Arrival, "arrived", False)
    for name in ("now", "later"):
        trainer_with(shards, tmp_path / name, settings, deferred=name == "later").run()
    assert_same_tensors(saved_tensors(tmp_path / "later"), saved_tensors(tmp_path / "now"))
    assert read_metrics(tmp_path / "later") == read_metrics(tmp_path / "now")
    rows = [row for row in read_metrics(tmp_path / "later", clocks=True) if row["kind"] == "step"]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["step_seconds"] >= row["data_seconds"] > 0 for row in rows)


def poison(trainer: Trainer, bad_step: int, positions: list[int]) -> None:
    calls = iter(range(100))

    def spoil(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(0, torch.tensor(positions), torch.inf) if next(calls) == bad_step else output

    trainer.parts.metric_model.register_forward_hook(spoil)


@pytest.mark.parametrize("bad_step", [0, 2, 4])
def test_the_samples_of_the_bad_step_are_named_before_anything_is_saved(
    monkeypatch, shards, tmp_path, bad_step: int
) -> None:
    monkeypatch.setattr(finite_checks._Arrival, "arrived", False)  # learn of it as late as can be
    trainer = trainer_with(shards, tmp_path / "run", BASELINE | {"train.log_every": 100}, deferred=True)
    poison(trainer, bad_step, [2, 6])
    batches = list(trainer.loader.epoch_iterator(0))
    assert len(batches) == 5  # step 4 is the last one of its epoch
    keys = ", ".join(trainer.data.shards.key(int(batches[bad_step].rows[place])) for place in (2, 6))
    with pytest.raises(TrainingError, match=rf"^Step {bad_step}: 2 embeddings .* Samples: {keys}\.$"):
        trainer.run()
    assert not list((tmp_path / "run").glob("step-*"))
    assert read_metrics(tmp_path / "run") == []


def test_no_row_of_a_bad_step_is_logged(shards, tmp_path) -> None:
    trainer = trainer_with(shards, tmp_path / "run", BASELINE | {"train.log_every": 1}, deferred=True)
    poison(trainer, 2, [0])
    with pytest.raises(TrainingError, match=r"^Step 2: 1 embeddings .* Samples: \d{9}\.$"):
        trainer.run()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_who_is_fused_and_deferred_follows_the_device(shards, tmp_path) -> None:
    trainer = make_trainer(shards, tmp_path / "run")
    assert trainer.backend.checks.gate is None
    assert not any(obeys_gate(optimizer) for optimizer in trainer.parts.optimizers.values())
    forced = trainer_with(shards, tmp_path / "run", {}, deferred=True)
    assert forced.backend.checks.gate is not None
    assert all(obeys_gate(optimizer) for optimizer in forced.parts.optimizers.values())


@pytest.mark.parametrize("first_fused", [False, True])
def test_a_resume_keeps_its_own_kind_of_optimiser(shards, tmp_path, first_fused: bool) -> None:
    """A run begun on CUDA goes on on the CPU, and the other way round."""
    settings = {"train.epochs": 2, "train.max_steps_per_epoch": 2, "optim.graph.schedule.name": "constant"}
    for name in ("first", "second"):
        first = tmp_path / name
        fused = first_fused if name == "first" else not first_fused
        trainer = make_trainer(shards, first, settings | {"train.epochs": 1})
        if fused:
            trainer = trainer_with(shards, first, settings | {"train.epochs": 1}, deferred=True)
        trainer.run()
        resumed = make_trainer(shards, first, settings | {"train.resume": "auto"})
        if not first_fused:
            resumed = trainer_with(shards, first, settings | {"train.resume": "auto"}, deferred=True)
        wanted = not first_fused
        for optimizer in resumed.parts.optimizers.values():
            assert obeys_gate(optimizer) == wanted
            assert all(bool(group["fused"]) == wanted for group in optimizer.param_groups)
        resumed.run()
    # The same but for rounding in the first epoch.
    a, b = (saved_tensors(tmp_path / name) for name in ("first", "second"))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
