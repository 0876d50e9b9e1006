"""Decoded pictures: cut, scaled and turned into bytes.

A picture is a Pillow image or, of a JPEG, an array (H, W, 3) uint8. Both are resized bilinearly with antialiasing:
images by Pillow, arrays by torch, whose kernel rounds the same weights to 16 bits and takes a third of the time. Its
values differ from Pillow's by at most 1, and are the same on every processor. Boxes are (left, top, width, height) in
pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gcahng.data.images.decode import MAX_PIXELS
from gcahng.errors import DataError

Box = tuple[int, int, int, int]
Picture = Image.Image | NDArray[np.uint8]


def size_of(picture: Picture) -> tuple[int, int]:
    """Width and height in pixels."""
    if isinstance(picture, Image.Image):
        return picture.size
    return picture.shape[1], picture.shape[0]


def crop(picture: Picture, box: Box) -> Picture:
    """The part of a picture inside a box."""
    left, top, width, height = box
    if (width, height) == size_of(picture):
        return picture
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + width, top + height))
    return picture[top : top + height, left : left + width]


def resize(picture: Picture, size: tuple[int, int]) -> Picture:
    """The picture in another width and height, bilinear with antialiasing."""
    if size_of(picture) == size:
        return picture
    if isinstance(picture, Image.Image):
        return picture.resize(size, Image.Resampling.BILINEAR)
    channels_first = torch.from_numpy(picture).permute(2, 0, 1)[None]
    resized = F.interpolate(channels_first, size=size[::-1], mode="bilinear", antialias=True, align_corners=False)
    return np.asarray(resized[0].permute(1, 2, 0))


def resize_short_side(picture: Picture, size: int) -> Picture:
    """The picture with its shorter side `size` pixels long.

    Raises:
        DataError: The longer side would get too long.
    """
    width, height = size_of(picture)
    short, long = sorted((width, height))
    if short == size:
        return picture
    new_long = size * long // short
    if size * new_long > MAX_PIXELS:
        raise DataError(
            f"the image has {width} x {height} pixels, too elongated to resize: "
            f"expected at most {MAX_PIXELS} pixels after the short side became {size}, got "
            f"{size * new_long}. Crop it or leave it out."
        )
    return resize(picture, (size, new_long) if width <= height else (new_long, size))


def to_bytes(picture: Picture, *, mirrored: bool) -> Tensor:
    """(3, H, W) uint8.

    Args:
        mirrored: Left and right exchanged.
    """
    pixels = np.asarray(picture)
    if mirrored:
        pixels = pixels[:, ::-1]
    # At most one copy: the array of a Pillow image is read-only and channels come last.
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
