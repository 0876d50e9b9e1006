"""`launch/evaluate.py`: runs and checkpoints, on their own data and on other."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_cases import convert_patterns, draw_patterns, read_metrics, train

from gcahng.data.shards.reader import ShardSet
from gcahng.metrics.per_class import per_class, worst_queries
from gcahng.search.clustering import clustering_scores
from gcahng.training.evaluate_checkpoint import embedding_settings, evaluate_checkpoint, load_metric_model
from gcahng.training.evaluation import evaluate
from gcahng.training.trainer import SELECTION_NOTE

ROOT = Path(__file__).parents[2]
# What a row of metrics.jsonl holds beside the metrics.
LABELS = ("kind", "step", "epoch", "split")


@pytest.fixture(scope="module")
def run_dir(launch_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs; enough are kept that every link has its checkpoint."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    settings = {"train.epochs": 3, "data.validation": 0.375, "eval.ks": [1, 2, 10]}
    train(launch_shards, folder, settings)
    return folder


def logged(run_dir: Path, link: str) -> dict[str, Any]:
    step = int((run_dir / link).readlink().name.removeprefix("step-"))
    (row,) = [
        row
        for row in read_metrics(run_dir)
        if row["kind"] == "evaluation" and row["step"] == step and row["split"] == "test"
    ]
    return {key: value for key, value in row.items() if key not in LABELS}


def means(path: Path) -> dict[str, Any]:
    """What `--json` wrote, without its lists."""
    values: dict[str, Any] = json.loads(path.read_text())
    return {name: value for name, value in values.items() if not isinstance(value, list)}


def shown(row: dict[str, Any]) -> str:
    names = {
        "recall_at_1": "R@1",
        "recall_at_2": "R@2",
        "recall_at_10": "R@10",
        "r_precision": "RP",
        "map_at_r": "MAP@R",
        "mrr": "MRR",
    }
    values = "  ".join(f"{name} {100 * row[key]:.2f}" for key, name in names.items())
    return f"{values}\n{row['num_queries']} queries, {row['num_without_reference']} without a reference\n"


def test_a_run_gives_the_numbers_it_logged(process, run_dir, tmp_path) -> None:
    arguments = ("--run", run_dir, "--quiet", "--json", tmp_path / "metrics.json")
    ended = process(ROOT / "launch" / "evaluate.py", *arguments)
    assert ended.status == 0, ended.err
    want = logged(run_dir, "last")
    assert means(tmp_path / "metrics.json") == want
    assert ended.out == shown(want) and ended.err == ""


@pytest.mark.parametrize("which", ["best", "best_test", "last"])
def test_which_checkpoint_of_the_run(command_line, run_dir, which: str) -> None:
    ended = command_line("evaluate.py", "--run", run_dir, "--which", which, "--quiet")
    note = f"{SELECTION_NOTE}\n" if which == "best_test" else ""
    assert ended.status == 0 and ended.out == shown(logged(run_dir, which)) + note


@pytest.mark.parametrize("place", ["--run", "link", "file"])
def test_what_was_chosen_on_the_test_classes_is_marked(command_line, run_dir, tmp_path, place: str) -> None:
    link = run_dir / "best_test"
    source = {
        "--run": ("--run", run_dir, "--which", "best_test"),
        "link": ("--checkpoint", link),
        "file": ("--checkpoint", link / "metric_model.safetensors"),
    }[place]
    ended = command_line("evaluate.py", *source, "--quiet", "--json", tmp_path / "row.json")
    assert ended.status == 0 and ended.out.splitlines()[-1].startswith("chosen on the test classes")
    assert means(tmp_path / "row.json") == logged(run_dir, "best_test") | {"note": SELECTION_NOTE}


def test_a_checkpoint_that_the_run_never_had(command_line, launch_shards, tmp_path) -> None:
    train(launch_shards, tmp_path / "run", {"train.max_steps_per_epoch": 1})
    ended = command_line("evaluate.py", "--run", tmp_path / "run", "--which", "best")
    assert ended.status == 2
    assert "this run has no `best`: it trained without data.validation; use --which last or best_test" in ended.err
    (tmp_path / "run" / "best_test").unlink()
    ended = command_line("evaluate.py", "--run", tmp_path / "run", "--which", "best_test")
    assert ended.status == 2
    assert "this run has no `best_test`: no epoch was evaluated yet; use --which last." in ended.err


def file_in(run_dir: Path) -> Path:
    return run_dir / "last" / "metric_model.safetensors"


def folder_of(run_dir: Path) -> Path:
    return (run_dir / "last").resolve()


@pytest.mark.parametrize("choose", [file_in, folder_of])
def test_a_checkpoint_on_other_data(command_line, run_dir, tmp_path, choose: Callable[[Path], Path]) -> None:
    others = draw_patterns(tmp_path / "images", num_classes=6, images=5)
    # A name that YAML would read otherwise, and letters beyond ASCII.
    shards = convert_patterns(others, tmp_path / "no: é, 🙂")
    arguments = ("--checkpoint", choose(run_dir), "--data", shards, "--quiet")
    ended = command_line("evaluate.py", *arguments)
    assert ended.status == 0, ended.err
    want = evaluate_checkpoint(run_dir / "last", [f'data.dir="{shards}"'])
    assert want["num_queries"] == 15 and ended.out == shown(want)


def test_settings_may_be_replaced(command_line, run_dir) -> None:
    ended = command_line("evaluate.py", "eval.ks=[3]", "--run", run_dir, "--quiet", "eval.split=train")
    want = evaluate_checkpoint(run_dir / "last", ["eval.ks=[3]", "eval.split=train"])
    assert ended.status == 0
    assert ended.out.startswith(f"R@3 {100 * want['recall_at_3']:.2f}  RP ")
    assert "48 queries" in ended.out


def test_a_bar_shows_the_way(command_line, run_dir) -> None:
    ended = command_line("evaluate.py", "--run", run_dir)
    assert ended.status == 0 and "embed" in ended.err


def broken(run_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "step-9"
    folder.mkdir()
    for file in (run_dir / "last").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = folder / "metric_model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    return folder


def test_what_cannot_be_evaluated(command_line, run_dir, launch_shards, tmp_path) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--run", tmp_path), f"`{tmp_path}/last` is no checkpoint: expected a folder step-N"),
        (("--run", tmp_path / "none", "--which", "best"), f"`--run` {tmp_path}/none: there is no such folder."),
        (("--run", run_dir / "last"), f"`--run` {run_dir}/last is a checkpoint, no run folder: use --checkpoint"),
        (("--checkpoint", run_dir / "last", "--which", "best"), "`--which` best chooses a checkpoint of --run"),
        (("--run", run_dir, "--json", "/proc/row.json"), "`--json` /proc/row.json cannot be written (No such file"),
        (("--run", run_dir, "--save-embeddings", "/proc/e.npz"), "`--save-embeddings` /proc/e.npz cannot be written"),
        (("--checkpoint", launch_shards), "is no checkpoint"),
        (("--checkpoint", launch_shards / "manifest.json"), "is no checkpoint"),
        (("--checkpoint", broken(run_dir, tmp_path)), "metric_model.safetensors is damaged"),
        (("--run", run_dir, "--data", tmp_path), "manifest.json is missing"),
        (("--run", run_dir, "eval.ks=[50]"), "`eval.ks` must not exceed"),
        (("--checkpoint", run_dir), f"`--checkpoint` {run_dir} is a run folder, no checkpoint: use --run {run_dir}."),
        (("--run", run_dir, "eval.split=dev"), "Split 'dev' does not exist"),
        (("--run", run_dir, "model.embedding_dim=4"), "does not fit part `metric_model`"),
        (("--run", run_dir, "eval.kss=[1]"), "eval.kss (command line): unknown key; did you mean `eval.ks`"),
        (("--run", run_dir, "--json", tmp_path / "no" / "x.json"), "`--json`"),
        (("--run", run_dir, "--per-class", tmp_path), f"`--per-class` {tmp_path} is a folder"),
        (("--run", run_dir, "--worst", "0"), "`--worst` must be at least 1: got 0"),
        (("--run", run_dir, "--ks", "1,48"), "`eval.ks` must not exceed what a query can find: expected at most 47"),
        (("--run", run_dir, "--approximate", "best"), "`kind` must be one of flat, ivf, ivf_sq8, hnsw: got 'best'"),
        (("--run", run_dir, "eval.chunk_size=9"), "eval.chunk_size (command line): no setting any more: the search"),
    ]
    for arguments, message in cases:
        ended = command_line("evaluate.py", *arguments, "--quiet")
        assert ended.status == 2 and ended.out == "", arguments
        assert ended.err.startswith("error: ") and message in ended.err, ended.err
        assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --run --checkpoint --released is required"),
        (["--run", "a", "--checkpoint", "b"], "--checkpoint: not allowed with argument --run"),
        (["--run", "a", "--which", "first"], "--which: invalid choice: 'first'"),
        (["--run", "a", "--ks", "1;2"], "--ks: expected whole numbers as in 1,10,100, got '1;2'"),
    ],
)
def test_a_wrong_command_line_shows_its_use(command_line, arguments: list[str], message: str) -> None:
    ended = command_line("evaluate.py", *arguments)
    assert ended.status == 2 and ended.err.startswith("usage: launch/evaluate.py") and message in ended.err


def test_what_was_found_is_kept_where_the_rest_fails(command_line, run_dir, tmp_path) -> None:
    """15 images are too few for the lists of an approximate index."""
    shards = convert_patterns(draw_patterns(tmp_path / "images", num_classes=6, images=5), tmp_path / "few")
    files = ("--json", tmp_path / "row.json", "--per-class", tmp_path / "classes.csv")
    ended = command_line("evaluate.py", "--run", run_dir, "--data", shards, "--quiet", "--approximate", "ivf", *files)
    assert ended.status == 2 and "too few to train 1 list of kind 'ivf'" in ended.err
    assert ended.out == shown(means(tmp_path / "row.json")) and (tmp_path / "classes.csv").stat().st_size > 100


def test_everything_as_json_and_class_by_class(command_line, run_dir, tmp_path) -> None:
    files = ("--json", tmp_path / "all.json", "--per-class", tmp_path / "classes.csv")
    ended = command_line("evaluate.py", "--run", run_dir, "--quiet", "--worst", 3, "--ks", "2,5", *files)
    assert ended.status == 0, ended.err
    values = json.loads((tmp_path / "all.json").read_text())
    model, config = load_metric_model(run_dir / "last", ["eval.ks=[2,5]"])
    shard_set = ShardSet.open(config.data.dir)
    result = evaluate(model, shard_set, config.eval, embedding_settings(config)).result
    rows = shard_set.split_samples("test")
    assert values["recall_at_5"] == result.recall_at_k[5] and values["without_reference"] == []
    worst = worst_queries(result, 3).tolist()
    assert [query["index"] for query in values["worst_queries"]] == worst
    assert [query["key"] for query in values["worst_queries"]] == [shard_set.key(int(rows[place])) for place in worst]
    assert ended.out.splitlines()[2].split() == ["MAP@R", "first", "hit", "references", "key,", "class,", "shard"]
    for line, query in zip(ended.out.splitlines()[3:], values["worst_queries"], strict=True):
        assert line.endswith(f" 5  {query['key']}, {query['class_name']}, {query['shard']}")
    with (tmp_path / "classes.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["class_name"] for line in lines] == [row["class_name"] for row in values["per_class"]]
    for line, row, want in zip(lines, values["per_class"], per_class(result).rows(), strict=True):
        assert {name: row[name] for name in want} == want and row["num_queries"] == 6
        assert float(line["map_at_r"]) == row["map_at_r"] and line["gallery"] == "test"


def test_clusters_on_request(command_line, run_dir, tmp_path) -> None:
    """The same by flag and by setting: those of the saved embeddings."""
    files = ("--json", tmp_path / "all.json", "--save-embeddings", tmp_path / "e.npz")
    ended = command_line("evaluate.py", "--run", run_dir, "--quiet", "--clustering", *files)
    assert ended.status == 0, ended.err
    with np.load(tmp_path / "e.npz") as saved:
        want = clustering_scores(torch.from_numpy(saved["embeddings"]), torch.from_numpy(saved["labels"]))
    values = json.loads((tmp_path / "all.json").read_text())
    assert (values["nmi"], values["ami"], values["num_clusters"]) == (want.nmi, want.ami, 8)
    how = f"8 clusters by {want.library}, initial {want.initial}"
    assert f"NMI {want.nmi:.4f}  AMI {want.ami:.4f}  ({how})" in ended.out
    assert (values["clustering_library"], values["clustering_initial"]) == (want.library, want.initial)
    by_setting = command_line("evaluate.py", "--run", run_dir, "--quiet", "eval.clustering=true")
    assert by_setting.out == ended.out


def test_approximate_search_says_what_it_finds(command_line, run_dir, tmp_path) -> None:
    """A flat index is exact: the same R@1, and all of the nearest found."""
    ended = command_line(
        "evaluate.py", "--run", run_dir, "--quiet", "--approximate", "flat", "--json", tmp_path / "all.json"
    )
    assert ended.status == 0, ended.err
    values = json.loads((tmp_path / "all.json").read_text())
    measured = {"effort": 0, "recall_at_k": 1.0, "k": 10, "num_queries": 48}
    assert values["approximate"] == {"kind": "flat", "recall_at_1": values["recall_at_1"], "measured": measured}
    assert "approximate (flat): R@1 " in ended.out and ended.out.endswith(
        "100.00 % of the 10 nearest found (48 queries)\n"
    )


def test_two_processes_give_the_numbers_of_one(run_dir, tmp_path) -> None:
    """Real ones, by torchrun: the same file but for rounding of embeddings in other batches."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    arguments = ["--run", run_dir, "--quiet", "--json", tmp_path / "two.json", "--save-embeddings", tmp_path / "e.npz"]
    done = subprocess.run(
        [sys.executable, *command, str(ROOT / "launch" / "evaluate.py"), *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    want = logged(run_dir, "last")
    assert means(tmp_path / "two.json") == pytest.approx(want, abs=1e-6)
    assert done.stdout == shown(means(tmp_path / "two.json"))
    with np.load(tmp_path / "e.npz") as saved:
        assert saved["embeddings"].shape == (48, 8)
