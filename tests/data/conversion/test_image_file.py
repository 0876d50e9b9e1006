"""Images on their way into a tar: their own bytes, or a scaled JPEG that decodes to what it should."""

import io

import numpy as np
import pytest
from conversion_cases import encoded
from PIL import Image

from gcahng.data.conversion.image_file import EncodeSettings, as_member
from gcahng.data.images.decode import decode_image
from gcahng.errors import DataError, InputError


def photograph(width: int, height: int) -> Image.Image:
    """A picture with gradients and edges, as JPEG likes them."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    channels = [x, y, (x + y) / 2 + 0.3 * ((x * 5).astype(int) % 2)]
    return Image.fromarray((np.stack(channels, axis=-1).clip(0, 1) * 255).astype(np.uint8))


def as_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def mean_difference(first: Image.Image, second: Image.Image) -> float:
    assert (first.size, first.mode) == (second.size, second.mode)
    return float(np.abs(np.asarray(first, dtype=float) - np.asarray(second, dtype=float)).mean())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("encode", [None, EncodeSettings(24, 50), EncodeSettings(100, 50)])
def test_images_that_are_small_enough_keep_their_bytes(kind: str, encode: EncodeSettings | None) -> None:
    content = encoded(3, kind, (24, 20))
    assert as_member(content, encode) == (content, {"JPEG": "jpg", "PNG": "png"}[kind])


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 300), (100, 75)), ((300, 400), (75, 100)), ((101, 100), (100, 99)), ((1000, 2), (100, 1))],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_longer_side_is_scaled(size: tuple[int, int], expected: tuple[int, int], kind: str) -> None:
    content = as_bytes(photograph(*size), kind)
    image, extension = as_member(content, EncodeSettings(100, 90))
    decoded = decode_image(image, name="the image")
    assert (extension, decoded.size) == ("jpg", expected)
    assert image.startswith(b"\xff\xd8\xff")
    if min(expected) > 10:
        wanted = decode_image(content, name="the original").resize(expected, Image.Resampling.LANCZOS)
        assert mean_difference(decoded, wanted) < 3  # of 255: what JPEG of quality 90 loses
    assert as_member(content, EncodeSettings(100, 90)) == (image, extension)


def test_without_a_largest_side_every_image_is_encoded_anew() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        content = as_bytes(photograph(60, 40), kind)
        image, extension = as_member(content, EncodeSettings(None, 90))
        assert extension == "jpg"
        assert mean_difference(decode_image(image, name="a"), decode_image(content, name="b")) < 3


def test_quality_decides_the_size() -> None:
    content = as_bytes(photograph(300, 200), "PNG")
    sizes = [len(as_member(content, EncodeSettings(None, quality))[0]) for quality in (10, 50, 90)]
    assert sizes == sorted(sizes)
    assert sizes[2] > 1.5 * sizes[0]


def test_rotation_is_not_applied_and_not_kept() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    content = as_bytes(photograph(400, 200), "JPEG", exif=exif, comment=b"by the sea", quality=95)
    image, _ = as_member(content, EncodeSettings(100, 90))
    written = Image.open(io.BytesIO(image))
    assert written.size == (100, 50)
    assert not written.getexif()
    assert set(written.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert mean_difference(decode_image(image, name="a"), photograph(400, 200).resize((100, 50))) < 4


def test_colour_is_stored_at_half_resolution() -> None:
    image, _ = as_member(as_bytes(photograph(300, 200), "PNG"), EncodeSettings(100, 90))
    layers = Image.open(io.BytesIO(image)).layer  # type: ignore[attr-defined]
    assert [(horizontal, vertical) for _, horizontal, vertical, _ in layers] == [(2, 2), (1, 1), (1, 1)]


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image, _ = as_member(as_bytes(clear, "PNG"), EncodeSettings(32, 90))
    assert np.asarray(decode_image(image, name="a")).min() >= 254


def test_damaged_images_are_found_before_they_are_scaled() -> None:
    with pytest.raises(DataError, match="the file cannot be decoded as JPEG"):
        as_member(as_bytes(photograph(400, 300), "JPEG")[:-500], EncodeSettings(100, 90))


@pytest.mark.parametrize(
    ("max_side", "quality", "message"),
    [
        (15, 90, "`max_side` must be at least 16 pixels, got 15"),
        (None, 0, "`quality` must be from 1 to 100, got 0"),
        (320, 101, "`quality` must be from 1 to 100, got 101"),
    ],
)
def test_settings_out_of_range(max_side: int | None, quality: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EncodeSettings(max_side, quality)


def test_image_that_is_too_long_for_a_jpeg() -> None:
    content = as_bytes(Image.new("RGB", (1, 65501)), "PNG")
    with pytest.raises(DataError, match=r"at most 65500 pixels, got 1 x 65501\. Pass --max-side\."):
        as_member(content, EncodeSettings(max_side=None, quality=90))
    image = Image.open(io.BytesIO(as_member(content, EncodeSettings(max_side=320, quality=90))[0]))
    assert image.size == (1, 320)
