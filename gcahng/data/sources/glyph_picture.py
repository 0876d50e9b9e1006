"""Draws one glyph as a small grey PNG, black on white.

One em is as wide as the picture without its margins, for every character, and the ink's box is
centred; only glyphs larger than that are shrunk to fit. So size tells a c from a C and a full stop
from a bullet, as in print, while the place on the line does not count (and a random crop could not
destroy it). Scaling every ink box to the same size would make those pairs the same picture, and
would blow the dot of a full stop up to a disk.
"""

import io
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gcahng.data.sources.glyph_fonts import code_text
from gcahng.errors import DataError

_MARGIN = 1 / 16  # of the picture, on each side
_SUPERSAMPLING = 4  # drawn so many times larger, then averaged: hinting leaves no trace


def draw_glyph(font: Path, code_point: int, size: int) -> bytes:
    """The encoded picture.

    Args:
        font: TrueType font file.
        code_point: A character that the font has.
        size: Width and height in pixels.

    Raises:
        DataError: The font cannot be loaded, or draws nothing for the character.
    """
    inside = round(size * (1 - 2 * _MARGIN) * _SUPERSAMPLING)
    ink = _ink(_load_font(font, inside), chr(code_point))
    if ink is None:
        raise DataError(
            f"Font {font} draws nothing for {code_text(code_point)}: expected ink, because the "
            "outline is not empty. Reinstall the fonts."
        )
    largest = max(ink.size)
    if largest > inside:
        width, height = (max(1, round(side * inside / largest)) for side in ink.size)
        ink = ink.resize((width, height), Image.Resampling.BOX)
    side = size * _SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    canvas.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    picture = canvas.reduce(_SUPERSAMPLING).point(lambda value: 255 - value)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _ink(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    left, top, right, bottom = font.getbbox(text)
    width, height = int(right - left), int(bottom - top)
    if width <= 0 or height <= 0:
        return None
    # One pixel more on each side: getbbox rounds.
    image = Image.new("L", (width + 2, height + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), text, fill=255, font=font)
    box = image.getbbox()
    return image.crop(box) if box else None


@lru_cache(maxsize=64)
def _load_font(font: Path, pixels_per_em: int) -> ImageFont.FreeTypeFont:
    try:
        # The basic layout: a shaping engine, where present, would join or reorder characters.
        return ImageFont.truetype(font, pixels_per_em, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"Font {font} cannot be loaded ({error}). Reinstall the fonts.") from None
