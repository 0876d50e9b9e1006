"""What a process was started as: by accelerate, by torchrun, by nobody; and what it must not be started as."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched_here import small_config

from gcahng.distributed import ONE
from gcahng.errors import ConfigError
from gcahng.training.launched import Launched, end, launched

TIME_LIMIT_S = 120
SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("error")
sys.path[:0] = {paths!r}
import torch, torch.distributed as dist
from launched_here import small_config
from gcahng.training.launched import end, launched

found = launched(small_config())
ranks = found.ranks
said = {{
    "rank": ranks.rank, "size": ranks.size, "kind": found.kind, "device": str(found.device),
    "accelerator": type(found.accelerator).__name__,
    "sum": float(ranks.sum(torch.ones(1))), "host_max": ranks.host_max([ranks.rank]),
    "all_of": ranks.all_of("abc"[ranks.rank]),
    "separate": ranks.size > 1 and ranks.host_group is not dist.group.WORLD,
    "timeout": ranks.size > 1 and dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
    "autocast": torch.is_autocast_enabled("cpu"),
}}
end(found)
said["left"] = dist.is_initialized()
with open(os.path.join({out!r}, f"{{ranks.rank}}.json"), "w") as file:
    json.dump(said, file)
"""
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    + ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29741"],
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29742"],
    "nobody": [],
}
KNOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of how the tests themselves were started."""
    for name in list(os.environ):
        if name in KNOWN or name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)


def start(name: str, folder: Path) -> "subprocess.Popen[str]":
    (folder / "out").mkdir(parents=True)
    script = folder / "script.py"
    root = Path(__file__).parents[2]
    script.write_text(SCRIPT.format(paths=[str(root), str(root / "tests")], out=str(folder / "out")))
    command = [sys.executable, *(["-m"] if LAUNCHERS[name] else []), *LAUNCHERS[name], str(script)]
    environment = {"ACCELERATE_USE_CPU": "true"} if name == "accelerate" else {}
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    """What each process of each launcher said."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name in KNOWN or name.startswith("ACCELERATE_"):
                patch.delenv(name)
        folders = {name: tmp_path_factory.mktemp("launched") / name for name in LAUNCHERS}
        processes = {name: start(name, folder) for name, folder in folders.items()}
        found = {}
        for name, process in processes.items():
            try:
                output, _ = process.communicate(timeout=TIME_LIMIT_S)
            finally:
                process.kill()
            assert process.returncode == 0, f"{name}: {output[-3000:]}"
            files = sorted((folders[name] / "out").glob("*.json"))
            found[name] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_processes_of_a_launcher_are_two_ranks(said, launcher: str) -> None:
    assert len(said[launcher]) == 2
    for rank, found in enumerate(said[launcher]):
        assert found == {
            "rank": rank,
            "size": 2,
            "kind": "ddp",
            "device": "cpu",
            "accelerator": "Accelerator",
            "sum": 2.0,
            "host_max": [1.0],
            "all_of": ["a", "b"],
            "separate": True,
            "timeout": 60.0,
            "autocast": False,
            "left": False,
        }


def test_without_a_launcher_there_is_one_process(said) -> None:
    (found,) = said["nobody"]
    assert (found["rank"], found["size"], found["kind"], found["sum"]) == (0, 1, "plain", 1.0)
    assert found["accelerator"] == "NoneType" and found["left"] is False


def test_one_process_needs_no_groups() -> None:
    found = launched(small_config())
    assert found == Launched(ONE, torch.device("cpu"), "plain")
    end(found)


def several(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    values = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29743"}
    for name, value in (values | variables).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            r"gradient_accumulation_steps 4: expected 1\. .*small graphs.*`accumulation.micro_batch`",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed_precision bf16, but `train.precision` is fp32"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"dynamo_backend inductor: expected no\..*`graph.backend`"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"asks for FSDP \(ACCELERATE_USE_FSDP\).*plain DDP or DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, r"asks for Megatron-LM"),
        ({"WORLD_SIZE": "9"}, r"`batch.num_classes` is 8, but 9 ranks were started"),
        ({"WORLD_SIZE": "two"}, r"environment variable WORLD_SIZE must be a whole number: got 'two'"),
        (
            {"RANK": "", "MASTER_PORT": ""},
            r"RANK, MASTER_PORT is not set.*`torchrun`; for one .*unset WORLD_SIZE",
        ),
    ],
)
def test_what_a_launcher_must_not_ask_for(monkeypatch, variables: dict[str, str], message: str) -> None:
    several(monkeypatch, **variables)
    with pytest.raises(ConfigError, match=message):
        launched(small_config())


def test_where_nothing_is_trained_ranks_share_no_batch(monkeypatch) -> None:
    class Connected(Exception):
        pass

    def connect(*arguments: object) -> None:
        raise Connected

    monkeypatch.setattr("gcahng.training.launched._accelerator", connect)
    several(monkeypatch, WORLD_SIZE="9", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4", OMP_NUM_THREADS="1")
    with pytest.raises(Connected):
        launched(small_config(), training=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"asks for DeepSpeed .* but nothing is trained\. Launch without it"):
        launched(small_config(), training=False)


def test_accumulation_by_the_launcher_is_refused_for_one_process_too(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ConfigError, match="gradient_accumulation_steps 2"):
        launched(small_config())


def test_a_launcher_that_agrees_with_the_precision_is_fine(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launched(small_config(precision="bf16")).kind == "plain"


def test_the_launcher_may_choose_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launched(small_config(device="auto")).device.type == "cpu"
    with pytest.raises(ConfigError, match=r"`train.device` is cuda, but the launcher asks for the CPU"):
        launched(small_config(device="cuda"))


def test_each_rank_needs_a_gpu_of_its_own(monkeypatch) -> None:
    several(monkeypatch, LOCAL_RANK="2", RANK="2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"Local rank 2 has no GPU of its own: this machine shows 2"):
        launched(small_config(device="cuda"))
