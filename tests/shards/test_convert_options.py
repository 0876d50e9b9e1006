"""`python -m shards.convert`: help, sizes, encoding, stopping and its exit statuses."""

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from official_layouts import put, write_cub
from PIL import Image

from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.registry import KINDS
from shards.convert import _num_bytes, main

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for split, name in (("train", "owl"), ("test", "gull")):
        for i in range(3):
            put(tmp_path / "photos" / split / name / f"{i}.jpg", i, size=(60, 40))
    return tmp_path / "photos"


def test_help_lists_every_source_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    names = ["cub", "cars", "sop", "inshop", "hotel50k", "omniglot", "csv", "folder", "glyphs", "custom"]
    assert [kind.name for kind in KINDS] == names
    for kind in KINDS:
        assert f"{kind.name} {kind.summary}" in lines


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("cub", ["images.txt", "image_class_labels.txt", "classes.txt"]),
        ("cars", ["cars_annos.mat", "car_ims/", "gcahng[cars]"]),
        ("sop", ["Ebay_train.txt", "Ebay_test.txt"]),
        ("inshop", ["list_eval_partition.txt", "Img/img/", "--image-folder"]),
        ("hotel50k", ["train_set.csv", "test_set.csv", "hotel_info.csv", "chain_info.csv", "images/test/unoccluded"]),
        ("omniglot", ["<alphabet>/character<number>/*.png", "--train-alphabets", "--rotations"]),
        ("csv", ["is_gallery", "--column", "--split", "--images", "--delimiter"]),
        ("folder", ["{train,test,query,gallery}", "--test-share"]),
        ("glyphs", ["--min-faces", "--identical"]),
        ("custom", ["--source-class", "--option"]),
    ],
)
def test_help_of_a_source_names_its_files(kind: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([kind, "--help"])
    text = capsys.readouterr().out
    assert [name for name in [*names, "--allow-mismatch", "--window-bytes"] if name not in text] == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("268435456", 256 << 20), ("256M", 256 << 20), ("8G", 8 << 30), ("8GiB", 8 << 30), ("1kb", 1024)]
    + [("2T", 2 << 40), ("5B", 5)],
)
def test_sizes(text: str, size: int) -> None:
    assert _num_bytes(text) == size


@pytest.mark.parametrize("text", ["", "M", "1.5G", "-1", "0", "0M", "8X", "8 G", "1e9", "٣"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 256M or 8G, got"):
        _num_bytes(text)


def test_sizes_reach_the_shards(photos: Path, tmp_path: Path) -> None:
    command = ["folder", "--source", str(photos), "--workers", "1", "--quiet", "--out"]
    assert main([*command, str(tmp_path / "small"), "--shard-bytes", "1K", "--window-bytes", "3M"]) == 0
    assert main([*command, str(tmp_path / "large")]) == 0
    small, large = (Manifest.load(tmp_path / name) for name in ("small", "large"))
    assert (len(small.shards), len(large.shards)) > (2, 2)
    assert (small.window_bytes, large.window_bytes) == (3 << 20, 8 << 30)


@pytest.mark.parametrize(
    ("options", "side", "encoded"),
    [
        ([], 60, False),
        (["--max-side", "32"], 32, True),
        (["--quality", "40"], 60, True),
        (["--max-side", "64"], 60, False),
    ],
)
def test_encoding_anew(photos: Path, tmp_path: Path, options: list[str], side: int, encoded: bool) -> None:
    command = ["folder", "--source", str(photos), "--out", str(tmp_path / "out"), "--workers", "1", "--quiet"]
    assert main([*command, *options]) == 0
    shards = ShardSet.open(tmp_path / "out")
    for row in range(len(shards)):
        assert Image.open(io.BytesIO(shards.read(row))).width == side
        assert (shards.read(row) != (photos / shards.source(row)).read_bytes()) == encoded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-side", "1"], "`max_side` must be at least 16 pixels, got 1"),
        (["--quality", "0"], "`quality` must be from 1 to 100, got 0"),
        (["--workers", "0"], "`workers` must be at least 1, got 0"),
        (["--test-share", "2"], "`test_share` must be a share of the classes"),
    ],
)
def test_options_out_of_range(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    source = photos / "train" if "--test-share" in options else photos
    assert main(["folder", "--source", str(source), "--out", str(tmp_path / "out"), "--quiet", *options]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cub", "--out", "x"], "the following arguments are required: --source"),
        (["csv", "--source", "x", "--out", "x", "--column", "label"], "expected key=value, got 'label'"),
        (["cub", "--source", "x", "--out", "x", "--shard-bytes", "8X"], "expected a size such as 256M or 8G, got '8X'"),
    ],
)
def test_arguments_that_cannot_be_parsed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_another_data_set_is_one_clear_error(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cub", "--source", str(photos), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: Source folder {photos} is not CUB-200-2011 as distributed: expected images.txt,")
    assert "found test/, train/." in message
    assert "CUB_200_2011/images/<class>/*.jpg" in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


SLOW_CUB = """
import time

from gcahng.data.sources.cub import Cub


class SlowCub(Cub):
    def load(self, item):
        time.sleep(0.02)
        return super().load(item)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_continued(tmp_path: Path, number: signal.Signals, status: int) -> None:
    write_cub(tmp_path / "cub", dict.fromkeys((1, 2, 3, 101, 102, 103), 20))
    (tmp_path / "slow_cub.py").write_text(SLOW_CUB)
    options = [
        "--source",
        str(tmp_path / "cub"),
        "--allow-mismatch",
        "--workers",
        "1",
        "--shard-bytes",
        "8K",
        "--quiet",
    ]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(["cub", *options, "--out", str(whole)]) == 0
    slow = ["custom", "--source-class", "slow_cub:SlowCub", *options, "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "shards.convert", *slow],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out.partial/shards/*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert "the same command continues" in errors
    assert not out.exists()

    assert main(["cub", *options, "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_handler_of_sigterm_is_put_back(photos: Path, tmp_path: Path) -> None:
    def own_handler(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own_handler)
    try:
        command = ["folder", "--source", str(photos), "--out", str(tmp_path / "out"), "--quiet", "--workers", "1"]
        assert main(command) == 0
        assert signal.getsignal(signal.SIGTERM) is own_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_seed_splits_the_classes_of_a_folder(tmp_path: Path) -> None:
    for i in range(8):
        put(tmp_path / "photos" / f"class {i}" / "0.jpg", i)
    splits = []
    for seed in ("0", "1", "2"):
        out = tmp_path / seed
        options = ["--out", str(out), "--seed", seed, "--test-share", "0.25", "--workers", "1", "--quiet"]
        assert main(["folder", "--source", str(tmp_path / "photos"), *options]) == 0
        splits.append(frozenset(info.name for info in ShardSet.open(out).classes if info.split == "test"))
        assert len(splits[-1]) == 2
    assert len(set(splits)) > 1


def test_names_that_stdout_cannot_take_are_escaped(photos: Path, tmp_path: Path) -> None:
    (photos / "test/gull/\u00e9.jpg").write_bytes(b"")
    (photos / "test" / "gull" / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    for arguments in (
        ["shards.convert", "folder", "--source", photos, "--out", tmp_path / "out", "--on-error", "skip"],
        ["shards.info", tmp_path / "out"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "  test/gull/\\xe9.jpg: " in done.stdout and "  test/gull/\\udcff.jpg: " in done.stdout
