"""Conversion: same bytes for any number of workers; faults stop or are listed; all or nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conversion_cases import Pictures, contents, encoded
from PIL import Image

from gcahng.data.conversion.convert import convert, summary
from gcahng.data.conversion.image_file import EncodeSettings
from gcahng.data.images.decode import decode_image
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.folder import Folder
from gcahng.data.sources.source import SourceItem, load_source
from gcahng.errors import ConfigError, DataError, InputError

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    directory = tmp_path / "birds"
    for i in range(6):
        (directory / f"bird {i}").mkdir(parents=True)
        for j in range(12):
            (directory / f"bird {i}" / f"{j}.jpg").write_bytes(encoded(100 * i + j))
    return directory


def test_workers_do_not_change_a_byte(birds: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        convert(Folder(birds), tmp_path / f"{workers}", workers=workers, shard_bytes=20_000)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert len(list((tmp_path / "1").glob("*.tar"))) > 2


def test_classes_are_contiguous_and_train_comes_first(birds: Path, tmp_path: Path) -> None:
    manifest = convert(Folder(birds), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out", verify=True)
    assert shards.class_ids().tolist() == [i for i in range(6) for _ in range(12)]
    assert [c.split for c in shards.classes] == ["train"] * 3 + ["test"] * 3
    assert manifest.splits == {
        "train": {"classes": 3, "images": 36},
        "test": {"classes": 3, "images": 36},
    }


def test_seed_changes_the_order_of_classes(birds: Path, tmp_path: Path) -> None:
    for seed in range(4):
        convert(Folder(birds), tmp_path / f"{seed}", seed=seed)
    orders = {tuple(c.name for c in ShardSet.open(tmp_path / f"{seed}").classes) for seed in range(4)}
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
    assert manifest.classes.count == 5
    assert "bird 1" not in {c.name for c in ShardSet.open(tmp_path / "out").classes}
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
    duplicates = manifest.extra["duplicates"]
    assert duplicates["within_class"] == 2
    assert duplicates["across_classes"] + duplicates["across_splits"] == 1
    assert manifest.num_samples == 72
    text = summary(manifest, tmp_path / "out")
    assert "duplicates, byte by byte (all kept): 2 within a class, " in text
    assert "  within class: bird 0/0.jpg (" in text


def test_encoding_anew(birds: Path, tmp_path: Path) -> None:
    (birds / "bird 1" / "small.jpg").write_bytes(encoded(5, size=(12, 16)))
    for workers in (1, 2):
        manifest = convert(Folder(birds), tmp_path / f"{workers}", workers=workers, encode=EncodeSettings(20, 80))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert manifest.extra["encode"] == {"max_side": 20, "quality": 80}
    text = summary(manifest, tmp_path / "1")
    assert "encoded anew: those with a side of more than 20 pixels, as JPEG of quality 80" in text
    shards = ShardSet.open(tmp_path / "1", verify=True)
    for row in range(len(shards)):
        image = decode_image(shards.read(row), name="the image")
        assert image.size == ((12, 16) if shards.source(row).endswith("small.jpg") else (20, 17))
    everything = convert(Folder(birds), tmp_path / "3", encode=EncodeSettings(None, 30))
    assert "encoded anew: all, as JPEG of quality 30" in summary(everything, tmp_path / "3")


def test_columns_of_images_and_classes_are_kept(tmp_path: Path) -> None:
    items = [SourceItem("owl", "train", "1", {"view": "left"}), SourceItem("crow", "test", "2")]
    source = Pictures(items, class_columns={"crow": {"family": "corvids"}, "stork": {"family": "unused"}})
    convert(source, tmp_path / "out", window_bytes=123)
    shards = ShardSet.open(tmp_path / "out", verify=True)
    assert [shards.meta(row).get("columns") for row in (0, 1)] == [{"view": "left"}, None]
    assert [(c.name, dict(c.columns)) for c in shards.classes] == [("owl", {}), ("crow", {"family": "corvids"})]
    assert shards.manifest.window_bytes == 123


@pytest.mark.parametrize("name", ["workers", "shard_bytes", "window_bytes"])
def test_counts_must_be_positive(birds: Path, tmp_path: Path, name: str) -> None:
    options: dict[str, int] = {name: 0}
    with pytest.raises(InputError, match=f"`{name}` must be at least 1, got 0"):
        convert(Folder(birds), tmp_path / "out", **options)  # type: ignore[arg-type]


def test_unknown_way_to_treat_errors(birds: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`on_error` must be fail or skip, got 'ignore'"):
        convert(Folder(birds), tmp_path / "out", on_error="ignore")  # type: ignore[arg-type]


OWN_SOURCE = '''
"""A source of one's own: colours that need no files, until a worker dies."""
import io, os
from PIL import Image
from gcahng.data.sources.source import Listing, SourceItem

class Colours:
    name = "colours"

    def __init__(self, directory, *, seed, die="no"):
        self.die = die

    def listing(self):
        items = [SourceItem(f"{s} {c}", s, f"{s}-{c}-{i}")
                 for s in ("train", "test") for c in range(4) for i in range(20)]
        return Listing(items, extra={"colours": 8})

    def load(self, item):
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
    source = load_source("own_colours:Colours", tmp_path, 0, {"die": "no"})
    manifest = convert(source, tmp_path / "out", workers=2)
    assert (manifest.source, manifest.extra["colours"], manifest.classes.count) == ("colours", 8, 8)


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
