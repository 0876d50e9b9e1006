"""Encoded bytes to an RGB image, with nothing but JPEG, PNG and WebP let in."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gcahng.data.images.jpeg import MAX_SCANS, START, decode_faultless_jpeg, has_too_many_scans
from gcahng.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
"""Default limit of a decoded image: 150 MB in memory."""

_REPAIR = "Replace the file and convert again, or let unreadable images be skipped."


def decode_image(content: bytes, *, name: str, max_pixels: int = MAX_PIXELS, repair: str = _REPAIR) -> Image.Image:
    """Decode an image.

    Transparent pixels are put on white, 16-bit grey keeps its upper 8 bits, of an animation the
    first picture is taken. EXIF rotation is not applied: the benchmarks' published results are of
    the pixels as stored.

    Args:
        content: The encoded file.
        name: What the error calls the image, such as its shard and key.
        max_pixels: Width x height above which an image is refused before its pixels are decoded.
        repair: What the error advises.
    Returns:
        Image of mode RGB, loaded.
    Raises:
        DataError: The content is of another format, cut or damaged, or has too many pixels.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} has too many pixels ({error}). {repair}") from None
    except Exception:  # decoders raise what they please on damaged headers
        raise DataError(
            f"{name} is no image: expected {', '.join(FORMATS)}, got {len(content)} bytes that "
            f"begin with {content[:8]!r}. {repair}"
        ) from None
    if image.width * image.height > max_pixels:
        raise DataError(
            f"{name} has too many pixels: expected at most {max_pixels}, got {image.width} x {image.height}. {repair}"
        )
    if image.format == "JPEG" and has_too_many_scans(content):
        raise DataError(f"{name} has too many scans: expected a JPEG of at most {MAX_SCANS}. {repair}")
    try:
        image.load()
        return _to_rgb(image)
    except Exception as error:  # OSError, SyntaxError, zlib.error, struct.error, ...
        raise DataError(
            f"{name} cannot be decoded as {image.format}, {len(content)} bytes ({error}). {repair}"
        ) from None


def decode_picture(content: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image | NDArray[np.uint8]:
    """Decode an image for training, where speed matters most.

    The pixels are those of `decode_image`, which also decides on every file that is not without fault.

    Args:
        content: The encoded file.
        name: What the error calls the image, such as its shard and key.
        max_pixels: Width x height above which an image is refused before its pixels are decoded.
    Returns:
        Of a JPEG an array (H, W, 3) uint8; of others an image of mode RGB.
    Raises:
        DataError: The content is of another format, cut or damaged, or has too many pixels.
    """
    pixels = decode_faultless_jpeg(content, max_pixels=max_pixels)
    if pixels is not None:
        return pixels
    image = decode_image(content, name=name, max_pixels=max_pixels)
    # All JPEGs as arrays, whoever decoded them: arrays and images are resized by different kernels.
    return np.array(image) if content.startswith(START) else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        pixels: np.ndarray[Any, Any] = np.asarray(image)
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        pixels_rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, pixels_rgba).convert("RGB")
    return image.convert("RGB")
