"""Presets and overrides of transform settings, and their messages."""

import pytest

from gcahng.data.images.transform_settings import PRESETS, TransformSettings, transform_settings
from gcahng.errors import ConfigError


def test_the_default_is_the_released_one():
    settings = transform_settings()
    assert settings == PRESETS["gca_hng"]
    assert (settings.crop, settings.scale, settings.flip) == (224, (0.08, 1.0), 0.5)
    assert (settings.eval_resize, settings.eval_crop) == (256, 224)
    assert settings.mean == (0.485, 0.456, 0.406) and settings.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("name", ["sct_cub", "sct_cars", "sct_inshop", "sct_sop", "sct_hotel"])
def test_the_second_method_crops_281_to_256(name):
    settings = PRESETS[name]
    assert (settings.train_crop, settings.train_resize, settings.crop) == ("random", 281, 256)
    assert (settings.eval_resize, settings.eval_crop, settings.flip) == (256, 256, 0.5)
    others = [PRESETS[other].mean for other in PRESETS if other != name]
    assert settings.mean not in others


def test_characters_are_never_mirrored():
    assert PRESETS["glyphs"].flip == 0.0


def test_a_size_scales_the_others_and_any_field_wins():
    settings = transform_settings("sct_cub", image_size=64)
    assert (settings.crop, settings.train_resize) == (64, 70)
    assert (settings.eval_crop, settings.eval_resize) == (64, 64)
    settings = transform_settings("gca_hng", image_size=112, eval_resize=120, scale=(0.5, 1))
    assert (settings.crop, settings.eval_crop, settings.eval_resize) == (112, 112, 120)
    assert settings.scale == (0.5, 1) and settings.flip == 0.5


def test_lists_become_tuples():
    assert transform_settings(scale=[0.2, 1.0]) == transform_settings(scale=(0.2, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "gcahng"}, r"Unknown preset of transforms 'gcahng': .* Did you mean `gca_hng`"),
        ({"preset": "x"}, r"expected one of gca_hng, sct_cub, .* Choose one"),
        ({"eval_size": 3}, r"Unknown transform setting 'eval_size': .* Did you mean `eval_resize`"),
        ({"image_size": 0}, r"`image_size` must be a whole number of pixels, got 0"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(arguments, message):
    with pytest.raises(ConfigError, match=message):
        transform_settings(**arguments)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crop", 0, r"`crop` must be a whole number of pixels, got 0"),
        ("crop", 22.5, r"`crop` must be a whole number of pixels, got 22.5"),
        ("train_resize", -1, r"`train_resize` must be a whole number of pixels, got -1"),
        ("train_crop", "center", r"must be one of random_resized, random, got 'center'"),
        ("scale", (0.0, 1.0), r"`scale` must be two .* above 0 and at most 1, got \(0.0, 1.0\)"),
        ("scale", (0.9, 0.5), r"`scale` must be two numbers, the smaller first"),
        ("scale", (0.5, float("nan")), r"`scale` must be two numbers"),
        ("ratio", (-1, 1), r"`ratio` must be two numbers"),
        ("ratio", 1.0, r"`ratio` must be two numbers, .* got 1.0"),
        ("flip", True, r"`flip` must be a probability from 0.0 to 1.0, got True"),
        ("flip", 1.5, r"`flip` must be a probability"),
        ("mean", (0.5,), r"`mean` must be three numbers, got \(0.5,\)"),
        ("std", (0.5, 0.0, 0.5), r"`std` must be three numbers above 0"),
        ("eval_resize", 200, r"`eval_resize` must be at least `eval_crop` \(224\), got 200"),
    ],
)
def test_an_impossible_value_is_named(field, value, message):
    with pytest.raises(ConfigError, match=message):
        transform_settings(**{field: value})


def test_a_resize_below_a_random_crop_is_named():
    with pytest.raises(ConfigError, match=r"`train_resize` must be at least `crop` \(256\), got 9"):
        transform_settings("sct_cub", train_resize=9)


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError, match=r"`crop` must .*; `flip` must .*; `std` must"):
        TransformSettings(crop=-1, flip=2.0, std=(1.0, 1.0, -1.0))
