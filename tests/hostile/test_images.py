"""Images made to exhaust a reader: refused by what their headers say, before pixels are decoded."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import pytest
from fuzzing import bounded_memory, limited
from PIL import Image

from gcahng.data.images.decode import decode_image, decode_picture
from gcahng.data.images.jpeg import MAX_SCANS, has_too_many_scans
from gcahng.errors import DataError

READERS = (decode_image, decode_picture)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    """A PNG of 8-bit RGB whose header says this size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels or bytes((3 * min(width, 9) + 1) * min(height, 9))))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + data + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def webp(width: int, height: int) -> bytes:
    """A lossless WebP whose header says another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "WEBP", lossless=True)
    content = bytearray(buffer.getvalue())
    bits = (width - 1) | (height - 1) << 14
    content[21:25] = struct.pack("<I", bits)
    return bytes(content)


def scans(count: int, side: int = 4000) -> bytes:
    """A progressive JPEG in which one empty refinement of all pixels is said again and again."""
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "content",
    [png(100_000, 100_000), png(2**31 - 1, 2**31 - 1), png(50_000_001, 1), jpeg(65_500, 65_500), webp(16_383, 16_383)],
    ids=["png", "png-largest", "png-one-row", "jpeg", "webp"],
)
def test_huge_sizes_are_refused_unread(read: Callable[..., object], content: bytes) -> None:
    with bounded_memory(more=200 << 20), limited(), pytest.raises(DataError, match="the image has too many pixels"):
        read(content, name="the image")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_packed_texts_are_not_unpacked_without_end(read: Callable[..., object], kind: bytes) -> None:
    """A hundred megabytes of zeros in a hundred kilobytes, before the pixels."""
    packed = zlib.compress(bytes(100 << 20), 9)
    head = {b"zTXt": b"key\0\0", b"iCCP": b"key\0\0", b"iTXt": b"key\0\1\0\0\0"}[kind]
    content = png(4, 4, *[chunk(kind, head + packed)] * 4)
    found = None
    with bounded_memory(more=300 << 20), limited(), suppress(DataError):
        found = read(content, name="the image")
    assert found is None or getattr(found, "size", None) == (4, 4)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    content = scans(5000)
    assert len(content) < 4 << 20 and has_too_many_scans(content)
    for read in READERS:
        with limited(), pytest.raises(DataError, match=f"has too many scans: expected a JPEG of at most {MAX_SCANS}"):
            read(content, name="the image")


def test_scans_are_counted_in_the_picture_alone() -> None:
    """Comments, thumbnails and films behind the picture hold such bytes by chance."""
    content = scans(3, side=32)
    noise = b"\xff\xda" * (2 * MAX_SCANS)
    comment = b"\xff\xfe" + struct.pack(">H", len(noise) + 2) + noise
    dressed = content[:2] + comment + content[2:] + noise
    assert not has_too_many_scans(content) and not has_too_many_scans(dressed)
    assert decode_image(dressed, name="the image").size == (32, 32)
    cut = scans(2 * MAX_SCANS, side=32)
    assert has_too_many_scans(cut) and has_too_many_scans(cut[:-2])


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM", "EPS", "PDF", "TGA"])
def test_other_formats_have_no_reader(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, kind)
    for read in READERS:
        with pytest.raises(DataError, match="the image is no image: expected JPEG, PNG, WEBP"):
            read(buffer.getvalue(), name="the image")
