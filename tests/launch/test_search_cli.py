"""`launch/search.py`: what is found, as text, JSON and a picture; wrong models and damaged indexes."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import ALONE, train
from tar_cases import write_tar

from gcahng.data.shards.reader import ShardSet
from gcahng.search.embed import embed_checkpoint
from gcahng.search.store import EmbeddingStore
from gcahng.search.unfinished import IndexTarget


@pytest.fixture(scope="module")
def run_dir(launch_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched") / "run"
    train(launch_shards, folder, {"train.max_steps_per_epoch": 2})
    return folder


@pytest.fixture(scope="module")
def index(run_dir: Path) -> Path:
    """Of the test split, whose images lie in `launch_shards`; never written to."""
    embed_checkpoint(run_dir / "last", IndexTarget(run_dir.parent / "index"), ALONE)
    return run_dir.parent / "index"


@pytest.fixture
def queries(launch_shards: Path, tmp_path: Path) -> list[Path]:
    """Three images of the test split, at rows 0, 17 and 40 of the index."""
    (tmp_path / "queries").mkdir()
    shards = ShardSet.open(launch_shards)
    rows = shards.split_samples("test")[[0, 17, 40]].tolist()
    files = [tmp_path / "queries" / f"{number}.png" for number in range(3)]
    for file, row in zip(files, rows, strict=True):
        file.write_bytes(shards.read(row))
    return files


def expected(index: Path, row: int, k: int) -> list[tuple[int, float]]:
    """Rows and scores by brute force over the stored embeddings."""
    unit = torch.nn.functional.normalize(EmbeddingStore.open(index).embeddings().double(), dim=1)
    scores = unit @ unit[row]
    order = scores.argsort(descending=True)[:k]
    return [(int(i), float(scores[i])) for i in order]


def test_what_is_found(command_line, index, queries, tmp_path) -> None:
    outputs = ("--json", tmp_path / "found.json", "--picture", tmp_path / "found.png")
    ended = command_line("search.py", index, tmp_path / "queries", "--k", 5, *outputs)
    assert ended.status == 0, ended.err
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["index"] == str(index) and record["k"] == 5
    store = EmbeddingStore.open(index)
    lines = ended.out.splitlines()
    for number, row in enumerate((0, 17, 40)):
        answer = record["queries"][number]
        assert answer["image"] == str(queries[number]) == lines[7 * number]
        want = expected(index, row, 5)
        assert [item["row"] for item in answer["found"]] == [i for i, _ in want] and want[0][0] == row
        assert [item["score"] for item in answer["found"]] == pytest.approx([score for _, score in want], abs=1e-5)
        for rank, item in enumerate(answer["found"], start=1):
            stored = store.row(item["row"])
            assert item == stored._asdict() | {"rank": rank, "score": item["score"], "row": item["row"]}
            line = lines[7 * number + 1 + rank].split()
            assert line == [str(rank), f"{item['score']:.4f}", stored.class_name, stored.key, stored.shard]
    assert lines[-1] == f"picture: {tmp_path}/found.png"
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 6 * 150 and picture.height > 3 * 200
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000, "the images are missing"


def test_without_the_images_there_is_a_note(command_line, index, queries, tmp_path) -> None:
    shutil.copytree(index, tmp_path / "index")
    raw = json.loads((tmp_path / "index" / "index.json").read_text())
    raw["made_with"]["data"]["location"] = str(tmp_path / "gone")
    (tmp_path / "index" / "index.json").write_text(json.dumps(raw))
    picture = tmp_path / "found.png"
    ended = command_line("search.py", tmp_path / "index", queries[0], "--k", 2, "--picture", picture)
    assert ended.status == 0 and len(ended.out.splitlines()) == 5 and not picture.exists()
    assert ended.out.splitlines()[-1].startswith(f"no picture: {tmp_path}/gone/manifest.json is missing")


def test_approximate_search_says_its_recall(command_line, index, queries, tmp_path) -> None:
    pytest.importorskip("faiss")
    shutil.copytree(index, tmp_path / "index")
    outputs = ("--approximate", "flat", "--json", tmp_path / "found.json", "--k", 3)
    for _ in range(2):  # built, then read
        ended = command_line("search.py", tmp_path / "index", queries[1], *outputs)
        assert ended.status == 0, ended.err
        assert ended.out.splitlines()[-1] == ("approximate (flat): recall at 10 measured on 48 stored images: 1.0")
        record = json.loads((tmp_path / "found.json").read_text())
        assert [item["row"] for item in record["queries"][0]["found"]] == [i for i, _ in expected(index, 17, 3)]
        assert record["measured"]["recall_at_k"] == 1.0


def test_another_model_is_refused(command_line, index, queries, run_dir, launch_shards, tmp_path) -> None:
    train(launch_shards, tmp_path / "run", {"train.max_steps_per_epoch": 1, "seed": 2})
    ended = command_line("search.py", index, queries[0], "--checkpoint", tmp_path / "run" / "last")
    assert ended.status == 2 and ended.out == ""
    assert "is not the one that made the index: its weights have sha256" in ended.err
    moved = shutil.copytree(run_dir / "last", tmp_path / "moved")
    ended = command_line("search.py", index, queries[0], "--checkpoint", moved, "--k", 1, "--set", "train.device=cpu")
    assert ended.status == 0, ended.err
    saved = tmp_path / "e.npz"
    assert command_line("evaluate.py", "--run", run_dir, "--quiet", "--save-embeddings", saved).status == 0
    ended = command_line("search.py", saved, queries[0], "--checkpoint", moved, "--k", 1)
    assert ended.status == 0 and ended.out.splitlines()[2].split()[3] == EmbeddingStore.open(index).row(0).key


OWN_BACKBONE = """
from pathlib import Path

from gcahng.models.small_conv import SmallConv

Path(__file__).with_name("ran").touch()


def network():
    return SmallConv(widths=[4])
"""


def test_an_index_alone_makes_nobody_run_code(
    command_line, queries, launch_shards, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made it chose the checkpoint, and so the module that its backbone would come from."""
    (tmp_path / "own_backbone.py").write_text(OWN_BACKBONE)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"model.backbone": "own_backbone:network", "model.backbone_args": {}, "train.max_steps_per_epoch": 1}
    train(launch_shards, tmp_path / "run", own)
    embed_checkpoint(tmp_path / "run" / "last", IndexTarget(tmp_path / "index"), ALONE, trust_components=True)
    monkeypatch.delitem(sys.modules, "own_backbone")
    (tmp_path / "ran").unlink()
    ended = command_line("search.py", tmp_path / "index", queries[0], "--k", 1)
    assert ended.status == 2 and ended.out == "" and not (tmp_path / "ran").exists()
    assert "model.backbone 'own_backbone:network'" in ended.err
    named = ("--checkpoint", tmp_path / "run" / "last")
    ended = command_line("search.py", tmp_path / "index", queries[0], "--k", 1, *named)
    assert ended.status == 2 and not (tmp_path / "ran").exists(), "naming it is no word about its code"
    ended = command_line("search.py", tmp_path / "index", queries[0], "--k", 1, "--trust-components")
    assert ended.status == 0 and (tmp_path / "ran").exists(), ended.err


def test_a_small_index_gives_all_of_its_images(command_line, run_dir, queries, launch_shards, tmp_path) -> None:
    """Fewer than the 10 that are found by default."""
    content = ShardSet.open(launch_shards).read(0)
    write_tar(tmp_path / "two.tar", {"a.png": content, "b.png": content})
    target = IndexTarget(tmp_path / "index")
    embed_checkpoint(run_dir / "last", target, ALONE, tars=[tmp_path / "two.tar"], labelled=False)
    ended = command_line("search.py", target.folder, queries[0])
    assert ended.status == 0 and [line.split()[2] for line in ended.out.splitlines()[2:]] == ["a", "b"], ended.err


def test_what_a_picture_needs_is_looked_for_first(command_line, index, queries, tmp_path, monkeypatch) -> None:
    for option, module in (("--picture", "matplotlib"), ("--approximate", "faiss")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            value = [tmp_path / "found.png"] if option == "--picture" else ["flat"]
            ended = command_line("search.py", index, queries[0], option, *value)
        assert ended.status == 2 and ended.out == "" and "pip install 'gcahng[" in ended.err


def test_wrong_uses(command_line, index, queries, tmp_path) -> None:
    damaged = shutil.copytree(index, tmp_path / "damaged")
    content = bytearray((damaged / "embeddings.npy").read_bytes())
    content[-1] ^= 1
    (damaged / "embeddings.npy").write_bytes(content)
    cut = shutil.copytree(index, tmp_path / "cut")
    (cut / "rows.jsonl").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"no image")
    unfinished = tmp_path / "unfinished"
    (tmp_path / "unfinished.partial").mkdir()
    query = queries[0]
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((tmp_path / "none", query), "holds no embeddings"),
        ((tmp_path / "queries", query), "queries holds no embeddings: expected an index folder, or a file .npz or"),
        ((unfinished, query), "unfinished is not finished: launch/embed.py was stopped. Give its command again"),
        ((cut, query), "rows.jsonl is damaged: expected"),
        ((damaged, query, "--verify"), "embeddings.npy is damaged: expected sha256"),
        ((index, tmp_path / "text.png"), "that begin with b'no image'. Replace the file, or leave it out."),
        ((index, tmp_path / "none.png"), "none.png does not exist"),
        ((index, query, "--k", "49"), "`--k` must be from 1 to the 48 images"),
        ((index, query, "--k", "0"), "`--k` must be from 1 to the 48 images"),
        ((index, query, "--picture", tmp_path / "a.jpg"), "expected a name that ends in .png"),
        ((index, query, "--json", tmp_path / "none" / "a.json"), "the folder does not exist"),
        ((index, query, "--json", tmp_path), f"`--json` {tmp_path} is a folder"),
        ((index, query, "--json", "/proc/found.json"), "`--json` /proc/found.json cannot be written"),
        ((index, query, "--checkpoint", tmp_path), "is no checkpoint"),
    ]
    for arguments, message in cases:
        ended = command_line("search.py", *arguments)
        assert ended.status == 2 and ended.out == "", arguments
        assert ended.err.startswith("error: ") and message in ended.err, ended.err
