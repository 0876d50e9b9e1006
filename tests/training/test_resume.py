"""A run that was stopped goes on as if nothing had happened, or says why it cannot."""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import (
    assert_same_run,
    assert_same_tensors,
    convert_patterns,
    draw_patterns,
    make_trainer,
    read_metrics,
    read_state,
    saved_tensors,
    train,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcahng.errors import ConfigError, DataError, Interrupted
from gcahng.training import checkpoint
from gcahng.training import trainer as trainer_module
from gcahng.training.resume import FREE, check_resumable
from gcahng.training.run_saver import RunSaver
from gcahng.training.trainer import Trainer

# Everything that has a state: warm-up, proxies, three kinds of schedule, validation, epoch averages.
WHOLE = {
    "train.epochs": 3,
    "train.warm_up_epochs": 1,
    "data.validation": 0.25,
    "loss.metric": "proxy_anchor",
}
AUTO = {"train.resume": "auto"}
BASELINE = {"graph.enabled": False, "generation.enabled": False, "train.max_steps_per_epoch": 2}


class Interruption(Exception):
    """Stands for whatever ends a process."""


def interrupt(trainer: Trainer, calls: int) -> None:
    """Run until call number `calls` of the step raises."""
    step, made = trainer.steps.step, 0

    def counting(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        nonlocal made
        made += 1
        if made == calls:
            raise Interruption
        return step(*args, **kwargs)

    trainer.steps.step = counting
    with pytest.raises(Interruption):
        trainer.run()


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(shards, folder, WHOLE)
    return folder


@pytest.mark.parametrize("calls", [6, 11], ids=["in epoch 2", "in epoch 3"])
def test_a_resumed_run_equals_an_undisturbed_one(shards, tmp_path, undisturbed, calls: int) -> None:
    run = tmp_path / "run"
    interrupt(make_trainer(shards, run, WHOLE), calls)
    assert len([r for r in read_metrics(run) if r["kind"] == "step"]) == calls - 1
    train(shards, run, WHOLE | AUTO)
    assert_same_run(run, undisturbed)
    # Rows of steps that were taken twice are in the file once, and in TensorBoard too.
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    curves = {
        "step/total_loss": list(range(1, 13)),
        "evaluation/test/map_at_r": [4, 8, 12],
        "evaluation/validation/map_at_r": [4, 8, 12],
    }
    for tag, steps in curves.items():
        assert [event.step for event in board.Scalars(tag)] == steps


def test_loader_processes_may_change_on_resume(shards, tmp_path, undisturbed) -> None:
    run = tmp_path / "run"
    interrupt(make_trainer(shards, run, WHOLE | {"data.num_workers": 2}), 7)
    train(shards, run, WHOLE | AUTO)
    assert_same_run(run, undisturbed)


def test_a_run_that_saved_nothing_starts_anew(shards, tmp_path, undisturbed) -> None:
    run = tmp_path / "run"
    interrupt(make_trainer(shards, run, WHOLE), 3)
    train(shards, run, WHOLE | AUTO)
    assert_same_run(run, undisturbed)


def test_what_a_killed_process_leaves_is_put_right(shards, tmp_path, undisturbed) -> None:
    """Killed after the checkpoint of epoch 2, before its links; another write was under way."""
    run = tmp_path / "run"
    interrupt(make_trainer(shards, run, WHOLE), 9)
    links = {name: (run / name).readlink() for name in ("best", "best_test", "last")}
    assert "step-8" in {str(link) for link in links.values()}
    for name, link in links.items():
        if str(link) == "step-8":
            (run / name).unlink()
    (run / "step-12.partial").mkdir()
    (run / "step-12.partial" / "graph.safetensors").write_bytes(b"cut")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    train(shards, run, WHOLE | AUTO)
    assert_same_run(run, undisturbed)
    assert not list(run.glob("*.partial"))


def test_links_that_were_never_set_are_set_after_the_resume(shards, tmp_path) -> None:
    """Killed between the first checkpoint and its links, with a model that no later epoch makes better."""
    unmoved = {"optim.metric_model.lr": 1e-12, "model.head": "linear", "model.freeze_batch_norm": True}
    settings = BASELINE | unmoved | {"train.epochs": 3, "data.validation": 0.25, "train.keep_last": 1}
    run = tmp_path / "run"
    interrupt(make_trainer(shards, run, settings), 3)
    for name in ("best", "best_test", "last"):
        (run / name).unlink()
    train(shards, run, settings | AUTO)
    links = {name: (run / name).readlink().name for name in ("best", "best_test", "last")}
    assert links == {"best": "step-2", "best_test": "step-2", "last": "step-6"}
    assert {p.name for p in run.glob("step-*")} == {"step-2", "step-6"}


def test_a_finished_run_stays_as_it_is(shards, tmp_path, undisturbed) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    results = train(shards, run, WHOLE | AUTO)
    assert_same_run(run, undisturbed)
    # Nothing was measured now; what was measured then stays.
    assert results == json.loads((undisturbed / "results.json").read_text())
    assert results["steps"] == 12 and results["seconds_per_step"] > 0


@pytest.mark.parametrize("content", ['{"steps": 1', "[12]", "{}"])
def test_damaged_results_of_a_finished_run_are_written_again(shards, tmp_path, undisturbed, content: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    (run / "results.json").write_text(content)
    train(shards, run, WHOLE | AUTO)
    assert_same_run(run, undisturbed)


def test_evaluations_behind_a_save_of_the_last_batch_are_made_again_once(
    shards, tmp_path, undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to end in the last step of epoch 2; the next start was killed in the save of what it had evaluated."""
    run = tmp_path / "run"
    trainer = make_trainer(shards, run, WHOLE)
    step = trainer.steps.step

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 7:
            trainer.interruption.signals.received = int(signal.SIGTERM)
        return step(*args, **kwargs)

    trainer.steps.step = signalled
    with pytest.raises(Interrupted):
        trainer.run()
    stands = read_state(run)["progress"]
    assert (stands["epoch"], stands["batch"], stands["step"]) == (1, 4, 8)
    with monkeypatch.context() as patched:
        patched.setattr(RunSaver, "save", lambda *_, **__: None)  # it is not written yet
        again = make_trainer(shards, run, WHOLE | AUTO)
        patched.setattr(again, "_train_epoch", interrupted_in_epoch_3(again))
        with pytest.raises(Interruption):
            again.run()
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "evaluation"] == [4, 4, 8, 8]
    train(shards, run, WHOLE | AUTO)
    assert_same_run(run, undisturbed)


def interrupted_in_epoch_3(trainer: Trainer) -> Callable[..., None]:
    whole = trainer._train_epoch

    def train_epoch(epoch: int, *args: Any) -> None:
        if epoch == 2:
            raise Interruption
        whole(epoch, *args)

    return train_epoch


def test_a_run_may_get_more_epochs_where_no_schedule_depends_on_them(shards, tmp_path) -> None:
    settings = BASELINE | {"train.precision": "bf16"}
    train(shards, tmp_path / "run", settings | {"train.epochs": 1})
    train(shards, tmp_path / "run", settings | AUTO | {"train.epochs": 2})
    train(shards, tmp_path / "whole", settings | {"train.epochs": 2})
    assert_same_tensors(saved_tensors(tmp_path / "run"), saved_tensors(tmp_path / "whole"))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_a_named_checkpoint_continues_in_another_folder(shards, tmp_path) -> None:
    settings = BASELINE | {"train.epochs": 2, "train.keep_last": 2}
    train(shards, tmp_path / "whole", settings)
    checkpoint = str(tmp_path / "whole" / "step-2")
    train(shards, tmp_path / "other", settings | {"train.resume": checkpoint})
    assert_same_tensors(saved_tensors(tmp_path / "other"), saved_tensors(tmp_path / "whole"))
    with pytest.raises(ConfigError, match="already holds a run, the newest checkpoint being step-4"):
        make_trainer(shards, tmp_path / "whole", settings | {"train.resume": checkpoint})


def test_other_data_is_refused(pattern_folder, shards, tmp_path) -> None:
    train(shards, tmp_path / "run", BASELINE)
    others = draw_patterns(tmp_path / "images", images=7)
    other_shards = convert_patterns(others, tmp_path / "shards")
    with pytest.raises(ConfigError, match=r"step-2 was trained on other data than .*manifests differ"):
        make_trainer(other_shards, tmp_path / "run", BASELINE | AUTO)
    # The same data under another name is welcome.
    again = convert_patterns(pattern_folder, tmp_path / "moved")
    make_trainer(again, tmp_path / "run", BASELINE | AUTO)


def test_other_training_classes_are_refused(shards, tmp_path) -> None:
    """The settings are the same, so another version of the package must have dealt the classes."""
    settings = BASELINE | {"data.validation": 0.25}
    train(shards, tmp_path / "run", settings)
    trainer = make_trainer(shards, tmp_path / "run", settings | AUTO)
    saved = read_state(tmp_path / "run")["data"]
    folder, parts = tmp_path / "run" / "last", trainer.parts.optimizers
    check_resumable(folder, saved, dict(saved), trainer.config, parts)
    with pytest.raises(ConfigError, match=r"trained on other classes of .*\(6, now 7\). Start a new run"):
        check_resumable(folder, saved, saved | {"classes": "0", "num_classes": 7}, trainer.config, parts)


def test_a_run_of_an_earlier_version_is_refused_in_words(shards, tmp_path) -> None:
    """Its optimiser of the metric model had one parameter group."""
    train(shards, tmp_path / "run", BASELINE)
    folder = (tmp_path / "run" / "last").resolve()
    file = folder / "optimizer-metric_model.pt"
    saved = torch.load(file, weights_only=True)
    backbone, head = saved["param_groups"]
    saved["param_groups"] = [head | {"params": [*backbone["params"], *head["params"]]}]
    torch.save(saved, file)
    listing = json.loads((folder / "manifest.json").read_text())
    listing[file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(listing))
    sizes = [len(group["params"]) for group in (backbone, head)]
    want = (
        rf"`train.resume`: the optimiser of `metric_model` in .* has 1 parameter group \({sum(sizes)} tensors both\): "
        rf"expected 2 parameter groups \({sizes[0]} tensors after_warm_up, {sizes[1]} tensors both\)\. "
        r"Another version of gcahng saved it\. .*train\.init_from"
    )
    with pytest.raises(ConfigError, match=want):
        make_trainer(shards, tmp_path / "run", BASELINE | AUTO)
    begun = make_trainer(shards, tmp_path / "begun", BASELINE | {"train.init_from": str(folder)})
    assert_same_tensors(begun.parts.metric_model.state_dict(), checkpoint.read_tensors(folder, "metric_model"))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"optim.metric_model.lr": 0.5}, "optim.metric_model.lr was 0.01, is 0.5"),
    "schedule": (
        {"optim.classifier.schedule.name": "step"},
        "optim.classifier.schedule.name was 'constant', is 'step'",
    ),
    "optimiser": ({"optim.graph.name": "sgd"}, "optim.graph.name was 'adamw', is 'sgd'"),
    "end of a cosine": ({"train.epochs": 5}, r"train.epochs was 1, is 5 \(cosine schedules end with it\)"),
    "model": ({"model.embedding_dim": 6}, "model.embedding_dim was 8, is 6"),
    "arguments": ({"model.backbone_args": {"widths": [4, 6]}}, "model.backbone_args was {.*}, is {.*}"),
    "length of an epoch": ({"train.max_steps_per_epoch": None}, "train.max_steps_per_epoch was 1, is null"),
    "precision": ({"train.precision": "bf16"}, "train.precision was 'fp32', is 'bf16'"),
    "training classes": ({"data.validation": 0.25}, "data.validation was 0.0, is 0.25"),
    "several": (
        {"seed": 9, "batch.num_classes": 3, "generation.alpha": 7, "loss.metric": "n_pair"},
        "seed was 1, is 9; batch.num_classes was 4, is 3; generation.alpha was 5.0, is 7.0; "
        "loss.metric was 'n_pair_plus', is 'n_pair'",
    ),
}


@pytest.fixture(scope="module")
def short_run(shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    train(shards, folder, {"train.max_steps_per_epoch": 1})
    return folder


@pytest.mark.parametrize("case", CHANGES)
def test_other_settings_are_refused(shards, short_run, case: str) -> None:
    change, message = CHANGES[case]
    want = rf"`train.resume`: .*step-1 belongs to another experiment: {message}\. Set these back.*train.init_from"
    with pytest.raises(ConfigError, match=want):
        make_trainer(shards, short_run, {"train.max_steps_per_epoch": 1} | AUTO | change)


def test_settings_that_move_no_weight_may_change(pattern_folder, shards, short_run, tmp_path) -> None:
    moved = convert_patterns(pattern_folder, tmp_path / "moved")
    changes = {
        "train.resume": str(short_run / "last"),
        "train.log_every": 3,
        "train.record_every": 2,
        "train.keep_last": 4,
        "train.save_every_steps": 1,
        "train.save_in_background": False,
        "train.device": "auto",
        "data.num_workers": 1,
        "distributed.timeout_seconds": 60,
        "distributed.shard_classes": True,
        "data.remote": "direct",
        "data.cache_dir": str(tmp_path / "cache"),
        "data.cache_bytes": 0,
        "eval.ks": [2, 3],
        "eval.batch_size": 5,
        "eval.every_epochs": 7,
    }
    assert {key for key in changes if not key.startswith("eval.")} | {"data.dir", "run.dir", "train.epochs"} == FREE
    trainer = make_trainer(moved, tmp_path / "other", {"train.max_steps_per_epoch": 1} | changes)
    assert trainer.progress.step == 1


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("epoch", [2, 3])
def test_an_evaluation_that_fails_loses_no_epoch(
    shards, tmp_path, undisturbed, monkeypatch: pytest.MonkeyPatch, epoch: int, split: str
) -> None:
    run = tmp_path / "run"
    evaluate = trainer_module.evaluate

    def failing(*args: Any, rows: Any, **options: Any) -> Any:
        if trainer.progress.epoch == epoch and (rows is None) == (split == "test"):
            raise DataError("sample 7 is damaged")
        return evaluate(*args, rows=rows, **options)

    trainer = make_trainer(shards, run, WHOLE)
    monkeypatch.setattr(trainer_module, "evaluate", failing)
    with pytest.raises(DataError, match="sample 7 is damaged"):
        trainer.run()
    assert (run / "last").readlink().name == f"step-{4 * epoch}"
    assert (run / f"step-{4 * epoch - 4}").is_dir()  # the older one is not given up for it
    assert {row["epoch"] for row in read_metrics(run) if row["kind"] == "evaluation"} == set(range(1, epoch))
    monkeypatch.undo()
    train(shards, run, WHOLE | AUTO)
    results = json.loads((run / "results.json").read_text())
    assert results["last"]["epoch"] == 3
    assert_same_run(run, undisturbed)


def test_a_failed_evaluation_of_more_epochs_leaves_no_stale_results(
    shards, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **options: Any) -> Any:
        raise DataError("sample 7 is damaged")

    train(shards, tmp_path / "run", BASELINE)
    longer = BASELINE | AUTO | {"train.epochs": 2}
    monkeypatch.setattr(trainer_module, "evaluate", failing)
    with pytest.raises(DataError, match="sample 7 is damaged"):
        train(shards, tmp_path / "run", longer)
    monkeypatch.undo()
    results = train(shards, tmp_path / "run", longer)
    assert results["steps"] == 4 and results["last"]["epoch"] == 2
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results


@pytest.mark.parametrize("interrupted_in", [2, 6])
def test_a_run_goes_on_before_a_milestone_as_after_it(shards, tmp_path, undisturbed, interrupted_in: int) -> None:
    """What a schedule waits for survives JSON, whose keys are text."""
    settings = WHOLE | {"train.save_every_steps": 1}
    interrupt(make_trainer(shards, tmp_path / "run", settings), interrupted_in)
    train(shards, tmp_path / "run", settings | AUTO)
    assert_same_tensors(saved_tensors(tmp_path / "run"), saved_tensors(undisturbed))
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed)


def test_a_checkpoint_that_was_being_replaced_gets_its_name_back(shards, tmp_path, undisturbed: Path) -> None:
    """Killed between the two renames."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    (run / "step-12").rename(run / "step-12.replaced")
    train(shards, run, WHOLE | AUTO)
    assert_same_run(run, undisturbed)


def test_a_missing_checkpoint_is_refused(shards, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/step-1` is no checkpoint: expected a folder"):
        make_trainer(shards, tmp_path / "run", {"train.resume": f"{tmp_path}/nowhere/step-1"})
