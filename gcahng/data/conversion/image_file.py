"""How an image file goes into a tar."""

import io
from dataclasses import dataclass

from PIL import Image

from gcahng.data.images.decode import decode_image
from gcahng.errors import DataError, InputError

_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
_SMALLEST_SIDE = 16  # pixels; below, nothing is left to recognise
# Scaling by more than this begins with a box filter, several times faster and as good to the eye (Pillow's advice).
_REDUCING_GAP = 3.0
_HALF_CHROMA = "4:2:0"
_LARGEST_JPEG_SIDE = 65500  # pixels, of the library that encodes


@dataclass(frozen=True)
class EncodeSettings:
    """How images are encoded anew.

    The new file is a JPEG without metadata, colour at half resolution (4:2:0, as cameras and the web store it: a
    third smaller and faster to decode than full). It holds the pixels as stored, scaled: like everywhere in training,
    an EXIF rotation is not applied.

    Args:
        max_side: Images whose longer side has more pixels are scaled down to it; the others keep their bytes. None
            encodes every image, at its size.
        quality: Of the JPEG, 1 to 100.

    Raises:
        InputError: A value is out of range.
    """

    max_side: int | None
    quality: int

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < _SMALLEST_SIDE:
            raise InputError(f"`max_side` must be at least {_SMALLEST_SIDE} pixels, got {self.max_side}.")
        if not 1 <= self.quality <= 100:
            raise InputError(f"`quality` must be from 1 to 100, got {self.quality}.")


def as_member(content: bytes, encode: EncodeSettings | None = None) -> tuple[bytes, str]:
    """Bytes and extension ("jpg" or "png") of the tar member for an image.

    The image is decoded completely, by the decoder of training, so that what is written can be
    trained on. JPEG and PNG keep their bytes, whatever the file was called, unless `encode` says otherwise; WebP is
    encoded again as PNG, without loss.

    Raises:
        DataError: The bytes are cut, damaged, of another format, or expand to too many pixels; or a side is too
            long for a JPEG.
    """
    image = decode_image(content, name="the file")
    if encode and (encode.max_side is None or max(image.size) > encode.max_side):
        return _as_jpeg(image, encode), "jpg"
    for magic, extension in _MAGIC.items():
        if content.startswith(magic):
            return content, extension
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue(), "png"


def _as_jpeg(image: Image.Image, encode: EncodeSettings) -> bytes:
    longer = max(image.size)
    if encode.max_side is not None:
        width, height = (max(1, round(side * encode.max_side / longer)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    if max(image.size) > _LARGEST_JPEG_SIDE:
        raise DataError(
            f"the image is too long for a JPEG: expected sides of at most {_LARGEST_JPEG_SIDE} pixels, got "
            f"{image.width} x {image.height}. Pass --max-side."
        )
    image.info = {}  # Pillow would write the comment of the old file into the new one
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=encode.quality, subsampling=_HALF_CHROMA)
    return buffer.getvalue()
