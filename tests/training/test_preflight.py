"""Everything a machine lacks for a configuration comes in one message, before anything loads."""

import pytest
import torch
from run_cases import make_config, train

from gcahng.errors import ConfigError, InputError
from gcahng.graph.kernels.triton_kernels import triton_problem
from gcahng.training.preflight import preflight
from gcahng.training.trainer import Trainer


def test_all_missing_things_at_once(shards, tmp_path) -> None:
    settings = {
        "data.dir": str(tmp_path / "nowhere"),
        "model.backbone": "resnet5",
        "model.backbone_args": {},
        "loss.metric": "no_such_module.losses:Mine",
        "optim.proxies.name": "no_such_package:Optimizer",
        "optim.generator.name": "no_such_optimizers:Mine",
        "model.weights": str(tmp_path / "weights.safetensors"),
    }
    with pytest.raises(ConfigError) as caught:
        Trainer(make_config(shards, tmp_path / "run", settings))
    text = str(caught.value)
    assert text.startswith("6 things are missing:")
    components = ("no_such_module", "no_such_package", "no_such_optimizers")
    for part in ("nowhere", "Unknown backbone `resnet5`", *components, "`model.weights`"):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_missing_checkpoints_are_named(shards, tmp_path) -> None:
    missing = str(tmp_path / "gone" / "step-1")
    with pytest.raises(ConfigError, match="gone/step-1` is no checkpoint"):
        preflight(make_config(shards, tmp_path / "run", {"train.init_from": missing}))
    with pytest.raises(ConfigError, match="gone/step-1` is no checkpoint"):
        preflight(make_config(shards, tmp_path / "run", {"train.resume": missing}))


def test_what_a_run_started_from_may_be_gone_when_it_is_resumed(shards, tmp_path) -> None:
    settings = {"train.max_steps_per_epoch": 1, "train.epochs": 1}
    train(shards, tmp_path / "run", settings)
    gone = {"train.init_from": str(tmp_path / "gone"), "train.resume": "auto"}
    preflight(make_config(shards, tmp_path / "run", settings | gone))
    with pytest.raises(ConfigError, match="gone` is no checkpoint"):
        preflight(make_config(shards, tmp_path / "run", settings | gone), overwrite=True)


@pytest.mark.skipif(triton_problem("cpu") is None, reason="Triton interprets its kernels in this process")
def test_a_graph_backend_that_cannot_run_is_named(shards, tmp_path) -> None:
    wanted = {"train.device": "cpu", "graph.backend": "triton"}
    with pytest.raises(InputError, match=r"The graph's backend 'triton' cannot run on cpu: .*Use backend 'auto'"):
        Trainer(make_config(shards, tmp_path / "run", wanted))
    assert not (tmp_path / "run").exists()
    without_graph = {"graph.enabled": False, "generation.enabled": False}
    preflight(make_config(shards, tmp_path / "run", wanted | without_graph))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_an_absent_device_hides_no_other_fault_and_counts_once(shards, tmp_path) -> None:
    settings = {"train.device": "cuda", "graph.backend": "triton", "loss.metric": "no_such_module.losses:Mine"}
    with pytest.raises(ConfigError, match="^2 things are missing"):
        preflight(make_config(shards, tmp_path / "run", settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_an_absent_device_is_named(shards, tmp_path) -> None:
    with pytest.raises(ConfigError, match="`train.device` is cuda"):
        preflight(make_config(shards, tmp_path / "run", {"train.device": "cuda"}))


def test_a_complete_machine_passes(shards, tmp_path) -> None:
    preflight(make_config(shards, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
