"""Conversion: same bytes for any number of workers; faults stop or are listed; all or nothing."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcahng.data.conversion.convert import convert, summary
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.folder import Folder
from gcahng.data.sources.source import load_source
from gcahng.errors import ConfigError, DataError, InputError

REPOSITORY = Path(__file__).parents[3]


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    directory = tmp_path / "birds"
    for i in range(6):
        (directory / f"bird {i}").mkdir(parents=True)
        for j in range(12):
            (directory / f"bird {i}" / f"{j}.jpg").write_bytes(encoded(100 * i + j))
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_workers_do_not_change_a_byte(birds: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        convert(Folder(birds), tmp_path / f"{workers}", workers=workers, shard_bytes=20_000)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(list((tmp_path / "1").glob("*.tar"))) > 2


def test_classes_are_contiguous_and_train_comes_first(birds: Path, tmp_path: Path) -> None:
    manifest = convert(Folder(birds), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out", verify=True)
    assert shards.class_id.tolist() == [i for i in range(6) for _ in range(12)]
    assert [c.split for c in manifest.classes] == ["train"] * 3 + ["test"] * 3
    assert manifest.splits == {
        "train": {"classes": 3, "images": 36},
        "test": {"classes": 3, "images": 36},
    }


def test_seed_changes_the_order_of_classes(birds: Path, tmp_path: Path) -> None:
    orders = {tuple(c.name for c in convert(Folder(birds), tmp_path / f"{s}", seed=s).classes) for s in range(4)}
    assert len(orders) > 1
    assert {frozenset(order[:3]) for order in orders} == {frozenset(min(orders)[:3])}


def truncated(birds: Path) -> str:
    (birds / "bird 2" / "3.jpg").write_bytes(encoded(1)[:-200])
    return r"bird 2/3\.jpg: the file cannot be decoded as JPEG"


def not_an_image(birds: Path) -> str:
    (birds / "bird 2" / "3.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    return r"bird 2/3\.jpg: the file is no image: expected JPEG, PNG, WEBP, got 24 bytes"


def empty_file(birds: Path) -> str:
    (birds / "bird 2" / "3.jpg").write_bytes(b"")
    return r"bird 2/3\.jpg: the file is no image"


def decompression_bomb(birds: Path) -> str:
    Image.new("1", (20_000, 20_000)).save(birds / "bird 2" / "3.jpg", "PNG")
    return r"bird 2/3\.jpg: the file has too many pixels"


def broken_link(birds: Path) -> str:
    (birds / "bird 2" / "3.jpg").unlink()
    (birds / "bird 2" / "3.jpg").symlink_to("gone.jpg")
    return r"bird 2/3\.jpg: the file cannot be read \(No such file or directory\)"


def empty_class(birds: Path) -> str:
    (birds / "bird 9").mkdir()
    return r"bird 9: the class folder has no \.jpg"


FAULTS = [truncated, not_an_image, empty_file, decompression_bomb, broken_link, empty_class]


@pytest.mark.parametrize("make_fault", FAULTS)
def test_fault_stops_the_conversion_and_leaves_nothing(
    birds: Path, tmp_path: Path, make_fault: Callable[[Path], str]
) -> None:
    message = make_fault(birds)
    with pytest.raises(DataError, match=f"Cannot convert {message}.*--on-error skip leaves"):
        convert(Folder(birds), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["birds"]


def test_fault_in_a_worker_stops_the_conversion(birds: Path, tmp_path: Path) -> None:
    message = truncated(birds)
    with pytest.raises(DataError, match=f"Cannot convert {message}"):
        convert(Folder(birds), tmp_path / "out", workers=2)
    assert [p.name for p in tmp_path.iterdir()] == ["birds"]


@pytest.mark.parametrize("make_fault", FAULTS)
def test_fault_is_skipped_counted_and_listed(birds: Path, tmp_path: Path, make_fault: Callable[[Path], str]) -> None:
    source, _, reason = make_fault(birds).replace("\\", "").partition(": ")
    manifest = convert(Folder(birds), tmp_path / "out", on_error="skip")
    (entry,) = manifest.extra["skipped"]
    assert entry["source"] == source
    assert entry["reason"].startswith(reason)
    images = sum(counts["images"] for counts in manifest.splits.values())
    assert images == (72 if make_fault is empty_class else 71)
    assert len(ShardSet.open(tmp_path / "out", verify=True)) == images
    assert f"skipped: 1\n  {source}: " in summary(manifest, tmp_path / "out")


def test_class_with_no_readable_image_has_no_id(birds: Path, tmp_path: Path) -> None:
    for path in (birds / "bird 1").iterdir():
        path.write_bytes(b"x")
    manifest = convert(Folder(birds), tmp_path / "out", on_error="skip")
    assert [c.class_id for c in manifest.classes] == list(range(5))
    assert "bird 1" not in {c.name for c in manifest.classes}
    assert len(manifest.extra["skipped"]) == 12


def test_nothing_readable(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(b"x")
    with pytest.raises(DataError, match="has no readable images: .* got 2 unreadable ones"):
        convert(Folder(tmp_path / "in"), tmp_path / "out", on_error="skip")


def test_class_in_train_and_test(tmp_path: Path) -> None:
    for split, name in (("train", "owl"), ("train", "gull"), ("test", "owl")):
        (tmp_path / "in" / split / name).mkdir(parents=True)
        (tmp_path / "in" / split / name / "1.jpg").write_bytes(encoded(1))
    with pytest.raises(DataError, match=r"Class 'owl' is in train and in test: .* unseen classes"):
        convert(Folder(tmp_path / "in"), tmp_path / "out")


def test_duplicates_within_a_class_are_counted(birds: Path, tmp_path: Path) -> None:
    image = encoded(10_000)
    for path in ("bird 0/0.jpg", "bird 0/5.jpg", "bird 0/9.jpg", "bird 1/0.jpg"):
        (birds / path).write_bytes(image)
    manifest = convert(Folder(birds), tmp_path / "out")
    assert manifest.extra["duplicates"] == 2
    assert manifest.num_samples == 72
    assert "duplicates within a class: 2 (kept)" in summary(manifest, tmp_path / "out")


@pytest.mark.parametrize("name", ["workers", "shard_bytes"])
def test_counts_must_be_positive(birds: Path, tmp_path: Path, name: str) -> None:
    options: dict[str, int] = {name: 0}
    with pytest.raises(InputError, match=f"`{name}` must be at least 1, got 0"):
        convert(Folder(birds), tmp_path / "out", **options)  # type: ignore[arg-type]


def test_unknown_way_to_treat_errors(birds: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`on_error` must be fail or skip, got 'ignore'"):
        convert(Folder(birds), tmp_path / "out", on_error="ignore")  # type: ignore[arg-type]


OWN_SOURCE = '''
"""A source of one's own: colours that need no files, slowly or until a worker dies."""
import io, os, time
from PIL import Image
from gcahng.data.sources.source import Listing, SourceItem

class Colours:
    name = "colours"

    def __init__(self, directory, *, seed, wait="0", die="no", images="20"):
        self.wait, self.die, self.images = float(wait), die, int(images)

    def listing(self):
        items = [SourceItem(f"{s} {c}", s, f"{s}-{c}-{i}")
                 for s in ("train", "test") for c in range(4) for i in range(self.images)]
        return Listing(items, extra={"colours": 8})

    def load(self, item):
        time.sleep(self.wait)
        if self.die == "yes" and item.source == "test-2-3":
            os._exit(9)
        buffer = io.BytesIO()
        Image.new("L", (8, 8), len(item.class_name)).save(buffer, "PNG")
        return buffer.getvalue()

class NoSource:
    name = "none"
'''


@pytest.fixture
def own_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "own_colours.py").write_text(OWN_SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_own_source_by_dotted_path(own_source: Path, tmp_path: Path) -> None:
    source = load_source("own_colours:Colours", tmp_path, 0, {"wait": "0"})
    manifest = convert(source, tmp_path / "out", workers=2)
    assert (manifest.source, manifest.extra["colours"], len(manifest.classes)) == ("colours", 8, 8)


def test_dead_worker_is_reported(own_source: Path, tmp_path: Path) -> None:
    source = load_source("own_colours:Colours", tmp_path, 0, {"die": "yes"})
    with pytest.raises(DataError, match="A conversion worker was killed.*smaller --workers"):
        convert(source, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("own_colours:NoSource", {}, "expected the attributes .*, listing, load missing"),
        ("own_colours:Colours", {"hue": "3"}, r"cannot be called with .*hue=\.\.\..*--option"),
        ("own_colours:Nothing", {}, "has no name `Nothing`"),
    ],
)
def test_own_source_that_is_none(
    own_source: Path, tmp_path: Path, path: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_source(path, tmp_path, 0, options)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "shards.convert", *map(str, arguments)]


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_command_line_converts_a_folder(birds: Path, tmp_path: Path) -> None:
    (birds / "bird 0" / "0.jpg").write_bytes(b"x")
    out = tmp_path / "out"
    done = run("folder", "--source", birds, "--out", out, "--on-error", "skip", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    lines = done.stdout.splitlines()
    manifest = ShardSet.open(out, verify=True).manifest
    for split in ("train", "test"):
        assert f"{split}: 3 classes, {manifest.splits[split]['images']} images" in lines
    assert "skipped: 1" in lines
    assert lines[-1] == f"path: {out}"


def test_command_line_errors_have_no_traceback(tmp_path: Path) -> None:
    done = run("folder", "--source", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Source folder")
    assert "Traceback" not in done.stderr
    done = run("custom", "--source-class", "a:B", "--source", ".", "--out", "x", "--option", "k")
    assert done.returncode == 2
    assert "expected key=value, got 'k'" in done.stderr


def start_slow_conversion(own_source: Path, out: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        command(
            *("custom", "--source-class", "own_colours:Colours", "--source", "."),
            *("--option", "wait=0.01", "--option", "images=200"),
            *("--out", out, "--workers", 2, "--quiet"),
        ),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{own_source}{os.pathsep}{REPOSITORY}"},
    )
    deadline = time.monotonic() + 60
    while not list(out.parent.glob("out.partial/*.tar")):
        assert process.poll() is None, "ended before it wrote anything"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_terminated_conversion_cleans_up(own_source: Path, tmp_path: Path) -> None:
    process = start_slow_conversion(own_source, tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert [p.name for p in tmp_path.iterdir()] == ["modules"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds child processes in /proc")
def test_killed_conversion_leaves_nothing_that_looks_whole(own_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_slow_conversion(own_source, out)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    process.wait(30)
    assert not out.exists()
    for directory in (out, tmp_path / "out.partial"):
        with pytest.raises(DataError, match=r"manifest\.json is missing"):
            ShardSet.open(directory)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "workers outlive the conversion"
        time.sleep(0.05)
    source = load_source("own_colours:Colours", tmp_path, 0, {})
    with pytest.raises(DataError, match="one was killed"):
        convert(source, out)
    convert(source, out, overwrite=True)
    assert json.loads((out / "manifest.json").read_text())["source"] == "colours"


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
