"""How an image file goes into a tar."""

import io

from gcahng.data.images.decode import decode_image

_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}


def as_member(content: bytes) -> tuple[bytes, str]:
    """Bytes and extension ("jpg" or "png") of the tar member for an image.

    The image is decoded completely, by the decoder of training, so that what is written can be
    trained on. JPEG and PNG keep their bytes, whatever the file was called; WebP is encoded again
    as PNG, without loss.

    Raises:
        DataError: The bytes are cut, damaged, of another format, or expand to too many pixels.
    """
    image = decode_image(content, name="the file")
    for magic, extension in _MAGIC.items():
        if content.startswith(magic):
            return content, extension
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue(), "png"
