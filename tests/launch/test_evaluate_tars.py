"""`launch/evaluate.py --tars`: plain tars on the command line, and embeddings as a file."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from run_cases import train
from tar_cases import arrays

from gcahng.data.shards.reader import ShardSet
from gcahng.training.evaluate_checkpoint import evaluate_checkpoint


@pytest.fixture(scope="module")
def run_dir(launch_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train(launch_shards, folder, {"train.max_steps_per_epoch": 2})
    return folder


@pytest.fixture(scope="module")
def tars(launch_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test split in reverse, the class under another name."""
    folder = tmp_path_factory.mktemp("tars")
    shard_set = ShardSet.open(launch_shards)
    with webdataset.ShardWriter(f"{folder}/test-%d.tar", maxcount=20, verbose=0) as writer:
        for row in shard_set.split_samples("test")[::-1].tolist():
            record = {"kind": shard_set.meta(row)["class_name"]}
            writer.write({"__key__": shard_set.key(row), "png": shard_set.read(row), "json": record})
    return folder


def test_tars_give_the_metrics_of_the_folder(command_line, run_dir, tars, tmp_path) -> None:
    arguments = ("--checkpoint", (run_dir / "last").resolve(), "--tars", f"{tars}/*.tar", "--label-field", "kind")
    saved = ("--json", tmp_path / "row.json", "--save-embeddings", tmp_path / "e.npz")
    ended = command_line("evaluate.py", *arguments, *saved, "--quiet", "data.num_workers=1")
    assert ended.status == 0, ended.err
    want = evaluate_checkpoint(run_dir / "last")
    got = json.loads((tmp_path / "row.json").read_text())
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-12)
    assert got["worst_queries"][0]["shard"].startswith(f"{tars}/test-")
    assert "48 queries, 0 without a reference" in ended.out and ended.err == ""
    embeddings = arrays(tmp_path / "e.npz")
    assert embeddings["embeddings"].shape == (48, 8) and embeddings["class_names"].shape == (8,)


def test_embeddings_of_a_run_are_saved(command_line, run_dir, tmp_path) -> None:
    ended = command_line("evaluate.py", "--run", run_dir, "--quiet", "--save-embeddings", tmp_path / "e.npz")
    assert ended.status == 0
    with np.load(tmp_path / "e.npz") as saved:  # one that stays open warns when it is collected
        assert saved["labels"].shape == (48,)


def test_tars_search_others_whatever_the_protocol_of_the_run(command_line, run_dir, tars, tmp_path) -> None:
    """A run of self-retrieval, and one of query and gallery: the settings that it asks for do repair it."""
    arguments = ("--run", run_dir, "--quiet", "--label-field", "kind", "--tars", tars / "test-0.tar")
    ended = command_line("evaluate.py", *arguments, "--gallery-tars", f"{tars}/test-[12].tar", "--ks", "1")
    assert ended.status == 0 and "20 queries, 18 without a reference" in ended.out, ended.err
    other = ("eval.protocol=query_gallery", "eval.gallery_split=train")
    ended = command_line("evaluate.py", *arguments, *other, "--ks", "1")
    assert ended.status == 2 and "expected a gallery (--gallery-tars)" in ended.err
    repair = ("eval.protocol=self", "eval.gallery_split=null", "eval.galleries=[]")
    assert all(setting in ended.err for setting in repair)
    ended = command_line("evaluate.py", *arguments, *other, *repair, "--ks", "1")
    assert ended.status == 0 and "20 queries, " in ended.out, ended.err


def test_a_cut_tar_gives_no_numbers(command_line, run_dir, tars, tmp_path) -> None:
    content = (tars / "test-0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2 // 512 * 512])
    ended = command_line(
        "evaluate.py", "--run", run_dir, "--quiet", "--tars", tmp_path / "cut.tar", "--label-field", "kind"
    )
    assert ended.status == 2 and ended.out == "" and "Traceback" not in ended.err
    assert (
        ended.err.startswith(f"error: Tar {tmp_path}/cut.tar is cut ") and "the last whole member is '0000" in ended.err
    )


def test_wrong_uses(command_line, run_dir, tars, tmp_path) -> None:
    run = ("--run", run_dir, "--quiet")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--label-field", "kind"), "`--label-field` goes with --tars, which is missing"),
        (("--gallery-tars", "x.tar"), "`--gallery-tars` goes with --tars, which is missing"),
        (
            ("--tars", tars / "test-0.tar", tars / "test-1.tar"),
            f"`--tars` takes one path, '{tars}/test-1.tar' comes after",
        ),
        (("--tars", f"{tars}/*.tar"), "has no label: expected field class_name or class or label or cls in .json, got"),
        (("--tars", f"{tars}/none-*.tar"), "No file matches"),
        (("--tars", "pipe:cat x.tar"), "'pipe:cat x.tar' is a command"),
        (("--tars", f"{tars}/*.tar", "--gallery-tars", "x.tar"), "Tar x.tar does not exist"),
        (("--tars", f"{tars}/*.tar", "--gallery-tars", tars / "test-1.tar"), "test-1.tar comes twice"),
        (("--tars", f"{tars}/*.tar", "--distractor-tars", tars / "test-1.tar"), "test-1.tar comes twice"),
        (("--save-embeddings", tmp_path / "e.csv"), "expected a name that ends in .npz"),
        (("--save-embeddings", tmp_path / "no" / "e.npz"), "the folder does not exist"),
    ]
    for arguments, message in cases:
        ended = command_line("evaluate.py", *run, *arguments)
        assert ended.status == 2 and ended.out == "", arguments
        assert ended.err.startswith("error: ") and message in ended.err, ended.err
        assert "Traceback" not in ended.err


def test_tars_and_a_folder_exclude_each_other(command_line, run_dir) -> None:
    ended = command_line("evaluate.py", "--run", run_dir, "--tars", "a.tar", "--data", "b")
    assert ended.status == 2 and "not allowed with argument" in ended.err
