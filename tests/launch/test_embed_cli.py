"""`launch/embed.py`: an index folder from a run, and what is refused. Killing it: tests/search/test_embed.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from run_cases import train

from gcahng.search.store import EmbeddingStore


@pytest.fixture(scope="module")
def run_dir(launch_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "run"
    train(launch_shards, folder, {"train.max_steps_per_epoch": 2})
    return folder


def test_a_run_becomes_an_index(command_line, run_dir, launch_shards, tmp_path) -> None:
    run = ("--run", run_dir, "--quiet", "--out", tmp_path / "index")
    ended = command_line("embed.py", *run, "--part-images", 9)
    assert ended.status == 0, ended.err
    assert ended.out == f"48 embeddings of 8 channels in {tmp_path}/index (0.0 MiB)\n" and ended.err == ""
    store = EmbeddingStore.open(tmp_path / "index", verify=True)
    assert store.info is not None and store.info.checkpoint["path"] == str((run_dir / "last").resolve())
    again = command_line("embed.py", *run, "--part-images", 9)
    assert again.status == 0 and again.out == ended.out
    saved = command_line("evaluate.py", "--run", run_dir, "--quiet", "--save-embeddings", tmp_path / "e.npz")
    assert saved.status == 0, saved.err
    with np.load(tmp_path / "e.npz") as arrays:
        assert np.array_equal(arrays["embeddings"], store.embeddings().numpy())
    other = ("--data", launch_shards, "--split", "train", "--format", "parquet", "--normalise", "--overwrite")
    assert command_line("embed.py", *run, *other, "data.num_workers=1").status == 0
    store = EmbeddingStore.open(tmp_path / "index", verify=True)
    assert store.info is not None and store.info.layout == "parquet" and store.info.normalised
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npz", "index"]


def test_plain_tars(command_line, run_dir, launch_shards, tmp_path) -> None:
    tars = ("--tars", f"{launch_shards}/*.tar", "--out", tmp_path / "index", "--quiet")
    ended = command_line("embed.py", "--checkpoint", run_dir / "last", *tars, "--label-field", "class_id")
    assert ended.status == 0, ended.err
    store = EmbeddingStore.open(tmp_path / "index")
    assert len(store) == 96 and sorted(set(store.labels().tolist())) == list(range(16))


def test_a_launcher_need_not_be_one_of_training(command_line, run_dir, tmp_path, monkeypatch) -> None:
    """Nothing is trained: settings of training are no fault, DeepSpeed has no part in it."""
    run = ("--run", run_dir, "--quiet", "--out", tmp_path / "index")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert command_line("embed.py", *run).status == 0
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
    for name, value in (launcher | {"ACCELERATE_USE_DEEPSPEED": "true"}).items():
        monkeypatch.setenv(name, value)
    ended = command_line("embed.py", *run)
    assert ended.status == 2 and "asks for DeepSpeed (ACCELERATE_USE_DEEPSPEED), but nothing is trained" in ended.err


def test_wrong_uses(command_line, run_dir, launch_shards, tmp_path) -> None:
    run = ("--run", run_dir, "--quiet", "--out")
    index = (*run, tmp_path / "index")
    (tmp_path / "folder").mkdir()
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*run, tmp_path / "none" / "index"), f"the folder {tmp_path}/none does not exist"),
        ((*run, tmp_path / "folder"), "exists and is no index: it is not replaced"),
        ((*index, "--label-field", "kind"), "`--label-field` goes with --tars, which is missing"),
        ((*index, "--no-labels"), "`--no-labels` goes with --tars, which is missing"),
        ((*index, "--tars", "a.tar", "--split", "test"), "`--split` is of shard folders"),
        ((*index, "--tars", "a.tar", "b.tar"), "`--tars` takes one path, 'b.tar' comes after it"),
        ((*index, "--tars", f"{tmp_path}/*.tar"), "No file matches"),
        ((*index, "--split", "nothing"), "Split 'nothing' does not exist: expected one of ['test', 'train']"),
        ((*index, "--which", "best"), "this run has no `best`"),
        ((*index, "--part-images", "0"), "`--part-images` must be at least 1, got 0"),
        (("--checkpoint", run_dir, "--out", tmp_path / "index"), "is a run folder, no checkpoint"),
    ]
    for arguments, message in cases:
        ended = command_line("embed.py", *arguments)
        assert ended.status == 2 and ended.out == "", arguments
        assert ended.err.startswith("error: ") and message in ended.err, ended.err
        assert "Traceback" not in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_another_checkpoint_does_not_continue(command_line, run_dir, launch_shards, tmp_path) -> None:
    train(launch_shards, tmp_path / "run", {"train.max_steps_per_epoch": 1, "seed": 2})
    out = ("--out", tmp_path / "index", "--quiet")
    assert command_line("embed.py", "--run", run_dir, *out).status == 0
    before = (tmp_path / "index" / "index.json").read_bytes()
    ended = command_line("embed.py", "--run", tmp_path / "run", *out)
    assert ended.status == 2 and "checkpoint.metric_model_sha256 was '" in ended.err
    assert "replace it with --overwrite" in ended.err
    assert (tmp_path / "index" / "index.json").read_bytes() == before
    assert command_line("embed.py", "--run", tmp_path / "run", *out, "--overwrite").status == 0
    made_with = json.loads((tmp_path / "index" / "index.json").read_text())["made_with"]
    assert made_with["checkpoint"]["path"] == str((tmp_path / "run" / "last").resolve())
