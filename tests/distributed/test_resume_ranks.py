"""Ranks that are killed or stopped in the middle of an epoch, and what goes on from there."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from kill_cases import Death, train_in_processes
from rank_group import run_ranks
from resume_ranks_cases import SETTINGS, STEPS, STOPPED_IN, from_kind_to_kind
from run_cases import (
    assert_same_run,
    assert_same_tensors,
    convert_patterns,
    draw_patterns,
    make_trainer,
    read_metrics,
    saved_tensors,
    train,
)
from safetensors.torch import load_file

from gcahng.training import checkpoint

SIZE = 2
# Another number of ranks adds up a batch in another order; AdamW's first steps are nearly signs of gradients.
OTHER_ORDER = 2e-3
Portable = tuple[Path, list[tuple[str, str]]]
LOCAL = SETTINGS | {"distributed.batch_norm": "local", "train.save_every_steps": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patterns")
    return convert_patterns(draw_patterns(folder / "images"), folder / "shards")


def samples(run_dir: Path) -> list[str]:
    return [row["samples"] for row in read_metrics(run_dir) if row["kind"] == "step"]


def assert_close_run(got: Path, want: Path) -> None:
    """The same samples to the bit, the same weights but for the order of sums."""
    assert samples(got) == samples(want) and len(samples(got)) > 0
    found, others = (
        {name: value for name, value in saved_tensors(folder).items() if not name.startswith(checkpoint.RANKS)}
        for folder in (got, want)
    )
    assert found.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(found[name], value, rtol=OTHER_ORDER, atol=OTHER_ORDER, msg=lambda m, n=name: n + m)


@pytest.fixture(scope="module")
def killed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, a run of two ranks, each with BatchNorm statistics of its own; `cut`, whose ranks were killed."""
    folder = tmp_path_factory.mktemp("killed")
    assert train_in_processes(shards, folder / "whole", LOCAL, size=SIZE, counts=folder / "met.json") == [0, 0]
    met = json.loads((folder / "met.json").read_text())
    # In the second checkpoint, then, gone on from the first, in the fourth step.
    moves = met["within a step"] // STEPS
    deaths = [(0, Death("within save_file", 9)), (1, Death("within a step", 3 * moves + 2))]
    for dying, death in deaths:
        statuses = train_in_processes(shards, folder / "cut", LOCAL, size=SIZE, death=death, dying=dying)
        assert statuses[dying] == -signal.SIGKILL, (death, statuses)
        assert statuses[1 - dying] not in (0, -signal.SIGKILL), "it must learn of the other's end, and end itself"
    return folder


def test_the_checkpoint_of_a_killed_run_holds_each_ranks_own_statistics(killed: Path) -> None:
    newest = checkpoint.newest_whole(killed / "cut")
    assert newest is not None
    progress = checkpoint.read_state(newest)["progress"]
    assert progress["batch"] > 0, "it is to be one of the middle of an epoch"
    own = load_file(newest / "ranks.safetensors")
    names = [name.removeprefix("0/") for name in own if name.startswith("0/buffers/") and "running" in name]
    assert names and all(not torch.equal(own[f"0/{name}"], own[f"1/{name}"]) for name in names)


def test_killed_ranks_go_on_to_the_same_bits(killed: Path, shards: Path, tmp_path) -> None:
    shutil.copytree(killed / "cut", tmp_path / "cut", symlinks=True)
    assert train_in_processes(shards, tmp_path / "cut", LOCAL, size=SIZE) == [0, 0]
    assert_same_run(tmp_path / "cut", killed / "whole")


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.full)])
def test_another_number_of_ranks_sees_the_same_samples(killed: Path, shards: Path, tmp_path, size: int) -> None:
    shutil.copytree(killed / "cut", tmp_path / "cut", symlinks=True)
    assert train_in_processes(shards, tmp_path / "cut", LOCAL, size=size) == [0] * size
    assert samples(tmp_path / "cut") == samples(killed / "whole")


@pytest.mark.full
@pytest.mark.parametrize(
    "place", ["within an evaluation", "within write", "after rename", "a forward pass of training"]
)
def test_killed_anywhere_ranks_go_on_to_the_same_bits(killed: Path, shards: Path, tmp_path, place: str) -> None:
    met = json.loads((killed / "met.json").read_text())
    for dying in (0, 1) if "write" not in place and "rename" not in place else (0,):
        death, cut = Death(place, max(1, met[place] * 2 // 3)), tmp_path / f"rank {dying} dies"
        statuses = train_in_processes(shards, cut, LOCAL, size=SIZE, death=death, dying=dying)
        assert statuses[dying] == -signal.SIGKILL
        assert train_in_processes(shards, cut, LOCAL, size=SIZE) == [0, 0]
        assert_same_run(cut, killed / "whole")


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["enough pairs", "every pair"]
)
def portable(request: pytest.FixtureRequest, shards: Path, tmp_path_factory) -> Portable:
    """Runs that were stopped in the middle of an epoch and went on otherwise launched."""
    folder = tmp_path_factory.mktemp("portable")
    train(shards, folder / "one", SETTINGS)
    trainer = make_trainer(shards, folder / "begun by one", SETTINGS)
    step, calls = trainer.steps.step, iter(range(1, STEPS))

    def stopped(*arguments: object, **options: object) -> object:
        if next(calls) == STOPPED_IN:
            raise InterruptedError
        return step(*arguments, **options)

    trainer.steps.step = stopped
    with pytest.raises(InterruptedError):
        trainer.run()
    return folder, run_ranks(SIZE, from_kind_to_kind, shards, folder, request.param, time_limit=480)[0]


def test_every_kind_goes_on_in_the_middle_of_an_epoch_of_any_other(portable: Portable) -> None:
    folder, pairs = portable
    for begin, end in pairs:
        got, want = folder / f"{begin} to {end}", folder / "whole"
        assert_same_tensors(saved_tensors(got), saved_tensors(want))
        assert read_metrics(got) == read_metrics(want), (begin, end)


def test_one_process_goes_on_in_the_middle_of_an_epoch_of_ranks(portable: Portable, shards: Path, tmp_path) -> None:
    folder, _ = portable
    shutil.copytree(folder / "begun as zero-2", tmp_path / "run", symlinks=True)
    newest = checkpoint.newest_whole(tmp_path / "run")
    assert newest is not None and newest.name == f"step-{STOPPED_IN - 2}"
    train(shards, tmp_path / "run", SETTINGS)
    assert_close_run(tmp_path / "run", folder / "one")


def test_ranks_go_on_in_the_middle_of_an_epoch_of_one_process(portable: Portable) -> None:
    assert_close_run(portable[0] / "begun by one", portable[0] / "one")
