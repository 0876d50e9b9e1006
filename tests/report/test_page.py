"""The page as a file: whole, self-contained, escaped; and how it comes from run folders."""

import base64
import io
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup
from PIL import Image

from gcahng.errors import ConfigError, InputError
from gcahng.report.build import build_report, default_folder, read_runs, short_names
from gcahng.report.page import write_report
from gcahng.report.run_data import RunData, read_run
from gcahng.report.section import Figure, Section, Table
from launch import report as command
from launch.cli import run

HOSTILE = "</title></style><script>alert('1')</script> \"quoted\" & {{ 1234 * 5678 }} {% raw %}"


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def parsed(page: Path) -> Parsed:
    return Parsed(page.read_text(encoding="utf-8"))


def png(width: int = 760, height: int = 400) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(content, "PNG")
    return content.getvalue()


def section(*parts: Figure | Table | Markup, name: str = "one") -> Section:
    return Section(name, "Title", "Intro", parts)


def test_page_holds_every_picture_and_asks_for_nothing_else(report_page: Path) -> None:
    page = parsed(report_page)
    files = {path.name: path.read_bytes() for path in (report_page.parent / "pictures").iterdir()}
    assert {path.name for path in report_page.parent.iterdir()} == {"report.html", "pictures"}
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", name) for name in files)
    images = page.all("img")
    prefix = "data:image/png;base64,"
    assert sorted(base64.b64decode((i["src"] or "").removeprefix(prefix)) for i in images) == sorted(files.values())
    for image in images:
        assert image["alt"] and image["decoding"] == "async"
        with Image.open(io.BytesIO(base64.b64decode((image["src"] or "").removeprefix(prefix)))) as content:
            ratio = content.height / content.width
            assert content.width == 2 * int(image["width"] or 0) == 760
        assert int(image["height"] or 0) == pytest.approx(int(image["width"] or 0) * ratio, abs=0.51)
    tags = {name for name, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "svg", "video"}
    for name, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (name, key)
            if key in ("src", "href", "srcset", "action", "data"):
                assert value is not None and value.startswith(("data:", "#")), (name, value)
    assert "url(" not in report_page.read_text() and "@import" not in report_page.read_text()


def test_policy_stands_before_anything_it_governs(report_page: Path) -> None:
    page = parsed(report_page)
    kinds = [name for name, _ in page.tags]
    place = next(i for i, (_, a) in enumerate(page.tags) if a.get("http-equiv") == "Content-Security-Policy")
    assert place < kinds.index("style") and place < kinds.index("img")
    directives = dict(part.strip().split(" ", 1) for part in (page.tags[place][1]["content"] or "").split(";"))
    assert directives == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_contents_lead_to_every_section(report_page: Path) -> None:
    page = parsed(report_page)
    assert [a["href"] for a in page.all("a")] == [f"#{s['id']}" for s in page.all("section")]
    assert len(page.all("section")) == 8
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(identifiers)) == len(identifiers)


def test_letters_that_would_turn_or_break_the_page_are_replaced(report_runs: Sequence[RunData], tmp_path: Path) -> None:
    """A mark of direction, a control character, and half a pair: what a folder's name of other bytes is read as."""
    name = "a\u202eb\x07c\udce9d \u0905\u200d\u5b57\u00e9"
    run = replace(report_runs[0], name=name, folder=Path(f"/runs/{name}"))
    table = Table([name], [[name]], caption=name)
    page = parsed(write_report([run], tmp_path, [section(Figure("picture", png(), alt=name, caption=name), table)]))
    shown = "a\ufffdb\ufffdc\ufffdd \u0905\u200d\u5b57\u00e9"
    assert page.text.count(shown) == 8 and page.all("img")[0]["alt"] == shown
    assert not {"\u202e", "\x07"} & set(page.text)


def test_whatever_is_shown_is_escaped(report_runs: Sequence[RunData], tmp_path: Path) -> None:
    hostile = replace(report_runs[0], name=HOSTILE)
    parts = [
        Figure("picture", png(), alt=HOSTILE, caption=HOSTILE),
        Table([HOSTILE, "b"], [[HOSTILE, HOSTILE]], caption=HOSTILE),
    ]
    page = parsed(write_report([hostile], tmp_path, [Section("one", HOSTILE, HOSTILE, parts)]))
    assert not page.all("script") and len(page.all("style")) == 1
    assert page.all("img")[0]["alt"] == HOSTILE
    # Page title, heading, card, contents, section title and intro; picture's caption; table's caption, head, two cells.
    assert page.text.count(HOSTILE) == 11
    assert str(1234 * 5678) not in page.text


def test_folders_and_settings_are_escaped(report_runs: Sequence[RunData], tmp_path: Path) -> None:
    config = report_runs[0].config
    config = replace(config, data=replace(config.data, dir=f"data/{HOSTILE}"))
    config = replace(config, loss=replace(config.loss, metric=f"own.{HOSTILE}"))
    hostile = replace(report_runs[0], config=config, folder=tmp_path / HOSTILE, rows=[], hardness=[])
    page = parsed(build_report([hostile], tmp_path, embeddings=False))
    assert not page.all("script")
    assert page.text.count(HOSTILE) >= 4


def test_pictures_stand_together_in_the_order_of_the_parts(report_runs: Sequence[RunData], tmp_path: Path) -> None:
    figures = [Figure(name, png(), alt=name, css_width=width) for name, width in (("a", 380), ("b", 700), ("c", 380))]
    table = Table(["h"], [["cell"]])
    path = write_report(report_runs, tmp_path, [section(figures[0], figures[1], table, Markup("<i>x</i>"), figures[2])])
    text = path.read_text()
    order = ['alt="a"', 'alt="b"', "<table>", "<i>x</i>", 'alt="c"']
    places = [text.index(mark, text.index("<main>")) for mark in order]
    assert places == sorted(places)
    assert text.count('class="figures"') == 2
    assert [(i["width"], i["height"]) for i in parsed(path).all("img")] == [
        ("380", "200"),
        ("700", "368"),
        ("380", "200"),
    ]


def test_a_second_report_leaves_no_picture_of_the_first(report_runs: Sequence[RunData], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_report(report_runs, tmp_path, [section(Figure("old", png(), "x"), Figure("kept", png(), "x"))])
    path = write_report(report_runs, tmp_path, [section(Figure("new", png(4, 4), "x"), Figure("kept", png(8, 8), "x"))])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "notes.txt",
        "pictures/kept.png",
        "pictures/new.png",
        "report.html",
    ]
    assert (tmp_path / "pictures" / "kept.png").read_bytes() == png(8, 8)
    assert 'alt="x"' in path.read_text()


def test_pictures_that_no_report_wrote_are_left_alone(report_runs: Sequence[RunData], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.png").write_bytes(png())
    write_report(report_runs, tmp_path, [section()])
    assert (tmp_path / "pictures" / "holiday.png").is_file()


@pytest.mark.parametrize("name", ["../up", "A", "a b", "", "-a", "a.png"])
def test_names_that_are_no_file_names_are_refused(report_runs: Sequence[RunData], tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="Names must be lower case"):
        write_report(report_runs, tmp_path / "out", [section(Figure(name, png(), "x"))])
    assert not (tmp_path / "out").exists()


def test_names_and_pictures_are_checked(report_runs: Sequence[RunData], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"more than once \['a'\]"):
        write_report(
            report_runs, tmp_path, [section(Figure("a", png(), "x")), section(Figure("a", png(), "x"), name="b")]
        )
    with pytest.raises(ValueError, match=r"more than once \['one'\]"):
        write_report(report_runs, tmp_path, [section(), section()])
    with pytest.raises(ValueError, match="`a` must be a PNG"):
        write_report(report_runs, tmp_path, [section(Figure("a", b"GIF89a", "x"))])
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_told(report_runs: Sequence[RunData], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for write in (build_report, partial(write_report, sections=[])):
        with pytest.raises(ConfigError, match=r"file` cannot be written|cannot be written to `.*file`"):
            write(report_runs, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def shortened(run: Path, folder: Path) -> Path:
    """A copy of a run that logged its evaluations and one record of hardness: few pictures."""
    shutil.copytree(run, folder, symlinks=True)
    for name, kept in (("metrics.jsonl", '"kind": "evaluation"'), ("hardness.jsonl", '"step": 1,')):
        lines = (run / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(line for line in lines if kept in line))
    return folder


def test_without_its_data_a_run_still_has_a_page(
    run_folders: dict[str, Path], hostile_shards: Path, tmp_path: Path
) -> None:
    """The data folder is gone: results and curves are there, and why nothing else is."""
    folder = shortened(run_folders["gca_hng"], tmp_path / "moved")
    for config in (folder / "config.yaml", *folder.glob("step-*/config.yaml")):
        config.write_text(config.read_text().replace(str(hostile_shards), str(tmp_path / "gone")))
    page = parsed(build_report([read_run(folder, "moved")], tmp_path / "out"))
    assert [s["id"] for s in page.all("section")] == ["results", "curves", "hardness", "not-embedded"]
    assert "could not be embedded" in page.text and f"{tmp_path / 'gone'}" in page.text


def test_one_run_without_a_checkpoint_does_not_hide_the_others(report_page: Path) -> None:
    page = parsed(report_page)
    names = ["results", "curves", "hardness", "not-embedded", "gallery", "map", "classes", "variance"]
    assert [s["id"] for s in page.all("section")] == names
    assert "has no checkpoint" in page.text and "1 steps, in epoch" in page.text
    assert "; not evaluated yet: begun" in page.text and "Left out:" not in page.text


def test_a_run_that_has_not_begun_has_a_page(report_runs: Sequence[RunData], tmp_path: Path) -> None:
    empty = replace(report_runs[0], folder=tmp_path / "none", rows=[], hardness=[], results=None)
    page = parsed(build_report([empty], tmp_path / "out"))
    assert [s["id"] for s in page.all("section")] == ["results", "not-embedded"]
    assert "not begun" in page.text


def test_missing_packages_are_named_before_any_work(
    report_runs: Sequence[RunData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"needs scikit-learn, which is not installed.*pip install 'gcahng\[report\]'"):
        build_report(report_runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_are_named_by_what_tells_them_apart(run_folders: dict[str, Path], tmp_path: Path) -> None:
    assert short_names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert short_names([Path("/r/0/a"), Path("/r/1/a"), Path("/r/1/b")]) == ["0/a", "1/a", "1/b"]
    folders = list(run_folders.values())
    assert [run.name for run in read_runs(folders)] == ["baseline", "gca_hng"]
    assert [run.name for run in read_runs(folders, ["x", "y"])] == ["x", "y"]
    with pytest.raises(ConfigError, match="got .*baseline more than once"):
        read_runs([folders[0], folders[0] / ".." / "baseline"])
    for names in (["x"], ["x", "x"], ["x", " "]):
        with pytest.raises(ConfigError, match=rf"one name per run, all different.*expected 2, got {len(names)}"):
            read_runs(folders, names)
    with pytest.raises(ConfigError, match="is no run folder: expected it to hold config.yaml"):
        read_runs([tmp_path])


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_folder([Path("runs/a")]) == Path("runs/a/report")
    assert default_folder([Path("runs/0/a"), tmp_path / "runs" / "1" / "a"]) == Path("runs/report")
    assert default_folder([Path("/elsewhere/a")]) == Path("/elsewhere/a/report")


Launch = Callable[..., int]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launch:
    """`launch/report.py` with arguments; returns the exit status."""

    def call(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(command.main)
        return int(ended.value.code or 0)

    return call


def test_command_line(
    launch: Launch, run_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    folders = [shortened(folder, tmp_path / name) for name, folder in run_folders.items()]
    assert launch(*folders, "--out", out, "--no-embeddings", "--names", "A", "B <i>") == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    page = parsed(out / "report.html")
    assert [s["id"] for s in page.all("section")] == ["results", "curves", "hardness"]
    assert "A, B <i>" in page.text


def test_command_line_refuses_clearly(
    launch: Launch, run_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path) == 2
    assert capsys.readouterr().err.strip().startswith(f"error: `{tmp_path}` is no run folder")
    assert launch() == 2
    assert "the following arguments are required: RUN" in capsys.readouterr().err
    assert launch(run_folders["baseline"], "--queries", 0, "--out", tmp_path / "out") == 2
    assert "queries to show must be at least 1: got 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
