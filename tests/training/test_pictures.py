"""The neighbour picture: whole, marked without relying on colour alone, safe with any name."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from gcahng.errors import InputError
from gcahng.training import pictures
from gcahng.training.pictures import Neighbour, Query, choose_queries, neighbour_picture, shorten


def tile(shade: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    return Image.new("L", size, shade)


def colours(path: Path) -> dict[str, int]:
    """Pixels of each plain colour of the frames."""
    with Image.open(path) as image:
        counted = image.convert("RGB").getcolors(maxcolors=1 << 24)
    by_name = {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in counted}
    return {name: by_name.get(getattr(pictures, name), 0) for name in ("RIGHT_COLOUR", "WRONG_COLOUR", "QUERY_COLOUR")}


def draw(path: Path, is_right: bool, name: str = "A") -> Path:
    return neighbour_picture(path, [(tile(200), name)], [[(tile(99), name, is_right, 0.5)]], "title")


def test_writes_a_whole_png_and_nothing_else(tmp_path: Path) -> None:
    path = draw(tmp_path / "out.png", is_right=True)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
    assert [item.name for item in tmp_path.iterdir()] == ["out.png"]


def test_right_and_wrong_differ_in_colour_frame_and_mark(tmp_path: Path) -> None:
    right = colours(draw(tmp_path / "right.png", is_right=True))
    wrong = colours(draw(tmp_path / "wrong.png", is_right=False))
    # Both colours are in the legend; the frame adds much more of one of them.
    assert right["RIGHT_COLOUR"] > 5 * wrong["RIGHT_COLOUR"] > 0
    assert wrong["WRONG_COLOUR"] > 3 * right["WRONG_COLOUR"] > 0
    # A dashed frame has less ink than a solid one: told apart without colour.
    assert wrong["WRONG_COLOUR"] < 0.9 * right["RIGHT_COLOUR"]
    assert right["QUERY_COLOUR"] > 0


def test_marks_are_drawn_in_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    original = pictures._text

    def record(axes: object, x: float, y: float, text: str, **style: object) -> None:
        drawn.append(text)
        original(axes, x, y, text, **style)

    monkeypatch.setattr(pictures, "_text", record)
    rows = [
        [Neighbour(tile(9), "B", False, 0.875), Neighbour(tile(9), "A", True, -0.25)],
        [Neighbour(tile(9), "C", True, 1.0)],
    ]
    queries = [Query(tile(1), "A", "worst"), Query(tile(1), "C")]
    neighbour_picture(tmp_path / "out.png", queries, rows, "some title")
    assert drawn.count("\u2713") == 2
    assert drawn.count("\u2717") == 1
    for text in ("some title", "query, worst", "query", "0.88\nB", "-0.25\nA", "1.00\nC"):
        assert text in drawn


@pytest.mark.parametrize("name", ["$x_1$ costs $5", "\u5b57", "\U0001d504", "", "a_b/c" * 30])
def test_any_class_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    """Formula signs, scripts without a font, nothing, too long: no error and no warning."""
    assert draw(tmp_path / "out.png", is_right=True, name=name).is_file()


def test_images_of_any_shape_and_mode(tmp_path: Path) -> None:
    images = [
        Image.new("RGBA", (300, 20), "red"),
        Image.new("1", (7, 50)),
        Image.new("P", (1, 1)),
        Image.new("RGB", (64, 64)),
    ]
    row = [(image, "x", True, 0.0) for image in images]
    path = neighbour_picture(tmp_path / "out.png", [(tile(3), "q")] * 2, [row, []], "t")
    assert path.is_file()


def test_equal_pictures_are_equal_files(tmp_path: Path) -> None:
    first, second = (draw(tmp_path / f"{i}.png", is_right=True) for i in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_no_query() -> None:
    with pytest.raises(InputError, match="`queries` must hold at least one query: got 0"):
        neighbour_picture("out.png", [], [], "t")


def test_counts_differ(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one list per query: expected 1, got 2"):
        neighbour_picture(tmp_path / "out.png", [(tile(0), "a")], [[], []], "t")


def test_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"existing folder: got '.*none.out\.png'"):
        draw(tmp_path / "none" / "out.png", is_right=True)


def test_matplotlib_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"need matplotlib, .*pip install 'gcahng\[pictures\]'"):
        draw(tmp_path / "out.png", is_right=True)


def test_choose_worst_and_typical() -> None:
    values = torch.tensor([0.9, 0.1, torch.nan, 0.5, 0.4, 0.0, 1.0, 0.6])
    assert choose_queries(values, 2, 3) == [
        (5, "worst"),
        (1, "worst"),
        (4, "typical"),
        (3, "typical"),
        (7, "typical"),
    ]


def test_choose_from_too_few_and_by_index_among_equals() -> None:
    assert choose_queries(torch.zeros(3), 2, 4) == [(0, "worst"), (1, "worst"), (2, "typical")]
    assert choose_queries(torch.tensor([torch.nan]), 2, 2) == []
    assert choose_queries(torch.zeros(3), 0, 1) == [(1, "typical")]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("short", "short"),
        ("two  spaced words here and", "two spaced words\nhere and"),
        ("folder/with_a_long_name", "folder/with_a_\nlong_name"),
        ("x" * 40, "x" * 17 + "\n" + "x" * 16 + "\u2026"),
        ("", ""),
    ],
)
def test_shorten(name: str, want: str) -> None:
    assert shorten(name) == want
