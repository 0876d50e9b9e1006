"""JPEG pixels straight from libjpeg-turbo, for files without any fault; others are left to Pillow.

Pillow decodes with the same library, yet takes a fifth longer until the pixels are in an array: it reads through a file
object and stores 4 bytes per pixel. The pixels are the same. Where the library finds anything to remark on (data that
end early, bytes between segments, an unusual layout), Pillow decides what becomes of the file, so that it makes no
difference to the outcome whether this module could be used.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes
    simplejpeg = None

START = b"\xff\xd8\xff"
"""The first bytes of every JPEG."""

# A progressive file comes in about 10 scans, each of which goes through all pixels anew; a file of many empty ones
# keeps a decoder busy for hours.
MAX_SCANS = 100
_SCAN = b"\xff\xda"
# What follows in a scan's data is a marker unless it is a stuffed zero, a restart, or another fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_END = 0xD9
# CMYK and YCCK need the conversions that Pillow has.
_COLOURS = ("YCbCr", "Gray")


def decode_faultless_jpeg(content: bytes, *, max_pixels: int) -> NDArray[np.uint8] | None:
    """The pixels of a JPEG whose decoding raises no question.

    Args:
        content: The encoded file.
        max_pixels: Width x height above which nothing is decoded.
    Returns:
        (H, W, 3) uint8, red, green, blue; None where Pillow has to look at the file.
    """
    if simplejpeg is None or not content.startswith(START) or has_too_many_scans(content):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if width * height > max_pixels or colours not in _COLOURS:
            return None
        # strict: each warning of the library is an error. It would fill up a cut file with grey and only warn.
        pixels: NDArray[Any] = simplejpeg.decode_jpeg(content, colorspace="RGB", strict=True)
    except Exception:  # whatever it is, Pillow finds it too or can do without
        return None
    return pixels


def has_too_many_scans(content: bytes) -> bool:
    """Whether a JPEG has more than `MAX_SCANS` scans."""
    if content.count(_SCAN) <= MAX_SCANS:  # at most as many; thumbnails and what follows a picture may hold more
        return False
    scans, place = 0, 2
    while (match := _MARKER.search(content, place)) is not None and scans <= MAX_SCANS:
        marker, place = content[match.end() - 1], match.end()
        if marker == _END:
            break
        if marker not in _ALONE:
            scans += marker == _SCAN[1]
            place += int.from_bytes(content[place : place + 2], "big")
    return scans > MAX_SCANS
