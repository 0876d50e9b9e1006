"""Cutting and scaling: Pillow images to the bit as before, arrays within one level of them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gcahng.data.images.picture import crop, resize, resize_short_side, size_of, to_bytes
from gcahng.data.images.transforms import train_draws, train_transform, transform_settings
from gcahng.errors import DataError


def pixels(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def levels(a: object, b: object) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@pytest.mark.parametrize("kind", [np.asarray, Image.fromarray])
def test_a_crop_is_the_part_of_the_array(kind):
    whole = pixels(50, 40)
    picture = kind(whole)
    assert size_of(picture) == (50, 40)
    assert np.array_equal(crop(picture, (7, 5, 30, 20)), whole[5:25, 7:37])
    assert crop(picture, (0, 0, 50, 40)) is picture


@pytest.mark.parametrize(
    "size", [(500, 375), (448, 448), (224, 224), (91, 57), (1, 1), (3, 400), (2000, 30), (223, 225)]
)
@pytest.mark.parametrize("target", [(224, 224), (256, 341)])
def test_arrays_are_resized_as_pillow_resizes(size, target):
    array = pixels(*size)
    expected = Image.fromarray(array).resize(target, Image.Resampling.BILINEAR)
    got = resize(array, target)
    assert size_of(got) == target and got.dtype == np.uint8
    assert levels(got, expected) <= 1
    assert np.array_equal(resize(Image.fromarray(array), target), expected)


def test_smooth_pictures_are_off_by_little():
    """White noise above is the worst case for a single value; a photograph has few that differ at all."""
    array = np.asarray(Image.fromarray(pixels(16, 12)).resize((500, 375), Image.Resampling.BICUBIC)).copy()
    settings, differences = transform_settings(), []
    for position in range(10):
        a, b = (train_transform(p, settings, train_draws(0, 0, position)) for p in (array, Image.fromarray(array)))
        differences.append((a.int() - b.int()).abs())
    found = torch.stack(differences)
    assert found.max() <= 1 and found.float().mean() < 0.06


def test_a_part_of_an_array_is_resized_like_a_copy_of_it():
    part = crop(pixels(90, 70), (11, 3, 60, 50))
    assert np.array_equal(resize(part, (32, 32)), resize(part.copy(), (32, 32)))


def test_every_processor_resizes_to_the_same_bytes():
    program = (
        "import hashlib, numpy as np, torch; from gcahng.data.images.picture import resize\n"
        "digest = hashlib.sha256()\n"
        "for seed, (width, height) in enumerate([(500, 375), (91, 57), (300, 41), (224, 900)]):\n"
        "    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)\n"
        "    digest.update(resize(array, (224, 224)).tobytes())\n"
        "print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())\n"
    )
    answers = []
    for capability in ("default", "avx2", ""):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} | (
            {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        )
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        answers.append(done.stdout.split())
    assert answers[0][0] in ("DEFAULT", "NO")  # the plain code, or a processor that has nothing else
    assert len({digest for _, digest in answers}) == 1


@pytest.mark.parametrize("kind", [np.asarray, Image.fromarray])
@pytest.mark.parametrize("mirrored", [False, True])
def test_bytes_are_channels_first(kind, mirrored):
    array = pixels(9, 5)
    expected = array[:, ::-1] if mirrored else array
    got = to_bytes(kind(array), mirrored=mirrored)
    assert got.is_contiguous() and np.array_equal(got.numpy(), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (70, 90)])
def test_the_short_side_of_arrays_too(size):
    array = pixels(*size)
    image = resize_short_side(Image.fromarray(array), 70)
    got = resize_short_side(array, 70)
    assert size_of(got) == image.size and min(image.size) == 70
    assert levels(got, image) <= 1


def test_an_elongated_array_is_refused():
    with pytest.raises(DataError, match=r"has 1 x 20000 pixels, too elongated.*got 1310720000"):
        resize_short_side(np.zeros((20_000, 1, 3), np.uint8), 256)


@pytest.mark.parametrize("preset", ["gca_hng", "sct_cub"])
def test_arrays_and_images_are_cut_from_the_same_boxes(preset):
    """A JPEG's array and a PNG's image of one size take the same random numbers: only roundings differ."""
    settings, array = transform_settings(preset), pixels(500, 375)
    for position in range(6):
        from_array = train_transform(array, settings, train_draws(3, 1, position))
        from_image = train_transform(Image.fromarray(array), settings, train_draws(3, 1, position))
        assert levels(from_array, from_image) <= 1
