"""Which faces and characters the data set `glyphs` draws, and the outline of each.

Needs fontTools and, for its fonts, matplotlib: the extra `glyphs`.
"""

import hashlib
import logging
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gcahng.errors import DataError, InputError

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

# cmsy and cmex map letters to symbols and brackets; LastResort draws the name of a block, not the
# character.
_LEFT_OUT_FACES = ("cmsy", "cmex", "LastResort")
_COMPUTER_MODERN = "cm"
_ON_CURVE = 1  # bit of a TrueType point flag; the others do not move the outline
_GRID = 10_000  # outlines are compared in units of 1/10000 em, finer than any of the fonts


@dataclass(frozen=True)
class Glyph:
    """One character of one face.

    Attributes:
        face: Font file name without suffix.
        code_point: The character.
        outline: Identity of the shape, "" where nothing is drawn. Equal for two glyphs exactly
            when their outlines, in units of the em and moved to a common corner, are equal.
    """

    face: str
    code_point: int
    outline: str


def code_text(code_point: int) -> str:
    """Unicode's spelling: `code_text(65) == "U+0041"`."""
    return f"U+{code_point:04X}"


def matplotlib_fonts() -> Path:
    """The font folder inside of the matplotlib package.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise _extra_missing("matplotlib") from None
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def read_glyphs(directory: Path) -> list[Glyph]:
    """All glyphs of all faces in a folder that the data set may use.

    Left out: the faces `cmsy*`, `cmex*` and `LastResort*`; of the other Computer Modern faces
    everything but A-Z, a-z and 0-9, since they put other signs into the slots of other
    characters; private-use code points, which each font fills as it likes.

    Raises:
        InputError: fontTools is not installed.
        DataError: The folder has no usable font or one cannot be read.
    """
    faces = [p for p in sorted(directory.glob("*.ttf")) if not p.stem.startswith(_LEFT_OUT_FACES)]
    if not faces:
        raise DataError(
            f"Font folder {directory}: expected TrueType fonts (*.ttf), got none. Leave out "
            "--source to use the fonts inside of the matplotlib package."
        )
    return [glyph for path in faces for glyph in _read_face(path)]


def _read_face(path: Path) -> Iterator[Glyph]:
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError:
        raise _extra_missing("fontTools") from None
    # fontTools warns about odd dates in some of the faces; they do not matter here.
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    try:
        with path.open("rb") as file, TTFont(file, lazy=True) as font:
            characters, outlines = font.getBestCmap() or {}, _Outlines(font)
            for code_point, name in characters.items():
                if _is_usable(path.stem, code_point):
                    yield Glyph(path.stem, code_point, outlines[name])
    except (TTLibError, KeyError, OSError) as error:
        raise DataError(
            f"Font {path} cannot be read as a TrueType font ({error}). Remove it from the folder."
        ) from None


def _is_usable(face: str, code_point: int) -> bool:
    character = chr(code_point)
    if face.startswith(_COMPUTER_MODERN):
        return character.isascii() and character.isalnum()
    return unicodedata.category(character) not in ("Co", "Cn")


class _Outlines(dict[str, str]):
    """Glyph name -> outline of a font, computed on first use: characters share glyphs."""

    def __init__(self, font: "TTFont") -> None:
        super().__init__()
        self._table: Any = font["glyf"]
        self._grid_per_unit = _GRID / font["head"].unitsPerEm

    def __missing__(self, name: str) -> str:
        points, contour_ends, flags = self._table[name].getCoordinates(self._table)
        outline = ""
        if len(points):
            units = np.array(points.array).reshape(-1, 2)
            # Moved first, rounded then: rounding must not depend on the position.
            grid = np.rint((units - units.min(0)) * self._grid_per_unit).astype("<i4")
            on_curve = np.array(flags, dtype=np.uint8) & _ON_CURVE
            rows = np.column_stack([grid, on_curve]).astype("<i4")
            # Sorted: one font builds a C with cedilla from a C and a cedilla, another the reverse.
            contours = sorted(
                rows[start:stop].tobytes() for start, stop in pairwise([0, *(end + 1 for end in contour_ends)])
            )
            # A shape without width or height has no ink.
            if np.ptp(grid, axis=0).all():
                outline = hashlib.blake2b(b"|".join(contours), digest_size=16).hexdigest()
        self[name] = outline
        return outline


def _extra_missing(package: str) -> InputError:
    return InputError(
        f'The data set "glyphs" needs {package}, which is not installed. Run: pip install "gcahng[glyphs]"'
    )
