"""Source `omniglot`: alphabets divide the characters, turned characters are classes, zip and folder are the same."""

import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gcahng.data.conversion.convert import convert
from gcahng.data.conversion.protocol import count_items
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.omniglot import CHARACTERS, Omniglot
from gcahng.data.sources.registry import KINDS
from gcahng.data.sources.source import Published
from gcahng.errors import DataError, InputError
from shards.convert import main

SIDE = 15  # pixels
REAL = os.environ.get("GCAHNG_OMNIGLOT", "")
PLAN = {"Runes": 2, "Glagol": 1, "Tengwar-like": 3}  # alphabet -> characters


def pixels(content: bytes) -> NDArray[np.bool_]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("1"))


def draw(path: Path, number: int) -> None:
    """A 1-bit PNG as in Omniglot; noise, so that no two and no turned ones are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 2, (SIDE, SIDE)).astype(bool)
    Image.fromarray(noise).save(path)


def draw_alphabets(root: Path, plan: dict[str, int], drawings: int = 2) -> Path:
    number = 0
    for alphabet, characters in plan.items():
        for character in range(1, characters + 1):
            for drawer in range(1, drawings + 1):
                number += 1
                draw(root / alphabet / f"character{character:02d}" / f"{character:04d}_{drawer:02d}.png", number)
    return root


def zipped(folder: Path, path: Path, above: str = "") -> Path:
    """The zip file of a folder's contents below `above`, with entries for files alone."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.write(file, above + file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw_alphabets(tmp_path / "python" / "images_background", PLAN)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_alphabets_divide_the_characters(root: Path) -> None:
    source = Omniglot(root, train_alphabets=["Runes", "Glagol"])
    listing = source.listing()
    split = {item.class_name: item.split for item in listing.items}
    assert split == {
        "Glagol_character01": "train",
        "Runes_character01": "train",
        "Runes_character02": "train",
        "Tengwar-like_character01": "test",
        "Tengwar-like_character02": "test",
        "Tengwar-like_character03": "test",
    }
    assert [item.source for item in listing.items if item.class_name == "Runes_character02"] == [
        "Runes/character02/0002_01.png",
        "Runes/character02/0002_02.png",
    ]
    assert listing.class_columns["Runes_character02"] == {"alphabet": "Runes", "rotation": "0"}
    assert (listing.faults, listing.published) == ([], None)
    for item in listing.items:
        assert source.load(item) == (root / item.source).read_bytes()


def test_turned_training_characters_are_classes(root: Path) -> None:
    source = Omniglot(root, train_alphabets=["Runes"], rotations=True)
    listing = source.listing()
    names = {item.class_name for item in listing.items if item.split == "train"}
    turns = {"": 0, "_rot90": 1, "_rot180": 2, "_rot270": 3}
    assert names == {f"Runes_character0{i}{turn}" for i in (1, 2) for turn in turns}
    assert len({item.source for item in listing.items}) == len(listing.items) == 2 * (8 + 4)
    for item in listing.items:
        plain, _, degrees = item.source.partition("@")
        quarters = turns["_rot" + degrees if degrees else ""]
        assert item.class_name.endswith(f"_rot{degrees}" if degrees else plain.split("/")[1])
        assert listing.class_columns[item.class_name]["rotation"] == str(90 * quarters)
        original = (root / plain).read_bytes()
        assert np.array_equal(pixels(source.load(item)), np.rot90(pixels(original), quarters))  # counter-clockwise
        if not quarters:
            assert source.load(item) == original
    assert not any("@" in item.source for item in listing.items if item.split == "test")


def test_only_a_whole_mark_turns(root: Path) -> None:
    draw(root / "Runes" / "character01" / "a@90.png", 77)
    source = Omniglot(root, train_alphabets=["Runes"])
    (item,) = (item for item in source.listing().items if "@" in item.source)
    assert source.load(item) == (root / item.source).read_bytes()


@pytest.mark.parametrize("above", ["", "images_background/"])
def test_zip_folder_and_folder_above_give_the_same_bytes(root: Path, tmp_path: Path, above: str) -> None:
    (root / "Runes" / "readme.txt").write_text("by hand")
    (root / "Runes" / ".DS_Store").write_text("")
    archive = zipped(root, tmp_path / "images.ZIP", above)
    with zipfile.ZipFile(archive, "a") as more:
        more.writestr(f"__MACOSX/{above}Runes/character01/._0001_01.png", b"")
        more.writestr("__MACOSX/Runes/character01/0001_01.png", b"")

    def source(directory: Path) -> Omniglot:
        return Omniglot(directory, train_alphabets=["Runes"], rotations=True)

    first = convert(source(root), tmp_path / "folder")
    convert(source(archive), tmp_path / "zip")
    assert contents(tmp_path / "folder") == contents(tmp_path / "zip")
    convert(source(root.parent if above else root), tmp_path / "above")
    assert contents(tmp_path / "folder") == contents(tmp_path / "above")
    assert first.extra["ignored_files"] == 1
    assert first.extra["options"] == {"train_alphabets": ["Runes"], "rotations": True}
    assert first.splits == {"train": {"classes": 8, "images": 16}, "test": {"classes": 4, "images": 8}}


def test_an_open_zip_file_travels(root: Path, tmp_path: Path) -> None:
    source = Omniglot(zipped(root, tmp_path / "images.zip"), train_alphabets=["Runes"])
    item = source.listing().items[0]
    assert pickle.loads(pickle.dumps(source)).load(item) == source.load(item) == (root / item.source).read_bytes()


def test_unknown_alphabets_are_refused_with_the_list(root: Path) -> None:
    with pytest.raises(InputError, match=r"runes, Elvish not found in .*: expected some of Glagol, Runes, Tengwar-"):
        Omniglot(root, train_alphabets=["runes", "Glagol", "Elvish"]).listing()


def test_some_alphabets_train_and_some_test(root: Path) -> None:
    with pytest.raises(InputError, match=r"expected at least one, got none"):
        Omniglot(root, train_alphabets=[])
    with pytest.raises(InputError, match=r"names all of the 3 alphabets .* at least one left for testing"):
        Omniglot(root, train_alphabets=list(PLAN)).listing()


def test_nothing_in_a_wrong_place_is_passed_over(root: Path) -> None:
    draw(root / "loose.png", 1)
    draw(root / "Runes" / "loose.PNG", 2)
    draw(root / "Runes" / "character01" / "deep" / "a.png", 3)
    draw(root / "Runes" / "letter03" / "a.png", 4)
    (root / "Runes" / "character04").mkdir()
    (root / "Empty").mkdir()
    listing = Omniglot(root, train_alphabets=["Glagol"]).listing()
    assert {fault.source: fault.reason.split(".")[0] for fault in listing.faults} == {
        "loose.png": "the drawing is in no folder of a character",
        "Runes/loose.PNG": "the drawing is in no folder of a character",
        "Runes/character01/deep": "a character's folder cannot hold folders",
        "Runes/letter03": "expected a folder character<number> here",
        "Runes/character04": "the character has no ",
        "Empty": "the alphabet has no folders character<number>",
    }
    assert len(listing.faults) == 6
    assert len(listing.items) == 12


def test_other_layouts_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected folders <alphabet>/character<number>/, got no such folders"):
        Omniglot(root / "Runes" / "character01", train_alphabets=["Runes"])
    draw_alphabets(root.parent / "images_evaluation", {"Ogham": 1})
    with pytest.raises(DataError, match=r"got several such folders, images_background/, images_evaluation/"):
        Omniglot(root.parent, train_alphabets=["Runes"])
    with pytest.raises(DataError, match=r"nowhere cannot be read \(No such file"):
        Omniglot(tmp_path / "nowhere", train_alphabets=["Runes"])


def test_damaged_zip_files_and_drawings(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no end")
    with pytest.raises(DataError, match=r"cut\.zip cannot be read as a zip file \(File is not a zip file\)"):
        Omniglot(tmp_path / "cut.zip", train_alphabets=["Runes"])
    archive = zipped(root, tmp_path / "images.zip")
    whole = (root / "Runes" / "character01" / "0001_01.png").read_bytes()
    content = archive.read_bytes()
    archive.write_bytes(content.replace(whole, whole[::-1]))  # stored as it is, so the checksum is another
    source = Omniglot(archive, train_alphabets=["Runes"], rotations=True)
    listing = source.listing()
    name = "Runes/character01/0001_01.png"
    item, turned = (item for item in listing.items if item.source in (name, f"{name}@90"))
    with pytest.raises(DataError, match=r"images\.zip cannot be read \(Bad CRC-32.*Fetch the zip file again"):
        source.load(item)
    (root / "Runes" / "character01" / "0001_01.png").write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"the file cannot be decoded as PNG, 60 bytes"):
        Omniglot(root, train_alphabets=["Runes"], rotations=True).load(turned)


def test_shards_inside_of_the_alphabets_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match="must not be inside of the source folder"):
        convert(Omniglot(root, train_alphabets=["Runes"]), root / "Runes" / "shards")


def test_published_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """964 and 659 characters are the authors' counts of their two sets, which the table has one after the other."""
    counts = list(CHARACTERS.values())
    assert (len(counts), sum(counts[:30]), sum(counts[30:])) == (50, 964, 659)
    drawings = [
        tmp_path / "set" / alphabet / f"character{character:02d}" / f"{drawer:02d}.png"
        for alphabet in ("Ojibwe_(Canadian_Aboriginal_Syllabics)", "Tagalog")
        for character in range(1, CHARACTERS[alphabet] + 1)
        for drawer in range(1, 21)
    ]
    for path in drawings:  # no listing reads them
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    listing = Omniglot(tmp_path / "set", train_alphabets=["Tagalog"], rotations=True).listing()
    assert listing.published == Published("Omniglot", {"train": (4 * 17, 4 * 17 * 20), "test": (14, 14 * 20)})
    assert count_items(listing.items) == {
        "train": {"classes": 68, "images": 1360},
        "test": {"classes": 14, "images": 280},
    }
    drawings[-1].unlink()
    arguments = ["--source", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--train-alphabets", " Tagalog,"]
    assert main(["omniglot", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Omniglot as listed by source 'omniglot' differs from what its authors published" in error
    assert re.search(r"train +images +340 +339 +-1", error), error


def test_train_alphabets_have_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["omniglot", "--source", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "required: --train-alphabets" in capsys.readouterr().err
    assert "omniglot" in [kind.name for kind in KINDS]


@pytest.mark.skipif(not REAL, reason="GCAHNG_OMNIGLOT names no folder or zip file of images_background_small1")
def test_the_real_drawings(tmp_path: Path) -> None:
    source = Omniglot(REAL, train_alphabets=["Korean", "Greek", "Latin"])
    manifest = convert(source, tmp_path / "out")
    assert manifest.extra["protocol"]["matches"]
    assert manifest.splits == {"train": {"classes": 90, "images": 1800}, "test": {"classes": 46, "images": 920}}
    shards = ShardSet.open(tmp_path / "out")
    assert {pixels(shards.read(row)).shape for row in range(0, len(shards), 97)} == {(105, 105)}
    turned = Omniglot(REAL, train_alphabets=["Korean", "Greek", "Latin"], rotations=True).listing()
    assert len({item.class_name for item in turned.items}) == 360 + 46
