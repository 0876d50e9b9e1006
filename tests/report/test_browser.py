"""The page in a real browser: nothing fails, every picture loads, it can be read on a desk and on a telephone."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from report_cases import HOSTILE_CLASSES, HOSTILE_RUN

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (1280, 400)
SMALLEST_TEXT_PX = 14
# Of the width at which a picture's text is as large as the page's.
SMALLEST_SHARE = 0.9
# WCAG 2, level AA.
CONTRAST = 4.5


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium that is installed on this machine."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright (extra `test`) is not installed")
    with playwright.sync_playwright() as started:
        # Its own sandbox does not start in containers; the page is ours.
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@dataclass
class Opened:
    """A page, and what it complained of."""

    page: "Page"
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(
    scope="module", params=[(w, s) for w in WIDTHS for s in ("light", "dark")], ids=lambda p: f"{p[0]}-{p[1]}"
)
def opened(request: pytest.FixtureRequest, browser: "Browser", report_page: Path) -> Iterator[Opened]:
    """The report, opened from its file."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found = Opened(page)
    page.on("console", lambda message: found.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.complaints.append(f"error: {error}"))
    page.on("requestfailed", lambda failed: found.complaints.append(f"failed: {failed.url[:100]}"))
    page.on("dialog", lambda dialog: (found.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda sent: found.requests.append(sent.url))
    page.goto(report_page.resolve().as_uri())
    page.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
    yield found
    page.close()


def test_opens_without_complaint_and_asks_for_nothing(opened: Opened, report_page: Path) -> None:
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [report_page.resolve().as_uri()]


def test_every_picture_is_decoded_and_seen(opened: Opened, report_page: Path) -> None:
    sizes = opened.page.evaluate(
        "[...document.images].map((i) => [i.complete, i.naturalWidth, i.clientWidth, i.clientHeight])"
    )
    assert len(sizes) == len(list((report_page.parent / "pictures").glob("*.png"))) > 30
    for complete, natural, width, height in sizes:
        assert complete and natural > 0 and width > 100 and height > 40


def test_nothing_is_wider_than_the_page(opened: Opened) -> None:
    """What is wide scrolls in a box of its own."""
    assert opened.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    outside = opened.page.evaluate(
        """[...document.body.querySelectorAll('*')]
            .filter((e) => !e.closest('.scroll') || e.classList.contains('scroll'))
            .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 0.5)
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []


def test_a_wide_table_can_be_scrolled_with_its_first_column_in_sight(opened: Opened) -> None:
    left, moved, focus = opened.page.evaluate(
        """(() => {
            const box = document.querySelector('#results .scroll');
            const cell = box.querySelector('tbody th'), left = cell.getBoundingClientRect().left;
            box.scrollLeft = 1000;
            const result = [box.scrollLeft, cell.getBoundingClientRect().left - left, box.tabIndex];
            box.scrollLeft = 0;
            return result;
        })()"""
    )
    assert opened.page.viewport_size is not None
    wide = opened.page.viewport_size["width"] == max(WIDTHS)
    assert left == 0 if wide else left > 50
    assert abs(moved) < 1 and focus == 0


def test_text_is_large_enough(opened: Opened) -> None:
    texts = opened.page.evaluate(
        """(() => {
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
            for (let node = walker.nextNode(); node; node = walker.nextNode())
                if (node.textContent.trim())
                    found.push([parseFloat(getComputedStyle(node.parentElement).fontSize), node.textContent.trim()]);
            return found;
        })()"""
    )
    assert len(texts) > 100
    assert [text for size, text in texts if size < SMALLEST_TEXT_PX] == []


def test_text_in_pictures_is_not_shrunk(opened: Opened) -> None:
    shares = opened.page.evaluate("[...document.images].map((i) => [i.clientWidth / i.getAttribute('width'), i.alt])")
    assert [(share, alt) for share, alt in shares if not SMALLEST_SHARE <= share <= 1.001] == []
    # Two pixels for each of the page's, for sharp text on good screens.
    assert opened.page.evaluate("Math.min(...[...document.images].map((i) => i.naturalWidth / i.clientWidth))") >= 1.99


def luminance(colour: list[float]) -> float:
    """Relative luminance of an sRGB colour in 0..255, as WCAG defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_its_background(opened: Opened) -> None:
    pairs: list[Any] = opened.page.evaluate(
        """(() => {
            const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
            const found = {};
            for (const e of document.body.querySelectorAll('*')) {
                if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
                let below = e;
                while (below && numbers(getComputedStyle(below).backgroundColor)[3] === 0) below = below.parentElement;
                const colours = [getComputedStyle(e).color, getComputedStyle(below || document.body).backgroundColor];
                found[colours.join('|')] = [...colours.map(numbers), e.tagName + '.' + e.className];
            }
            return Object.values(found);
        })()"""
    )
    assert len(pairs) > 4
    for ink, paper, where in pairs:
        brighter, darker = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= CONTRAST, where


def test_pictures_lie_on_white(opened: Opened) -> None:
    colours = set(
        opened.page.evaluate("[...document.querySelectorAll('figure')].map((f) => getComputedStyle(f).backgroundColor)")
    )
    assert colours == {"rgb(255, 255, 255)"}


def test_hostile_names_are_shown_and_not_run(opened: Opened) -> None:
    text = opened.page.inner_text("body")
    assert HOSTILE_RUN in text
    shown = [name for name in HOSTILE_CLASSES.values() if " ".join(name.split()) in " ".join(text.split())]
    assert shown, "no class with a hostile name is on the page"
    assert opened.page.title().endswith("gcahng report")
    assert opened.page.evaluate("document.querySelectorAll('script, [onerror], [onmouseover]').length") == 0


def test_contents_jump_to_their_sections(opened: Opened) -> None:
    for link in opened.page.query_selector_all("nav a"):
        link.click()
        place = opened.page.evaluate("document.querySelector(location.hash).getBoundingClientRect().top")
        last = opened.page.evaluate("document.documentElement.scrollHeight - window.innerHeight - window.scrollY")
        assert 0 <= place <= 40 or last < 1


def test_the_policy_blocks_what_slips_in(browser: "Browser", report_page: Path, tmp_path: Path) -> None:
    """A script and a picture of the network that were not escaped would still do nothing."""
    slipped = "<main><script>document.title = 'run'</script><img src='https://example.invalid/x.png'>"
    text = report_page.read_text(encoding="utf-8")
    assert text.count("<main>") == 1
    file = tmp_path / "tampered.html"
    file.write_text(text.replace("<main>", slipped), encoding="utf-8")
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(file.as_uri())
    assert page.title().endswith("gcahng report")
    assert len([text for text in complaints if "Content Security Policy" in text]) == 2
    page.close()
