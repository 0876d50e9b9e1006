"""The neighbour picture: whole, marked without relying on colour alone, safe with any name."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gcahng.errors import InputError
from gcahng.training import canvas
from gcahng.training.canvas import Canvas, printable, shorten
from gcahng.training.pictures import (
    COLUMNS,
    Found,
    Neighbour,
    Pair,
    Query,
    choose_queries,
    comparison_png,
    neighbour_picture,
    pairs_png,
)


def tile(shade: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    return Image.new("L", size, shade)


def colours(path: Path) -> dict[str, int]:
    """Pixels of each plain colour of the frames."""
    with Image.open(path) as image:
        counted = image.convert("RGB").getcolors(maxcolors=1 << 24)
    by_name = {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in counted}
    return {name: by_name.get(getattr(canvas, name), 0) for name in ("RIGHT_COLOUR", "WRONG_COLOUR", "QUERY_COLOUR")}


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
    original = Canvas.text

    def record(canvas: Canvas, x: float, y: float, text: str, **style: object) -> None:
        drawn.append(text)
        original(canvas, x, y, text, **style)

    monkeypatch.setattr(Canvas, "text", record)
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
    with pytest.raises(InputError, match=r"need matplotlib, .*pip install 'gcahng\[report\]'"):
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
    assert shorten(name, 17) == want


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("a\x00b\x1b[31m\u202edrow\ud800", "a\ufffdb\ufffd[31m\ufffddrow\ufffd"),
        ("two\n\tlines\r\n", "two lines"),
        ("\u05e9\u05dc\u05d5\u05dd \u5b57 \U0001f600", "\u05e9\u05dc\u05d5\u05dd \u5b57 \U0001f600"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_printable(name: str, want: str) -> None:
    assert printable(name) == want


def test_lines_are_as_wide_as_they_are_drawn() -> None:
    """Narrow and wide letters: as many as fit, whatever their number."""
    page = Canvas(4, 1, 192)

    def width(text: str) -> float:
        """Inches of ink of a text, with a bar at either end."""
        drawn = Canvas(12, 0.3, 192)
        drawn.text(0.1, 0.05, f"|{text}|", fontsize=9, va="top", color="black")
        with Image.open(io.BytesIO(drawn.png())) as image:
            left, _, right, _ = image.convert("L").point(lambda value: 255 * (value < 128)).getbbox()
        return (right - left) / 192

    bars = width("")
    for name in ("iiiiiiiiii" * 9, "WWWWWWWWWW" * 9, "Some Latin words and_so on " * 4):
        lines = page.wrapped(name, 0.7, 3, fontsize=9).split("\n")
        assert len(lines) == 3
        assert lines[-1].endswith("\u2026")
        for line in lines:
            assert width(line) - bars <= 0.7 + 0.02
    narrow, wide = (page.wrapped(letter * 90, 0.7, 1, fontsize=9) for letter in "iW")
    assert len(narrow) > 2 * len(wide)


class Recorder:
    """What is written and framed on every canvas, while it is drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[tuple[str, float]] = []
        self.frames: list[tuple[float, float, str, str]] = []
        text, frame = Canvas.text, Canvas.frame

        def record_text(canvas: Canvas, x: float, y: float, written: str, **style: Any) -> None:
            self.texts.append((written, style["fontsize"]))
            text(canvas, x, y, written, **style)

        def record_frame(canvas: Canvas, left: float, top: float, side: float, colour: str, style: str) -> None:
            self.frames.append((round(left, 3), round(top, 3), colour, style))
            frame(canvas, left, top, side, colour, style)

        monkeypatch.setattr(Canvas, "text", record_text)
        monkeypatch.setattr(Canvas, "frame", record_frame)

    def written(self) -> list[str]:
        return [text for text, _ in self.texts]


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return image.size


def test_a_comparison_is_narrow_and_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    right, wrong = Neighbour(tile(9), "A", True, 0.875), Neighbour(tile(9), "B c", False, -0.25)
    models = [Found("first model", [right, wrong, right]), Found("second" * 20, [wrong] * 2, "MAP@R 100 %")]
    width, height = size_of(comparison_png(Query(tile(3), "A"), models))
    assert width == 760 and height < 760
    written = recorder.written()
    for text in ("query", "A", "first model"):
        assert written.count(text) == 1
    # A long name leaves room for what is said about it.
    assert [text for text in written if text.startswith("secondsecond") and text.endswith("\u2026: MAP@R 100 %")]
    assert written.count("\u2713 0.88") == 2
    assert written.count("\u2717 -0.25") == 3
    assert written.count("B c") == 3
    assert {size for _, size in recorder.texts} == {9}  # points: 12 CSS pixels at 380
    looks = [(colour, style) for _, _, colour, style in recorder.frames]
    good, bad = (canvas.RIGHT_COLOUR, "solid"), (canvas.WRONG_COLOUR, "dashed")
    assert looks == [(canvas.QUERY_COLOUR, "solid"), good, bad, good, bad, bad]


def test_many_neighbours_go_on_in_a_second_line(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    row = [Neighbour(tile(9), "A", True, 0.5)] * (COLUMNS + 2)
    comparison_png(Query(tile(3), "A"), [Found("m", row)])
    lefts = [left for left, _, _, _ in recorder.frames[1:]]
    tops = [top for _, top, _, _ in recorder.frames[1:]]
    assert lefts[:2] == lefts[COLUMNS:]
    assert len(set(tops[:COLUMNS])) == 1 and tops[COLUMNS] > tops[0] + 0.6


@pytest.mark.parametrize(
    "name", ["", "a" * 500, "word " * 80, "$\\broken{$", "_x", "\x00\x1b\u202e", "\u0915\u094d\u0937"]
)
def test_any_name_can_be_compared_and_paired(name: str) -> None:
    wrong = Neighbour(tile(9), name, False, 0.5)
    query = Query(tile(3, (9, 40)), name)
    width, height = size_of(comparison_png(query, [Found(name, [wrong])]))
    assert width == 760 and height < 600
    assert size_of(pairs_png([Pair(query, wrong)]))[0] == 760


def test_pairs_stand_one_above_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    pair = Pair(Query(tile(3), "A"), Neighbour(tile(9), "B", False, 0.5))
    pairs_png([pair] * 3)
    assert recorder.written() == ["query: A", "\u2717 finds: B"] + ["\u2717 0.50"] * 3
    queries, neighbours = recorder.frames[::2], recorder.frames[1::2]
    assert [left for left, *_ in queries] == [left for left, *_ in neighbours]
    assert all(below[1] > above[1] + 0.9 for above, below in zip(queries, neighbours, strict=True))
    assert {style for *_, style in neighbours} == {"dashed"}


def test_nothing_to_compare_or_too_many_pairs() -> None:
    with pytest.raises(InputError, match="`found` must hold what at least one model finds"):
        comparison_png(Query(tile(3), "A"), [])
    pair = Pair(Query(tile(3), "A"), Neighbour(tile(9), "B", False, 0.5))
    for count in (0, 5):
        with pytest.raises(InputError, match=f"`pairs` must hold 1 to 4 pairs: got {count}"):
            pairs_png([pair] * count)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="full"):
        draw(tmp_path / "out.png", is_right=True)
    assert list(tmp_path.iterdir()) == []
