"""Names of classes, keys, runs and folders that are markup, or that end a script, a style or an attribute: the page
shows them as text, and its pictures have names of their own."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_cases import convert_patterns, draw_patterns, train

from gcahng.report.build import build_report
from gcahng.report.run_data import read_run

HOSTILE = (
    "<script>alert(1)<&slash;script>",
    "<svg onload=alert(1)>",
    "<img src=x onerror=alert(1)>",
    "\"><b onmouseover='alert(1)'>",
    "' style=x onclick=alert(1) '",
    "{{ 7 * 191 }}{% raw %}",
    "$\\frac{1}{$",
    "--><!--",
    "]]><![CDATA[",
    "<style>*{display:none}<&slash;style>",
    "=cmd|' calc'!A0",
    "a\u202eb\u2066c",
    "\u2028\u2029",
    "javascript:alert(1)",
    "&lt;b&gt;&#60;",
    "\x1b[2J\x07",
)
ALLOWED = {"html", "head", "meta", "title", "link", "style", "body", "header", "p", "h1", "h2", "h3", "ul", "ol", "li"}
ALLOWED |= {"dl", "dt", "dd", "div", "nav", "a", "main", "section", "figure", "figcaption", "img", "table", "caption"}
ALLOWED |= {"thead", "tbody", "tr", "th", "td", "footer", "code", "br", "span", "b", "strong", "em"}


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on classes of these names."""
    folder = tmp_path_factory.mktemp("hostile-pages")
    images = draw_patterns(folder / "images", num_classes=len(HOSTILE))
    for number, name in enumerate(HOSTILE):
        # A slash cannot stand in a folder's name; another letter like it stands for it.
        (images / f"hue-{number:02d}").rename(images / name.replace("<&slash;", "<\u2215"))
    train(
        convert_patterns(images, folder / "shards"),
        folder / "run",
        {"graph.enabled": False, "generation.enabled": False},
    )
    return folder / "run"


def test_nothing_of_a_name_becomes_markup(run_folder: Path, tmp_path: Path) -> None:
    run = read_run(run_folder, HOSTILE[1])
    config = replace(run.config, loss=replace(run.config.loss, metric="x:</script><script>alert(1)</script>"))
    rows = [row | {"kind": row["kind"], "</style><b>": 1.5} for row in run.rows]
    hostile = replace(run, name="</title></style></script><script>alert(1)</script>", config=config, rows=rows)
    text = build_report([run, hostile], tmp_path / "out").read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= ALLOWED
    assert [tag for tag, _ in page.tags].count("style") == 1
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag != "a" or str(attributes["href"]).startswith("#")
        assert tag != "img" or str(attributes["src"]).startswith("data:image/png;base64,")
    assert "7 * 191" in page.text and str(7 * 191) not in page.text
    assert not {"\u202e", "\u2066", "\x1b", "\x07"} & set(text)
    assert "default-src 'none'" in text
    names = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert names and all(name.removesuffix(".png").replace("-", "").isalnum() and name.isascii() for name in names)
    shown = [name for name in HOSTILE if name.replace("<&slash;", "<\u2215") in page.text]
    assert len(shown) >= 3, "no name was shown, so nothing was tried"
