"""Transforms against torchvision, and against the coordinates that they are drawn from."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from PIL import Image

from gcahng.data.images.transforms import (
    PRESETS,
    eval_transform,
    normalise,
    random_box,
    random_resized_box,
    train_draws,
    train_transform,
    transform_settings,
)
from gcahng.errors import DataError, InputError

SIZES = [(300, 200), (200, 300), (256, 256), (224, 500), (57, 91), (31, 400), (255, 256)]


def make_image(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_bytes(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_evaluation_equals_torchvision_to_the_byte(size, preset):
    settings, image = PRESETS[preset], make_image(*size)
    reference = tv.Compose([tv.Resize(settings.eval_resize), tv.CenterCrop(settings.eval_crop)])
    assert torch.equal(eval_transform(image, settings), as_bytes(reference(image)))


@pytest.mark.parametrize("resize", range(225, 233))
def test_the_centre_is_rounded_as_torchvision_rounds_it(resize):
    settings = transform_settings(eval_resize=resize)
    for size in SIZES:
        image = make_image(*size)
        reference = tv.Compose([tv.Resize(resize), tv.CenterCrop(224)])
        assert torch.equal(eval_transform(image, settings), as_bytes(reference(image)))


@pytest.mark.parametrize("size", SIZES)
def test_a_training_crop_equals_torchvision_of_the_same_box(size):
    settings, image = transform_settings(image_size=64, flip=1.0), make_image(*size)
    for position in range(5):
        box = random_resized_box(*size, settings.scale, settings.ratio, train_draws(0, 0, position))
        left, top, width, height = box
        reference = tv.functional.resized_crop(image, top, left, height, width, [64, 64])
        got = train_transform(image, settings, train_draws(0, 0, position))
        assert torch.equal(got, as_bytes(tv.functional.hflip(reference)))


def test_a_random_crop_equals_torchvision_of_the_same_box():
    settings, image = transform_settings("sct_cub", image_size=64, flip=0.0), make_image(300, 200)
    assert (settings.train_resize, settings.crop) == (70, 64)
    resized = tv.Resize(70)(image)
    for position in range(5):
        left, top, _, _ = random_box(*resized.size, 64, train_draws(0, 0, position))
        reference = tv.functional.crop(resized, top, left, 64, 64)
        got = train_transform(image, settings, train_draws(0, 0, position))
        assert torch.equal(got, as_bytes(reference))


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((300, 200), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((128, 500), (0.08, 1.0), (3 / 4, 4 / 3)),  # large areas do not fit: many second tries
        ((32, 32), (0.6, 1.0), (4 / 5, 5 / 4)),
    ],
)
def test_boxes_have_the_distribution_of_torchvision(size, scale, ratio):
    draws, image = train_draws(0, 0, 0), make_image(*size)
    ours = np.array([random_resized_box(*size, scale, ratio, draws) for _ in range(8000)])
    torch.manual_seed(0)
    theirs = np.array([tv.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(8000)])
    theirs = theirs[:, [1, 0, 3, 2]]
    for name, a, b in [
        *zip(("left", "top", "width", "height"), ours.T, theirs.T, strict=True),
        ("area", ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
        ("shape", ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]),
    ]:
        grid = np.unique(np.concatenate([a, b]))
        distance = np.abs(np.searchsorted(np.sort(a), grid, "right") - np.searchsorted(np.sort(b), grid, "right")).max()
        # Two samples of 8000: Kolmogorov-Smirnov, exceeded once in 10**4 for equal laws.
        assert distance / 8000 < 2.23 * math.sqrt(2 / 8000), name


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (50, 50)])
def test_the_fallback_equals_torchvision(size):
    """An area of the whole image in a shape it does not have never fits."""
    scale, ratio = (1.0, 1.0), (1.5, 1.6)
    top, left, height, width = tv.RandomResizedCrop.get_params(make_image(*size), scale, ratio)
    assert random_resized_box(*size, scale, ratio, train_draws(0, 0, 0)) == (
        left,
        top,
        width,
        height,
    )


def test_random_crops_are_uniform():
    draws = train_draws(0, 0, 0)
    boxes = np.array([random_box(13, 10, 8, draws) for _ in range(6000)])
    assert np.abs(np.bincount(boxes[:, 0], minlength=6) - 1000).max() < 150
    assert np.abs(np.bincount(boxes[:, 1], minlength=3) - 2000).max() < 200


def test_half_of_the_images_are_mirrored():
    image = make_image(40, 40)
    plain = transform_settings(image_size=40, scale=(1, 1), ratio=(1, 1), flip=0.5)
    upright, mirrored = as_bytes(image), as_bytes(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    seen = [train_transform(image, plain, train_draws(0, 0, p)) for p in range(1000)]
    assert all(torch.equal(s, upright) or torch.equal(s, mirrored) for s in seen)
    assert abs(sum(torch.equal(s, mirrored) for s in seen) - 500) < 80
    never = transform_settings(image_size=40, scale=(1, 1), ratio=(1, 1), flip=0.0)
    assert torch.equal(train_transform(image, never, train_draws(0, 0, 1)), upright)


def test_draws_are_a_function_of_seed_epoch_and_position():
    image, settings = make_image(80, 60), transform_settings(image_size=32)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    images = [train_transform(image, settings, train_draws(*key)) for key in keys]
    again = [train_transform(image, settings, train_draws(*key)) for key in keys]
    for index, first in enumerate(images):
        assert torch.equal(first, again[index])
        assert not any(torch.equal(first, other) for other in images[:index])


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_gives_bytes_of_its_size(preset):
    settings = PRESETS[preset]
    for transformed in (
        train_transform(make_image(90, 70), settings, train_draws(0, 0, 0)),
        eval_transform(make_image(90, 70), settings),
    ):
        assert transformed.shape == (3, settings.crop, settings.crop)
        assert transformed.dtype == torch.uint8 and transformed.is_contiguous()


@pytest.mark.parametrize("preset", ["gca_hng", "sct_cars"])
def test_normalise_equals_torchvision(preset):
    settings = PRESETS[preset]
    image = make_image(50, 40)
    reference = tv.Compose([tv.ToTensor(), tv.Normalize(settings.mean, settings.std)])(image)
    images = torch.stack([as_bytes(image), 255 - as_bytes(image)])
    got = normalise(images, settings)
    assert got.dtype == torch.float32 and torch.equal(got[0], reference)
    assert images.dtype == torch.uint8 and torch.equal(images[0], as_bytes(image))


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_normalise_refuses_other_tensors(images):
    with pytest.raises(InputError, match=r"`images` must be uint8 of shape \(B, 3, H, W\), got"):
        normalise(images, PRESETS["gca_hng"])


def test_an_image_smaller_than_its_crop_is_named():
    settings = transform_settings("sct_cub", train_resize=None)
    with pytest.raises(DataError, match=r"has 200 x 300 pixels: expected at least 256 each way"):
        train_transform(make_image(200, 300), settings, train_draws(0, 0, 0))


def test_an_elongated_image_is_refused_before_it_fills_the_memory():
    image = Image.new("RGB", (1, 20_000))
    with pytest.raises(DataError, match=r"has 1 x 20000 pixels, too elongated.*got 1310720000"):
        eval_transform(image, PRESETS["gca_hng"])
