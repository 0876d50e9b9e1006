"""Data set `glyphs`: which characters it has, which it merges and drops, and what it draws."""

import io
import json
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcahng.data.conversion.convert import convert
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.glyph_classes import Inventory, group
from gcahng.data.sources.glyph_fonts import Glyph, matplotlib_fonts, read_glyphs
from gcahng.data.sources.glyph_picture import draw_glyph
from gcahng.data.sources.glyphs import Glyphs
from gcahng.errors import DataError, InputError

REPOSITORY = Path(__file__).parents[3]
FEW_FACES = ("STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10")
FORBIDDEN = ("cmsy10", "cmex10", "LastResortHE-Regular")


@pytest.fixture(scope="module")
def few_fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fonts")
    for face in FEW_FACES + FORBIDDEN:
        shutil.copy(matplotlib_fonts() / f"{face}.ttf", directory)
    return directory


@pytest.fixture(scope="module")
def all_glyphs() -> list[Glyph]:
    return read_glyphs(matplotlib_fonts())


@pytest.fixture(scope="module")
def inventory(all_glyphs: list[Glyph]) -> Inventory:
    return group(all_glyphs)


def pixels(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)


def test_size_of_the_whole_set(all_glyphs: list[Glyph], inventory: Inventory) -> None:
    faces = Counter(g.code_point for g in all_glyphs)
    assert 6800 <= sum(count > 1 for count in faces.values()) <= 7100
    assert 54_000 <= sum(count for count in faces.values() if count > 1) <= 56_000
    assert 5500 <= len(inventory.classes) <= 5700
    assert 48_000 <= sum(len(c.pictures) for c in inventory.classes) <= 50_000


def test_one_picture_per_outline_is_smaller(all_glyphs: list[Glyph], inventory: Inventory) -> None:
    fewer = group(all_glyphs, one_per_outline=True)
    assert 5000 <= len(fewer.classes) < len(inventory.classes)
    assert 37_000 <= sum(len(c.pictures) for c in fewer.classes) <= 39_000
    for each in fewer.classes:
        assert len({g.outline for g in each.pictures}) == len(each.pictures) >= 2


def test_no_forbidden_face_or_code_point(all_glyphs: list[Glyph]) -> None:
    assert not [g for g in all_glyphs if g.face.startswith(("cmsy", "cmex", "LastResort"))]
    assert not [g for g in all_glyphs if unicodedata.category(chr(g.code_point)) == "Co"]
    computer_modern = {chr(g.code_point) for g in all_glyphs if g.face.startswith("cm")}
    assert len(computer_modern) == 26 + 26 + 10
    assert all(c.isascii() and c.isalnum() for c in computer_modern)


def members(inventory: Inventory, leader: str) -> set[str]:
    (found,) = [c for c in inventory.classes if c.leader == ord(leader)]
    return {chr(m) for m in found.members}


def test_characters_with_the_same_outline_are_one_class(inventory: Inventory) -> None:
    assert {"\u0391", "\u0410", "\U0001d400"} <= members(inventory, "A")  # Alpha, Cyrillic, bold
    assert {"\u039f", "\u041e"} <= members(inventory, "O")
    assert "o" not in members(inventory, "O")


def test_no_chain_joins_unlike_characters(inventory: Inventory) -> None:
    leaders = {m: c.leader for c in inventory.classes for m in (c.leader, *c.members)}
    for one, other in ("mT", "m\u0442", "n\u043f", "u\u0438", "n\u03c0", "lI", "cC", ".,", "0O"):
        assert leaders[ord(one)] != leaders[ord(other)], (one, other)
    assert max(len(c.members) for c in inventory.classes) < 20


def test_no_outline_is_in_two_classes(inventory: Inventory) -> None:
    owners: dict[str, set[int]] = {}
    for each in inventory.classes:
        assert len({g.face for g in each.pictures}) >= 2
        for glyph in each.pictures:
            owners.setdefault(glyph.outline, set()).add(each.leader)
    assert all(len(leaders) == 1 for leaders in owners.values())


def test_dropped_characters_are_listed(inventory: Inventory) -> None:
    assert set(inventory.dropped) == {
        "without ink",
        "with fewer than 2 faces",
        "pictures of several classes",
    }
    assert {"U+0020", "U+00A0", "U+200B", "U+2800"} <= set(inventory.dropped["without ink"])
    # The italics of Cyrillic te and Latin m.
    assert {"DejaVuSerif-Italic U+0442", "DejaVuSerif-Italic U+006D"} <= set(
        inventory.dropped["pictures of several classes"]
    )


def glyph(face: str, character: str, outline: str) -> Glyph:
    return Glyph(face, ord(character), outline)


def test_rule_by_hand() -> None:
    """b shares one of two outlines with a and joins; c shares one of three and stays apart."""
    found = group(
        [
            *(glyph(f"f{i}", "a", f"a{i}") for i in range(4)),
            glyph("f0", "b", "a0"),
            glyph("f1", "b", "b1"),
            glyph("f0", "c", "c0"),
            glyph("f1", "c", "c1"),
            glyph("f2", "c", "a2"),
            glyph("f0", " ", ""),
            glyph("f0", "d", "d0"),
        ]
    )
    assert [(chr(c.leader), c.members) for c in found.classes] == [("a", (ord("b"),)), ("c", ())]
    pictures = {chr(c.leader): [g.outline for g in c.pictures] for c in found.classes}
    assert pictures == {"a": ["a0", "a1", "b1", "a3"], "c": ["c0", "c1"]}
    assert found.dropped == {
        "without ink": ["U+0020"],
        "with fewer than 2 faces": ["U+0064"],
        "pictures of several classes": ["f2 U+0061", "f2 U+0063"],
    }


def test_min_faces(all_glyphs: list[Glyph]) -> None:
    found = group(all_glyphs, min_faces=8)
    assert 1000 < len(found.classes) < 3000
    assert min(len({g.face for g in c.pictures}) for c in found.classes) == 8


def test_workers_do_not_change_a_byte(few_fonts: Path, tmp_path: Path) -> None:
    source = Glyphs(few_fonts, seed=1, classes=40, size=24)
    for workers in (1, 2):
        convert(source, tmp_path / f"{workers}", seed=1, workers=workers)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_converted_subset(few_fonts: Path, tmp_path: Path) -> None:
    manifest = convert(Glyphs(few_fonts, classes=60, size=32), tmp_path / "out")
    assert {s: c["classes"] for s, c in manifest.splits.items()} == {"train": 30, "test": 30}
    shards = ShardSet.open(tmp_path / "out", verify=True)
    train, test = (set(shards.class_ids(shards.split_samples(split))) for split in ("train", "test"))
    assert not train & test
    for row in range(len(shards)):
        picture = pixels(shards.read(row))
        assert picture.shape == (32, 32)
        assert picture.min() < 128
        # A margin of at least one sixteenth on every side.
        assert np.delete(picture, np.s_[2:30], axis=0).min() == 255
        assert np.delete(picture, np.s_[2:30], axis=1).min() == 255
        face, code = shards.source(row).split()
        assert face in FEW_FACES
        assert unicodedata.category(chr(int(code[2:], 16))) != "Co"
    leader = shards.classes[0].name.split()[0]
    assert leader in {shards.source(row).split()[1] for row in np.flatnonzero(shards.class_ids() == 0)}
    assert manifest.extra["options"]["size"] == 32


def chosen(fonts: Path, **options: int) -> dict[str, str]:
    return {i.class_name: i.split for i in Glyphs(fonts, **options).listing().items}


def test_seeds_choose_other_classes_and_splits(few_fonts: Path) -> None:
    first, second = chosen(few_fonts, classes=100, seed=0), chosen(few_fonts, classes=100, seed=1)
    assert len(first) == len(second) == 100
    assert set(first) != set(second)
    assert chosen(few_fonts, classes=100, seed=0) == first
    assert set(chosen(few_fonts, classes=50, seed=0)) < set(first)
    everything = [chosen(few_fonts, seed=seed) for seed in (0, 1)]
    assert set(everything[0]) == set(everything[1])
    assert everything[0] != everything[1]


def test_size_tells_characters_apart_and_large_ones_fit() -> None:
    font = matplotlib_fonts() / "DejaVuSans.ttf"

    def ink(character: str) -> tuple[int, int]:
        dark = np.argwhere(pixels(draw_glyph(font, ord(character), 64)) < 128)
        height, width = np.ptp(dark, axis=0) + 1
        return int(height), int(width)

    # Heights in em (x 0.56, cap 0.73) times 56 pixels inside of the margins.
    assert ink("x")[0] == pytest.approx(31, abs=2)
    assert ink("X")[0] == pytest.approx(41, abs=2)
    assert ink(".")[0] < 10
    wide = ink("\u2a0c")  # quadruple integral, wider than one em
    assert max(wide) == pytest.approx(56, abs=2)


def test_ink_is_centred() -> None:
    picture = pixels(draw_glyph(matplotlib_fonts() / "DejaVuSans.ttf", ord("\u00b4"), 64)) < 128
    for axis in (0, 1):
        ink = np.flatnonzero(picture.any(axis=axis))
        assert abs((ink[0] + ink[-1]) / 2 - 31.5) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "`size` of glyphs must be at least 16, got 8"),
        ({"classes": 1}, "`classes` of glyphs must be at least 2, got 1"),
        ({"min_faces": 1}, "`min_faces` of glyphs must be at least 2, got 1"),
        ({"identical": "maybe"}, "`identical` of glyphs must be keep or drop, got 'maybe'"),
    ],
)
def test_options_out_of_range(few_fonts: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Glyphs(few_fonts, **options)  # type: ignore[arg-type]


def test_more_classes_than_there_are(few_fonts: Path) -> None:
    with pytest.raises(DataError, match=r"have \d+ classes with 2 or more faces: .* 90000\. Pass"):
        Glyphs(few_fonts, classes=90_000).listing()


def test_folder_without_fonts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected TrueType fonts \(\*\.ttf\), got none"):
        Glyphs(tmp_path).listing()


def test_broken_font(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"not a font at all")
    with pytest.raises(DataError, match=r"Font .*broken\.ttf cannot be read as a TrueType font"):
        Glyphs(tmp_path).listing()
    with pytest.raises(DataError, match=r"Font .*broken\.ttf cannot be loaded"):
        draw_glyph(tmp_path / "broken.ttf", 65, 32)


def test_character_without_ink_is_not_drawn() -> None:
    with pytest.raises(DataError, match=r"draws nothing for U\+0020: expected ink"):
        draw_glyph(matplotlib_fonts() / "DejaVuSans.ttf", 0x20, 32)


@pytest.mark.parametrize("package", ["matplotlib", "fontTools"])
def test_missing_extra_names_the_installation(few_fonts: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    with pytest.raises(InputError, match=rf'needs {package}, .* pip install "gcahng\[glyphs\]"'):
        Glyphs(None if package == "matplotlib" else few_fonts).listing()


def test_command_line(few_fonts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--classes", "20", "--size", "32", "--min-faces", "3", "--identical", "drop"]
    done = subprocess.run(
        [sys.executable, "-m", "shards.convert", "glyphs", "--source", few_fonts, "--out", out]
        + ["--workers", "2", "--seed", "4", "--test-share", "0.25", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["seed"] == 4
    assert manifest["splits"]["train"]["classes"] == 15
    assert min(c.num_samples for c in ShardSet.open(out).classes) >= 3
    assert manifest["extra"]["duplicates"]["within_class"] == 0
    assert "dropped: " in done.stdout
    assert f"test: 5 classes, {manifest['splits']['test']['images']} images" in done.stdout
