"""What a section of the report is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from gcahng.report.run_data import RunData


@dataclass(frozen=True)
class Figure:
    """A picture of the report.

    Attributes:
        name: File name of the PNG without its ending: lower case, digits, "-".
        png: The file's bytes.
        alt: What it shows, for those who cannot see it.
        caption: Plain text below it; escaped by the page.
        css_width: Width in CSS pixels at which its text is as large as the page's; it shrinks on narrower screens.
    """

    name: str
    png: bytes
    alt: str
    caption: str = ""
    css_width: int = 380


@dataclass(frozen=True)
class Table:
    """A table of the report; texts are escaped by the page.

    Attributes:
        columns: Heads.
        rows: One text per column each.
        caption: Plain text.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """One heading of the report and what stands below.

    Attributes:
        name: Anchor: lower case, digits, "-".
        title: Heading.
        intro: A sentence or two: what is shown, and how to read it. Escaped by the page.
        parts: Figures, tables, and markup (made by a template with autoescape) in order.
    """

    name: str
    title: str
    intro: str
    parts: Sequence[Figure | Table | Markup]


MakeSection = Callable[[Sequence[RunData]], Section | None]
"""Makes a section from the runs, None where they have nothing for it."""
