"""Training and evaluation transforms of images, and their presets.

A transform returns bytes, (3, H, W) uint8; `normalise` turns a whole batch of them into numbers on
the device. What `train_transform` draws depends on the size of the picture alone.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gcahng.data.draws import Purpose, stream
from gcahng.data.images.picture import Box, Picture, crop, resize, resize_short_side, size_of, to_bytes
from gcahng.data.images.transform_settings import PRESETS, TransformSettings, transform_settings
from gcahng.errors import DataError, InputError

__all__ = [
    "PRESETS",
    "TransformSettings",
    "eval_transform",
    "normalise",
    "train_draws",
    "train_transform",
    "transform_settings",
]

_TRIES = 10


def train_draws(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The random numbers for one training image.

    Args:
        seed: Seed of the run.
        epoch: Counted from 0.
        position: Place of the sample in the epoch over all ranks: batch number x B + index in the
            global batch.
    """
    return np.random.Generator(stream(seed, Purpose.TRANSFORM, epoch, position))


def train_transform(picture: Picture, settings: TransformSettings, draws: np.random.Generator) -> Tensor:
    """Crop, resize and flip at random.

    "random_resized" is a random crop of random area and shape, resized, with the distribution of
    torchvision's RandomResizedCrop; "random" resizes the short side to `train_resize` and crops.

    Args:
        picture: RGB image, or the array of a JPEG.
        settings: Sizes and ranges.
        draws: See `train_draws`.
    Returns:
        (3, crop, crop) uint8.
    Raises:
        DataError: The image is smaller than a crop without resizing, or too elongated to resize.
    """
    size = settings.crop
    if settings.train_resize is not None:
        picture = resize_short_side(picture, settings.train_resize)
    if settings.train_crop == "random_resized":
        box = random_resized_box(*size_of(picture), settings.scale, settings.ratio, draws)
        picture = resize(crop(picture, box), (size, size))
    else:
        picture = crop(picture, random_box(*size_of(picture), size, draws))
    return to_bytes(picture, mirrored=bool(draws.random() < settings.flip))


def eval_transform(picture: Picture, settings: TransformSettings) -> Tensor:
    """Resize the short side and crop the centre, as torchvision's Resize and CenterCrop do.

    Args:
        picture: RGB image; its pixels are torchvision's to the bit.
        settings: Sizes.
    Returns:
        (3, eval_crop, eval_crop) uint8.
    Raises:
        DataError: The image is too elongated to resize.
    """
    picture = resize_short_side(picture, settings.eval_resize)
    width, height = size_of(picture)
    size = settings.eval_crop
    left, top = round((width - size) / 2), round((height - size) / 2)
    return to_bytes(crop(picture, (left, top, size, size)), mirrored=False)


def normalise(images: Tensor, settings: TransformSettings) -> Tensor:
    """Bytes to the numbers a network takes: (x / 255 - mean) / std, on the device of `images`.

    Args:
        images: (B, 3, H, W) uint8.
        settings: Channel mean and standard deviation.
    Returns:
        (B, 3, H, W) float32.
    Raises:
        InputError: `images` is not a batch of uint8 RGB images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(
            f"`images` must be uint8 of shape (B, 3, H, W), got {images.dtype} of shape "
            f"{tuple(images.shape)}. Pass the images of a batch as the loader returns them."
        )
    mean = _per_channel(settings.mean, images.device)
    std = _per_channel(settings.std, images.device)
    return images.float().div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """(1, 3, 1, 1) float32; kept, for each copy to a device waits for it."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def random_resized_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: np.random.Generator,
) -> Box:
    """A box of random area and shape inside an image.

    Up to ten times: area uniform in `scale` x image area, log of width / height uniform in
    log `ratio`; a box that fits is placed uniformly. Else the largest centred box of admitted
    shape. (The law of torchvision's RandomResizedCrop.)

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest width / height.
        draws: Source of uniform numbers.
    """
    for _ in range(_TRIES):
        area = width * height * _uniform(draws, *scale)
        shape = math.exp(_uniform(draws, math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return _below(draws, width - w + 1), _below(draws, height - h + 1), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h


def random_box(width: int, height: int, size: int, draws: np.random.Generator) -> Box:
    """A square box of `size` pixels, placed uniformly inside an image.

    Raises:
        DataError: The image is smaller than the box.
    """
    if min(width, height) < size:
        raise DataError(
            f"the image has {width} x {height} pixels: expected at least {size} each way for a "
            f"crop of {size}. Set `train_resize` so that small images are enlarged."
        )
    return _below(draws, width - size + 1), _below(draws, height - size + 1), size, size


def _uniform(draws: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(draws.random())


def _below(draws: np.random.Generator, bound: int) -> int:
    """Uniform in 0..bound-1. `random` comes from the raw words alone, `integers` need not."""
    return int(float(draws.random()) * bound)
