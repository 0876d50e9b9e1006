"""The fast way for JPEGs: equal to Pillow's pixels, and out of the way wherever Pillow has to decide."""

import io

import numpy as np
import pytest
from PIL import Image

from gcahng.data.images import jpeg
from gcahng.data.images.decode import decode_image, decode_picture
from gcahng.data.images.jpeg import decode_faultless_jpeg
from gcahng.errors import DataError

KINDS = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True},
    {"optimize": True, "restart_marker_rows": 1},
    {"quality": 20},
    {"quality": 98},
]


def photo(width: int = 140, height: int = 101, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8))
    return coarse.resize((width, height)).convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fast(content: bytes, max_pixels: int = 10**6) -> np.ndarray | None:
    return decode_faultless_jpeg(content, max_pixels=max_pixels)


def slow(content: bytes) -> np.ndarray:
    return np.asarray(decode_image(content, name="s"))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("size", [(140, 101), (16, 16), (1, 1), (17, 9), (500, 375)])
def test_pixels_equal_those_of_pillow(options, size):
    content = encode(photo(2, 2).resize(size) if size == (1, 1) else photo(*size), **options)
    pixels = fast(content)
    assert pixels is not None and pixels.flags.writeable  # torch wraps it without a copy
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, slow(content))


def test_grey_becomes_rgb():
    content = encode(photo(mode="L"))
    assert np.array_equal(fast(content), slow(content))


def test_orientation_is_left_as_stored():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(photo(), exif=exif)
    assert np.array_equal(fast(content), slow(content))
    assert fast(content).shape == (101, 140, 3)


def test_other_colours_and_formats_are_pillows():
    assert fast(encode(photo(mode="CMYK"))) is None
    for kind in ("PNG", "WEBP"):
        assert fast(encode(photo(), kind)) is None
    assert fast(b"") is None and fast(b"\xff\xd8\xff") is None


def test_cut_files_are_pillows():
    """libjpeg-turbo itself fills up with grey and only warns."""
    content = encode(photo())
    for length in (len(content) // 2, len(content) - 40, len(content) - 2, 30):
        assert fast(content[:length]) is None


def test_files_that_pillow_tolerates_keep_its_pixels():
    content = encode(photo())
    odd = content[:-2] + b"\1\2\3" + content[-2:]  # bytes that belong to nothing before the end
    assert fast(odd) is None
    assert np.array_equal(decode_picture(odd, name="s"), slow(odd))


def test_flipped_and_lost_bytes_are_judged_as_pillow_judges_them():
    rng = np.random.default_rng(0)
    sources = [encode(photo(60, 45), **options) for options in KINDS[:5]] + [encode(photo(60, 45, "L"))]
    equal = refused = 0
    for turn in range(600):
        damaged = bytearray(sources[turn % len(sources)])
        if turn % 2:
            for place in rng.integers(0, len(damaged), 2):
                damaged[place] = rng.integers(0, 256)
        else:
            start = rng.integers(0, len(damaged))
            del damaged[start : start + rng.integers(1, 30)]
        pixels = fast(bytes(damaged))
        if pixels is None:
            refused += 1
        else:
            assert np.array_equal(pixels, slow(bytes(damaged)))
            equal += 1
    assert equal > 50 and refused > 50


def test_the_limit_of_pixels_comes_before_decoding():
    content = bytearray(encode(photo(40, 30)))
    assert fast(bytes(content), max_pixels=1200) is not None
    assert fast(bytes(content), max_pixels=1199) is None
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"  # says that it has 65280 x 65280 pixels
    with pytest.raises(DataError, match=r"^s has too many pixels"):
        decode_picture(bytes(content), name="s")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_without_the_library_pillow_gives_the_same_arrays(mode, monkeypatch):
    content = encode(photo(mode=mode))
    expected = decode_picture(content, name="s")
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert fast(content) is None
    pixels = decode_picture(content, name="s")
    assert isinstance(pixels, np.ndarray) and pixels.flags.writeable
    assert np.array_equal(pixels, expected) and np.array_equal(pixels, slow(content))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_stay_images(kind):
    content = encode(photo(), kind)
    picture = decode_picture(content, name="s")
    assert isinstance(picture, Image.Image) and np.array_equal(picture, slow(content))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cut_image_is_named(kind):
    content = encode(photo(), kind)
    with pytest.raises(DataError, match=rf"^sample 7 cannot be decoded as {kind}"):
        decode_picture(content[: len(content) // 2], name="sample 7")
