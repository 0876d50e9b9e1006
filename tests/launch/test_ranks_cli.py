"""`launch/train.py` as several processes: under accelerate with each backend, under torchrun, and when one fails."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from deepspeed_cases import NO_COMPILER
from run_cases import read_metrics, train

from gcahng.data.shards.reader import ShardSet
from gcahng.distributed import Ranks, failures
from gcahng.training.config import load_config
from gcahng.training.data_setup import build_train_loader, open_data
from launch import cli

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "train.py"
TIME_LIMIT_S = 150
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_")


@dataclass(frozen=True)
class Ended:
    """How processes ended."""

    status: int
    out: str
    err: str
    seconds: float


def environment(**more: str) -> dict[str, str]:
    """Without what another launcher left behind; one thread for each process."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
    return mine | {"OMP_NUM_THREADS": "1"} | more


def finish(processes: Sequence[subprocess.Popen[str]], started: float) -> list[Ended]:
    try:
        said = [process.communicate(timeout=TIME_LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    seconds = time.monotonic() - started
    return [Ended(p.returncode, out, err, seconds) for p, (out, err) in zip(processes, said, strict=True)]


def start(*command: object, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(*command: object, **env: str) -> Ended:
    """A launcher with two processes, in the folder that the commands of the configurations are for."""
    started = time.monotonic()
    (ended,) = finish([start("-m", *command, **env)], started)
    return ended


def without_launcher(*arguments_of_rank: Sequence[object]) -> list[Ended]:
    """As many processes as there are lists of arguments; nobody ends the others when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started, size = time.monotonic(), str(len(arguments_of_rank))
    names = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        start(SCRIPT, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **names)
        for rank, arguments in enumerate(arguments_of_rank)
    ]
    return finish(processes, started)


@pytest.fixture(scope="module")
def one(launch_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(launch_shards, folder)
    return folder


def assert_like_one(run: Path, one: Path) -> None:
    """The first losses, and where the run ends."""
    rows, wanted = (read_metrics(folder) for folder in (run, one))
    assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in wanted]
    for row, want in list(zip(rows, wanted, strict=True))[:3]:
        losses = [name for name in want if name.endswith("_loss") and not name.startswith("lr_")]
        assert len(losses) == 9
        for name in losses:
            assert row[name] == pytest.approx(want[name], rel=1e-5, abs=1e-7), (row["step"], name)
    assert rows[-1]["map_at_r"] == pytest.approx(wanted[-1]["map_at_r"], abs=0.01)


@pytest.mark.parametrize("name", ["cpu_n", "zero2_bf16"])
def test_accelerate_trains_the_run_of_one_process(config_file, tmp_path, one: Path, name: str) -> None:
    config = ROOT / "launch" / "accelerate" / f"{name}.yaml"
    launcher = ("accelerate.commands.launch", "--config_file", config, "--num_processes", "2")
    # Without the compiler's import; see `deepspeed_cases`.
    ended = launch(*launcher, SCRIPT, "--config", config_file, "train.device=cpu", **NO_COMPILER)
    assert ended.status == 0, ended.err
    assert_like_one(tmp_path / "run", one)
    assert ended.out.count("run folder: ") == 1 and ended.out.count("MAP@R") >= 1
    assert "epoch 1/1" in ended.err and "Traceback" not in ended.err


def test_torchrun_does_the_same_and_a_check_speaks_once(config_file, tmp_path) -> None:
    before = sorted(tmp_path.iterdir())
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    ended = launch(*launcher, SCRIPT, "--config", config_file, "--check", "--quiet")
    assert ended.status == 0, ended.err
    lines = [line.split(":")[0] for line in ended.out.splitlines()]
    assert lines == ["configuration, data and steps are fine", "one step", "one epoch", "peak memory", "losses"]
    assert sorted(tmp_path.iterdir()) == before


HANGING = """
import os, time
from gcahng.losses import NPairPlusLoss

class Hanging(NPairPlusLoss):
    steps = 0

    def forward(self, *arguments, **options):
        Hanging.steps += 1
        if Hanging.steps == 3 and os.environ["RANK"] == "1":
            print("rank 1 hangs", flush=True)
            time.sleep(600)
        return super().forward(*arguments, **options)
"""


def test_a_rank_that_hangs_ends_the_job_in_time(config_file, tmp_path) -> None:
    (tmp_path / "hanging_loss.py").write_text(HANGING)
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    settings = ("loss.metric=hanging_loss:Hanging", "distributed.timeout_seconds=5")
    ended = launch(*launcher, SCRIPT, "--config", config_file, "--quiet", *settings, PYTHONPATH=str(tmp_path))
    assert ended.status == 1 and "rank 1 hangs" in ended.out
    assert ended.seconds < 5 + 30 + 30  # and the start of three interpreters
    own = [line for line in ended.err.splitlines() if line.startswith("rank ")]
    assert own == [line for line in own if line.startswith("rank 0: error: ranks waited for each other longer than")]
    assert len(own) == 1 and "; no word from rank 1, which hangs or was killed (" in own[0]


def damaged(config_file: Path, copy: Path) -> str:
    """Copy the shards and damage an image of rank 1's part of the third batch; returns its key."""
    config = load_config(config_file)
    loader = build_train_loader(config, open_data(config), ranks=Ranks(1, 2))
    row = int(list(loader.epoch_iterator(0))[2].rows[0])
    shutil.copytree(config.data.dir, copy)
    data = ShardSet.open(copy)
    file = copy / data.shard_name(row)
    content = bytearray(file.read_bytes())
    content[data.record(row).offset + 40] ^= 0xFF
    file.write_bytes(content)
    return data.key(row)


def test_an_error_of_one_rank_is_the_first_thing_said_and_ends_all(config_file, tmp_path) -> None:
    key = damaged(config_file, tmp_path / "damaged")
    arguments = ("--config", config_file, "--quiet", f"data.dir={tmp_path}/damaged", "train.epochs=9")
    ended = without_launcher(arguments, arguments)
    assert [end.status for end in ended] == [2, 2], ended
    assert ended[0].seconds < 120  # not the groups' time limit
    echo, cause = ([line for line in end.err.splitlines() if not line.startswith("INFO: ")] for end in ended)
    assert len(cause) == 1 and cause[0].startswith("rank 1: error: ") and f"sample {key} is damaged" in cause[0]
    assert echo == [f"rank 0: ended, since rank 1 failed: {cause[0].removeprefix('rank 1: ')}"]


def test_ranks_with_other_settings_are_refused_at_the_start(config_file, tmp_path) -> None:
    arguments = ("--config", config_file, "--quiet")
    first, second = without_launcher(arguments, (*arguments, "seed=5", "batch.num_classes=5"))
    assert (first.status, second.status) == (2, 2), (first, second)
    assert first.err.startswith("error: The 2 ranks must be started alike: expected the same everywhere, got\n")
    assert "\n  `seed`: 1 on rank 0, 5 on rank 1\n  `batch.num_classes`: 4 on rank 0, 5 on rank 1\n" in first.err
    assert second.err == second.out == first.out == ""
    assert not (tmp_path / "run").exists()


def test_a_wrong_configuration_is_said_once(config_file, tmp_path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    ended = launch(*launcher, SCRIPT, "--config", config_file, "sede=1")
    assert ended.status == 1
    assert ended.err.count("error: Configuration ") == 1 and "unknown key; did you mean `seed`?" in ended.err


def test_a_rank_that_meets_nobody_says_where_it_waited(config_file) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    (ended,) = finish(
        [start(SCRIPT, "--config", config_file, "distributed.timeout_seconds=2", **names)], time.monotonic()
    )
    assert ended.status == 1 and "Traceback" not in ended.err, ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: The 2 ranks did not meet at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) within ")


def test_a_second_ctrl_c_does_not_break_what_the_first_began(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It comes from the terminal to all processes, and once more from the launcher to the ranks."""

    def ending(error: BaseException, text: str, status: int) -> failures.Ending:
        os.kill(os.getpid(), signal.SIGINT)
        return failures.Ending(status, text)

    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(failures, "connected", lambda: True)
    monkeypatch.setattr(failures, "ending", ending)
    monkeypatch.setattr(os, "_exit", sys.exit)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(interrupted)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def commands() -> dict[str, tuple[str, Mapping[str, object]]]:
    """First lines and contents of the launch configurations."""
    folder = ROOT / "launch" / "accelerate"
    return {path.stem: (path.read_text(), yaml.safe_load(path.read_text())) for path in sorted(folder.glob("*.yaml"))}


def test_every_launch_configuration_opens_with_its_command() -> None:
    found = commands()
    assert found.keys() == {"cpu_1", "cpu_n", "gpu_1", "gpu_n", "zero1_bf16", "zero2_bf16", "multi_node"}
    for name, (text, settings) in found.items():
        opening = " ".join(line.removeprefix("#").strip().removesuffix("\\") for line in text.splitlines()[:2])
        assert opening.startswith(f"accelerate launch --config_file launch/accelerate/{name}.yaml "), opening
        (config,) = re.findall(r"launch/train\.py +--config (\S+)", opening)
        assert (ROOT / config).is_file()
        assert settings.get("mixed_precision", "no") == "no"


def test_deepspeed_settings_are_the_ones_that_change_nothing() -> None:
    readme = (ROOT / "launch" / "deepspeed" / "README.md").read_text()
    for stage in (1, 2):
        name = f"zero{stage}"
        _, settings = commands()[f"{name}_bf16"]
        assert settings["deepspeed_config"]["deepspeed_config_file"] == f"launch/deepspeed/{name}.json"
        assert json.loads((ROOT / "launch" / "deepspeed" / f"{name}.json").read_text()) == {
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            "gradient_accumulation_steps": 1,
            "train_micro_batch_size_per_gpu": 1,
        }
        assert f"{name}.json  accelerate launch --config_file launch/accelerate/{name}_bf16.yaml" in readme
