"""A page to draw images and texts on, in inches from its upper left corner.

matplotlib (extra `report`) is imported on the first use, so training does not need it.
"""

import io
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from gcahng.errors import InputError

# Dark on white, and told apart by most colour-blind readers; marks and line styles say the same without colour.
RIGHT_COLOUR = "#0b7a3b"
WRONG_COLOUR = "#c62828"
QUERY_COLOUR = "#37474f"
TEXT_COLOUR = "#212121"
RIGHT_MARK, WRONG_MARK = "\u2713", "\u2717"

# Both come with matplotlib and hold most alphabets and signs; the others, for scripts of thousands of signs and for
# those of South Asia, help where they are installed.
OWN_FONTS = ("DejaVu Sans", "STIXGeneral")
OTHER_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Noto Sans Devanagari",
    "Noto Sans Bengali",
    "Noto Sans Thai",
    "Unifont",
)
MOST_CHARACTERS = 300  # of a text that is looked at at all


def require_matplotlib() -> None:
    """Raise an InputError that says how to install matplotlib, unless it is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "pictures need matplotlib, which is not installed. Install it with: pip install 'gcahng[report]'"
        ) from error


@lru_cache(maxsize=1)
def fonts() -> tuple[str, ...]:
    """Font families to look a character up in, in turn: those of matplotlib, then what is installed."""
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return OWN_FONTS + tuple(name for name in OTHER_FONTS if name in installed)


@contextmanager
def missing_glyphs_allowed() -> Iterator[None]:
    """Within it, a character without a font is drawn as a box; the picture is still of use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        yield


def printable(text: str) -> str:
    """One line of a text that others wrote: control characters, half pairs and marks of direction are replaced."""
    line = " ".join(text[: 4 * MOST_CHARACTERS].split())[:MOST_CHARACTERS]
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line)


def shorten(name: str, width: float, num_lines: int = 2, measure: Callable[[str], float] = len) -> str:
    """Break a name into a few short lines, at spaces, "_", "/" or "-" where possible.

    Args:
        name: Any text.
        width: Of a line, as `measure` gives it: characters by default.
        num_lines: At most.
        measure: Width of a text.
    Returns:
        The lines; what does not fit ends in an ellipsis.
    """
    lines: list[str] = []
    rest = printable(name)
    while measure(rest) > width and len(lines) < num_lines - 1:
        fitting = _fitting(rest, width, measure)
        cut = max(rest.rfind(mark, 0, fitting) for mark in " _/-") + 1
        # A space right behind what fits is a place to break, too.
        cut = fitting if rest[fitting : fitting + 1] == " " else cut
        cut = cut if cut > 1 else fitting
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if measure(rest) > width:
        rest = rest[: _fitting(rest, width, lambda text: measure(text + "\u2026"))].rstrip() + "\u2026"
    lines.append(rest)
    return "\n".join(lines)


def _fitting(text: str, width: float, measure: Callable[[str], float]) -> int:
    """How many letters of a text fit; at least one."""
    return max(1, bisect_right(range(1, len(text) + 1), width, key=lambda count: measure(text[:count])))


class Canvas:
    """One picture; x to the right and y downwards, in inches."""

    def __init__(self, width: float, height: float, dots_per_inch: int) -> None:
        """
        Args:
            width, height: In inches.
            dots_per_inch: Pixels of an inch.
        Raises:
            InputError: matplotlib is missing.
        """
        require_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Without the global pyplot state: no window system, nothing to close.
        self._figure = Figure(figsize=(width, height), dpi=dots_per_inch, facecolor="white")
        self._agg = FigureCanvasAgg(self._figure)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto", autoscale_on=False)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text as it is: a "$" in a class name is no formula."""
        # Fonts are looked up when drawn: name them here.
        look: dict[str, Any] = {"parse_math": False, "fontfamily": fonts(), "color": TEXT_COLOUR}
        self._axes.text(x, y, text, **(look | style))

    def wrapped(self, text: str, width: float, num_lines: int, **style: Any) -> str:
        """The text in lines that are no wider than `width` inches when drawn in that style."""
        return fitted(self._figure, text, width, num_lines, **style)

    def image(self, image: Image.Image, left: float, top: float, side: float) -> None:
        """Fit an image into a square, uncropped."""
        scale = side / max(image.size)
        width, height = (length * scale for length in image.size)
        x, y = left + (side - width) / 2, top + (side - height) / 2
        self._axes.imshow(image.convert("RGB"), extent=(x, x + width, y + height, y), aspect="auto", zorder=1)

    def frame(self, left: float, top: float, side: float, colour: str, style: str, width: float = 2.4) -> None:
        """Draw the outline of a square."""
        from matplotlib.patches import Rectangle

        outline = Rectangle(
            (left, top), side, side, fill=False, edgecolor=colour, linestyle=style, linewidth=width, zorder=2
        )
        self._axes.add_patch(outline)

    def line(self, x: tuple[float, float], y: tuple[float, float], colour: str, width: float = 0.8) -> None:
        """Draw a straight line."""
        self._axes.plot(x, y, color=colour, linewidth=width)

    def png(self) -> bytes:
        """The picture's file; equal pictures give equal bytes."""
        return png_bytes(self._figure)


def measured(figure: Any, **style: Any) -> Callable[[str], float]:
    """What says how wide a text is, in inches, when drawn on a matplotlib figure in that style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    renderer = FigureCanvasAgg(figure).get_renderer()
    probe = Text(0, 0, "", figure=figure, parse_math=False, fontfamily=fonts(), **style)

    def measure(part: str) -> float:
        probe.set_text(part)
        with missing_glyphs_allowed():
            return float(probe.get_window_extent(renderer).width / figure.dpi)

    return measure


def fitted(figure: Any, text: str, width: float, num_lines: int, **style: Any) -> str:
    """A text in lines that are no wider than `width` inches when drawn on a matplotlib figure in that style."""
    return shorten(text, width, num_lines, measured(figure, **style))


def png_bytes(figure: Any) -> bytes:
    """The PNG file of a matplotlib figure; equal figures give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    with missing_glyphs_allowed():
        # No software version inside.
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write under another name first: a reader never finds half a file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
