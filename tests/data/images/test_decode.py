"""Decoding: what is let in, how it becomes RGB, and what is said of the rest."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from gcahng.data.images.decode import decode_image
from gcahng.errors import DataError


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("L", "PNG"), ("L", "JPEG"),
        ("1", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("LA", "PNG"), ("RGBA", "WEBP"),
    ],
)  # fmt: skip
def test_every_kind_becomes_rgb(mode, kind):
    decoded = decode_image(encode(photo(mode), kind), name="x")
    assert decoded.mode == "RGB" and decoded.size == (40, 30)


def test_pixels_are_those_of_the_file():
    assert np.array_equal(decode_image(encode(photo(), "PNG"), name="x"), photo())
    grey = np.asarray(decode_image(encode(photo("L"), "PNG"), name="x"))
    assert np.array_equal(grey, np.asarray(photo("L"))[..., None].repeat(3, axis=2))


def test_transparent_pixels_are_white():
    image = photo("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[0, 255]], 30, 0).repeat(20, 1).astype(np.uint8)))
    decoded = np.asarray(decode_image(encode(image, "PNG"), name="x"))
    assert (decoded[:, :20] == 255).all()
    assert np.array_equal(decoded[:, 20:], np.asarray(photo())[:, 20:])


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    decoded = decode_image(encode(image, "PNG", transparency=0), name="x")
    assert np.asarray(decoded).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_sixteen_bit_grey_keeps_its_upper_bits():
    deep = np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)
    decoded = decode_image(encode(Image.fromarray(deep), "PNG"), name="x")
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 0, 1, 156, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_image_is_named(kind):
    content = encode(photo(size=(200, 200)), kind)
    with pytest.raises(DataError, match=rf"^sample 7 cannot be decoded as {kind}|^sample 7 is no"):
        decode_image(content[: len(content) // 2], name="sample 7")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_flipped_bytes_never_escape_as_another_error(kind):
    content = encode(photo(size=(60, 60)), kind)
    rng = np.random.default_rng(0)
    named = 0
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(damaged), 700), 4):
            damaged[place] = rng.integers(0, 256)
        try:
            decode_image(bytes(damaged), name="sample 7")
        except DataError as error:
            named += str(error).startswith("sample 7")
    assert named > 20


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "EPS", "PPM"])
def test_another_format_is_refused(kind):
    with pytest.raises(DataError, match=r"^s is no image: expected JPEG, PNG, WEBP, got \d+ bytes"):
        decode_image(encode(photo(), kind), name="s")


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_bytes_that_are_no_image_are_refused(content):
    with pytest.raises(DataError, match=rf"^s is no image: .*begin with {content[:8]!r}"):
        decode_image(content, name="s")


def test_the_limit_of_pixels_is_a_parameter():
    content = encode(photo(), "PNG")
    assert decode_image(content, name="s", max_pixels=1200).size == (40, 30)
    with pytest.raises(DataError, match=r"^s has too many pixels: .* at most 1199, got 40 x 30"):
        decode_image(content, name="s", max_pixels=1199)


@pytest.mark.parametrize("side", [10_000, 14_000])
def test_a_bomb_is_refused_before_it_is_decoded(side):
    """A few kilobytes that would unfold to hundreds of megabytes; PIL itself only warns of one."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * (side * 3 + 1) * 4)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body
        content += struct.pack(">I", zlib.crc32(kind + body))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=r"^sample 7 has too many pixels"):
            decode_image(content, name="sample 7")
