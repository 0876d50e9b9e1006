"""Dumps of failing steps hold what they began with, and a replay finds where the numbers come from."""

import errno
import json
import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import Driven, dumped_over_ranks
from rank_group import run_ranks
from run_cases import assert_same_tensors, make_trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from gcahng.errors import ConfigError, DataError, TrainingError
from gcahng.training import finite_checks, step_dump
from gcahng.training import replay as replay_module
from gcahng.training import trainer as trainer_module
from gcahng.training.parts import build_parts, build_step
from gcahng.training.step_dump import read_dump

# Of components of these tests.
replay = partial(replay_module.replay, trust_components=True)
BASELINE = {"graph.enabled": False, "generation.enabled": False}


def failed(shards: Path, run_dir: Path, settings: Mapping[str, Any]) -> Path:
    """The dump of a run that stops at its first step."""
    with pytest.raises(TrainingError, match="not finite|is inf|is nan"):
        make_trainer(shards, run_dir, settings).run()
    (folder,) = (run_dir / "faults").iterdir()
    assert not list(run_dir.glob("step-*"))
    return folder


def test_an_image_that_a_backbone_cannot_take(shards: Path, tmp_path: Path) -> None:
    folder = failed(
        shards,
        tmp_path / "run",
        BASELINE | {"model.backbone": "fault_cases:DarkSpots", "model.backbone_args": {}, "model.head": "linear"},
    )
    found = replay(folder)
    assert found.reproduced
    assert (found.bad_module, found.bad_module_kind) == ("metric_model.backbone.network", "DarkSpots")
    bad = list(found.fault.positions)
    assert found.bad_positions == bad and 0 < len(bad) < 8 and found.losses == {}
    assert found.bad_samples == [found.fault.keys[position] for position in bad]
    assert found.fault.what == "embedding" and f"{len(bad)} embeddings" in found.fault.message
    assert found.bad_weights == found.bad_gradients == []


def test_a_loss_that_overflows(shards: Path, tmp_path: Path) -> None:
    found = replay(failed(shards, tmp_path / "run", BASELINE | {"loss.metric": "fault_cases:Overflow"}))
    assert found.reproduced and found.bad_module == "metric_loss" and found.bad_module_kind == "Overflow"
    assert found.losses == {"metric_loss": math.inf, "total_loss": math.inf} and not found.bad_positions
    assert (found.fault.what, found.fault.reach) == ("loss", "metric")


def test_a_gradient_that_is_not_a_number_of_a_finite_loss(shards: Path, tmp_path: Path) -> None:
    found = replay(failed(shards, tmp_path / "run", BASELINE | {"loss.metric": "fault_cases:RootAtZero"}))
    assert found.reproduced and found.bad_module is None and math.isfinite(found.losses["total_loss"])
    assert {"metric_model.head.linear.weight", "metric_model.backbone.network.stem.0.weight"} <= set(
        found.bad_gradients
    )
    assert (found.fault.what, found.fault.part) == ("gradient", "metric_model")


def test_weights_that_are_infinite_in_a_later_step(shards: Path, tmp_path: Path) -> None:
    run = Driven.of(shards, tmp_path / "run", {"model.backbone": "fault_cases:Dropping", "model.backbone_args": {}})
    run.trainer.averages.metric_loss, run.trainer.averages.generation_loss = 2.5, 30.0
    run.train({0: None, 1: None})
    with torch.no_grad():
        run.trainer.parts.modules["graph"].node_classifier.bias[1] = torch.inf  # type: ignore[index, union-attr, operator]
    before = run.tensors(optimizers=False)
    assert run.train({2: None}) == [True]
    folder = tmp_path / "run" / "faults" / "step-2"
    found = replay(folder)
    assert found.bad_weights == ["graph.node_classifier.bias"] and found.bad_module == "graph"
    assert found.reproduced and not math.isfinite(found.losses["node_loss"])
    assert math.isfinite(found.losses["metric_loss"]) and math.isfinite(found.losses["synthetic_loss"])
    assert found.bad_gradients and all(name.split(".")[0] in ("metric_model", "graph") for name in found.bad_gradients)
    parts = {f"{part}.{n}": t for part, state in read_dump(folder).parts.items() for n, t in state.items()}
    assert_same_tensors(parts, {name: tensor for name, tensor in before.items() if name != "averages"})
    # The same step with the weight repaired: the exact losses of an undisturbed run, and no fault.
    state = load_file(folder / "graph.safetensors")
    state["node_classifier.bias"][1] = 0
    save_file(state, folder / "graph.safetensors")
    healed = replay(folder)
    assert not healed.reproduced and healed.bad_module is None
    with torch.no_grad():
        run.trainer.parts.modules["graph"].node_classifier.bias[1] = 0  # type: ignore[index, union-attr, operator]
    batch = list(run.trainer.loader.epoch_iterator(0))[2]
    report = run.trainer.steps.run(batch.images, batch.labels, batch.rows, 2, None, 0)
    assert report is not None
    assert healed.losses == {name: float(report[name]) for name in healed.losses}
    assert {"total_loss", "synthetic_weight", "pull_factor"} <= healed.losses.keys()


@pytest.mark.parametrize("method", ["graph", "generator"])
def test_a_later_pass_begins_with_its_embeddings(shards: Path, tmp_path: Path, method: str) -> None:
    by_generator = {"generation.method": "generator", "graph.enabled": False, "generation.coefficients": "single"}
    run = Driven.of(
        shards, tmp_path / "run", {"health.keep_dumps": 2} | (by_generator if method == "generator" else {})
    )
    run.train({0: None})
    # Hooks are not of the model: the replay does without them, and is finite where the run was not.
    if method == "graph":
        assert run.train({1: "generation gradient"}) == [True]
        assert read_dump(tmp_path / "run" / "faults" / "step-1").fault.reach == "generation"
        healed = replay(tmp_path / "run" / "faults" / "step-1")
        assert not healed.reproduced and {"generation_loss", "diversity_loss"} <= healed.losses.keys()
    with torch.no_grad():
        run.trainer.parts.modules["classifier"].bias[0] = torch.nan  # type: ignore[index, union-attr, operator]
    assert run.train({2: None}) == [True]
    dump = read_dump(tmp_path / "run" / "faults" / "step-2")
    assert dump.fault.reach == "classifier" and ("features" in dump.batch) == (method == "generator")
    found = replay(tmp_path / "run" / "faults" / "step-2")
    assert found.reproduced and found.bad_module == "classifier" and list(found.losses) == ["classifier_loss"]
    assert found.bad_gradients == ["classifier.weight", "classifier.bias"]


def test_a_dump_of_two_ranks_is_of_the_global_batch(shards: Path, tmp_path: Path) -> None:
    found_by = run_ranks(2, dumped_over_ranks, shards, tmp_path / "run")
    keys, before, batch, _ = found_by[0]
    assert all(written for *_, written in found_by)  # a rank that ended early would take rank 0 with it
    dump = read_dump(tmp_path / "run" / "faults" / "step-1")
    assert list(dump.fault.keys) == keys and dump.fault.class_counts == (2, 2)
    assert torch.equal(dump.batch["images"], batch["images"]) and dump.batch["images"].dtype == torch.uint8
    parts = {f"{part}.{n}": t for part, state in dump.parts.items() for n, t in state.items()}
    assert_same_tensors(parts, {name: tensor for name, tensor in before.items() if name != "averages"})
    found = replay(tmp_path / "run" / "faults" / "step-1")
    assert not found.reproduced  # the fault was a hook of the last rank
    # What makes the numbers bad is in the weights: then one process finds it as two have.
    folder = tmp_path / "run" / "faults" / "step-1"
    state = load_file(folder / "metric_model.safetensors")
    state["head.linear.weight"][3, 1] = torch.inf
    save_file(state, folder / "metric_model.safetensors")
    found = replay(folder)
    assert found.reproduced and found.bad_module == "metric_model.head.linear" and len(found.bad_positions) == 8
    later = read_dump(tmp_path / "run" / "faults" / "step-2")
    assert later.fault.reach == "generation" and later.batch["embeddings"].shape == (8, 8)
    healed = replay(tmp_path / "run" / "faults" / "step-2")
    assert not healed.reproduced and math.isfinite(healed.losses["generation_loss"])


def test_a_late_finding_is_kept_as_it_began(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: two more steps have passed when the host learns of it, and BatchNorms have taken them in."""
    found: dict[str, Mapping[str, Tensor]] = {}
    for name, deferred in (("now", False), ("late", True)):
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "build_parts", lambda *given: build_parts(*given, fused=True))
            patch.setattr(
                trainer_module, "build_step", lambda *given, d=deferred: build_step(*given, deferred_checks=d)
            )
            run = Driven.of(shards, tmp_path / name, {"health.skip_non_finite": 0})
        monkeypatch.setattr(finite_checks._Arrival, "arrived", False)
        run.train({0: None})
        with pytest.raises(TrainingError, match="Step 1: 8 embeddings"):
            run.train({1: "features", 2: None, 3: None})
        dump = read_dump(tmp_path / name / "faults" / "step-1")
        found[name] = dump.batch | {f"{part}.{n}": t for part, state in dump.parts.items() for n, t in state.items()}
        assert dump.fault.step == 1
    assert_same_tensors(found["late"], found["now"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found["now"].values())


def test_as_many_as_are_wanted_are_kept(shards: Path, tmp_path: Path) -> None:
    for keep in (0, 2):
        run = Driven.of(shards, tmp_path / str(keep), BASELINE | {"health.keep_dumps": keep})
        assert run.train(dict.fromkeys(range(3), "features")) == [True] * 3
        kept = sorted(path.name for path in (tmp_path / str(keep)).glob("faults/*"))
        assert kept == ["step-0", "step-1"][:keep]
    folder = tmp_path / "2" / "faults" / "step-0"
    assert {file.name for file in folder.iterdir()} == {
        "fault.json",
        "config.yaml",
        "batch.safetensors",
        "metric_model.safetensors",
    }


def test_a_disk_that_refuses_is_said_and_no_more(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Driven.of(shards, tmp_path / "run", BASELINE)

    def refused(tensors: Any, file: Path) -> None:
        if file.name.startswith("metric_model"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file)

    monkeypatch.setattr(step_dump, "save_file", refused)
    assert run.train({0: "features", 1: None}) == [True, False]
    assert list((tmp_path / "run" / "faults").iterdir()) == []
    assert re.search(r"Step 0 cannot be written to .*step-0 \(.*No space left", caplog.text)


def test_what_is_no_dump_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no dump: expected a folder with fault.json"):
        replay(tmp_path)
    folder = failed(shards, tmp_path / "run", BASELINE | {"loss.metric": "fault_cases:Overflow"})
    with pytest.raises(ConfigError, match="fp16 needs CUDA"):
        replay(folder, device="cpu", precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no CUDA device"):
            replay(folder, device="cuda")
    model = (folder / "metric_model.safetensors").read_bytes()
    (folder / "metric_model.safetensors").write_bytes(model[: len(model) // 2])
    with pytest.raises(DataError, match="is damaged"):
        replay(folder)
    save_file({"other": torch.zeros(2)}, folder / "metric_model.safetensors")
    with pytest.raises(ConfigError, match=r"Part `metric_model` .* does not fit .*Missing key.*Replay it with the"):
        replay(folder)
    text = json.loads((folder / "fault.json").read_text())
    for change, message in (
        ({"version": 9}, "is of version 9: expected 1"),
        ({"keys": text["keys"][:3]}, r"`images` must have 3 rows: got \(8, 3, 16, 16\)"),
        ({"positions": None}, "is damaged"),
        ({"reach": "nowhere"}, "`reach` must be one of metric, classifier, generation: got 'nowhere'"),
        ({"precision": "fp8"}, "`precision` must be one of fp32, bf16, fp16: got 'fp8'"),
        ({"device": "there"}, "`device` must be one of cpu, cuda: got 'there'"),
        ({"step": "2"}, "`step` must be a number: got '2'"),
        ({"metric_loss": None}, "`metric_loss` must be a number: got None"),
    ):
        (folder / "fault.json").write_text(json.dumps(text | change))
        with pytest.raises(DataError, match=message):
            replay(folder)
