"""Sizes, ranges and channel statistics of image transforms, with presets by name."""

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from gcahng.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class TransformSettings:
    """How images are cut, scaled and normalised.

    Attributes:
        crop: Side of a training image in pixels.
        train_crop: "random_resized" (random area and shape, resized to `crop`) or "random" (a
            square of `crop` pixels).
        train_resize: Short side in pixels before the training crop; None leaves the image.
        scale: Smallest and largest share of the area ("random_resized").
        ratio: Smallest and largest width / height ("random_resized").
        flip: Probability of a horizontal flip in training, 0 to 1.
        eval_resize: Short side in pixels before the centre crop of evaluation.
        eval_crop: Side of an evaluation image in pixels.
        mean: Red, green, blue mean subtracted from values in [0, 1].
        std: Red, green, blue standard deviation divided by.
    Raises:
        ConfigError: Values are impossible; the message lists all of them.
    """

    crop: int = 224
    train_crop: Literal["random_resized", "random"] = "random_resized"
    train_resize: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    eval_resize: int = 256
    eval_crop: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "mean", "std"):
            value = getattr(self, name)
            if isinstance(value, list):  # as YAML has them
                object.__setattr__(self, name, tuple(value))
        faults = _faults(self)
        if faults:
            raise ConfigError("Transform settings are impossible: " + "; ".join(faults) + ".")


def _faults(s: TransformSettings) -> list[str]:
    faults = []

    def require(holds: bool, rule: str, value: object) -> None:
        if not holds:
            faults.append(f"{rule}, got {value!r}")

    sizes = {name: getattr(s, name) for name in ("crop", "eval_resize", "eval_crop")}
    if s.train_resize is not None:
        sizes["train_resize"] = s.train_resize
    for name, value in sizes.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(whole and value >= 1, f"`{name}` must be a whole number of pixels", value)
    kinds = ("random_resized", "random")
    require(s.train_crop in kinds, f"`train_crop` must be one of {', '.join(kinds)}", s.train_crop)
    low_high = "must be two numbers, the smaller first,"
    require(
        _numbers(s.scale, 2) and 0 < s.scale[0] <= s.scale[1] <= 1,
        f"`scale` {low_high} above 0 and at most 1",
        s.scale,
    )
    require(
        _numbers(s.ratio, 2) and 0 < s.ratio[0] <= s.ratio[1],
        f"`ratio` {low_high} above 0",
        s.ratio,
    )
    require(
        _numbers((s.flip,), 1) and 0 <= s.flip <= 1,
        "`flip` must be a probability from 0.0 to 1.0",
        s.flip,
    )
    require(_numbers(s.mean, 3), "`mean` must be three numbers", s.mean)
    require(_numbers(s.std, 3) and min(s.std) > 0, "`std` must be three numbers above 0", s.std)
    if not faults:
        require(
            s.eval_resize >= s.eval_crop,
            f"`eval_resize` must be at least `eval_crop` ({s.eval_crop})",
            s.eval_resize,
        )
        if s.train_crop == "random" and s.train_resize is not None:
            require(
                s.train_resize >= s.crop,
                f"`train_resize` must be at least `crop` ({s.crop})",
                s.train_resize,
            )
    return faults


def _numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(v, float | int) and not isinstance(v, bool) for v in values)
        and all(math.isfinite(v) for v in values)
    )


def _cropped(mean: tuple[float, float, float], std: tuple[float, float, float]) -> TransformSettings:
    return TransformSettings(
        crop=256,
        train_crop="random",
        train_resize=281,
        eval_resize=256,
        eval_crop=256,
        mean=mean,
        std=std,
    )


PRESETS: dict[str, TransformSettings] = {
    "gca_hng": TransformSettings(),
    "sct_cub": _cropped((0.4707, 0.4601, 0.4549), (0.2767, 0.2760, 0.2850)),
    "sct_cars": _cropped((0.4853, 0.4965, 0.4295), (0.2237, 0.2193, 0.2568)),
    "sct_inshop": _cropped((0.8324, 0.8109, 0.8041), (0.2206, 0.2378, 0.2444)),
    "sct_sop": _cropped((0.5807, 0.5396, 0.5044), (0.2901, 0.2974, 0.3095)),
    "sct_hotel": _cropped((0.5838, 0.5146, 0.4470), (0.6298, 0.6112, 0.4445)),
    # A character seen in a mirror is another one, and much of a small crop is no character at all.
    "glyphs": TransformSettings(
        crop=32,
        scale=(0.6, 1.0),
        ratio=(4 / 5, 5 / 4),
        flip=0.0,
        eval_resize=32,
        eval_crop=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
}
"""Settings by name: of GCA-HNG, of "Hard negative examples are hard, but useful" (`sct_*`, channel
statistics per data set), and for small grey characters."""


def transform_settings(
    preset: str = "gca_hng", *, image_size: int | None = None, **overrides: Any
) -> TransformSettings:
    """A preset with some of its values replaced.

    Args:
        preset: Name in `PRESETS`.
        image_size: Side of the images that the network sees, in pixels: sets `crop` and
            `eval_crop`, and scales `train_resize` and `eval_resize` in proportion. None: the
            preset's.
        overrides: Fields of `TransformSettings`; they win over `image_size`.
    Raises:
        ConfigError: The preset or a field has another name, or a value is impossible.
    """
    if preset not in PRESETS:
        raise ConfigError(_unknown("preset of transforms", preset, list(PRESETS)))
    settings = PRESETS[preset]
    names = [field.name for field in fields(TransformSettings)]
    for name in overrides:
        if name not in names:
            raise ConfigError(_unknown("transform setting", name, names))
    if image_size is not None:
        overrides = _scaled(settings, image_size) | overrides
    return replace(settings, **overrides)


def _scaled(settings: TransformSettings, image_size: int) -> dict[str, Any]:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ConfigError(
            f"`image_size` must be a whole number of pixels, got {image_size!r}. Give a size such as 224."
        )
    sizes: dict[str, Any] = {
        "crop": image_size,
        "eval_crop": image_size,
        "eval_resize": round(settings.eval_resize * image_size / settings.eval_crop),
    }
    if settings.train_resize is not None:
        sizes["train_resize"] = round(settings.train_resize * image_size / settings.crop)
    return sizes


def _unknown(what: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else "Choose one of these."
    return f"Unknown {what} {name!r}: expected one of {', '.join(names)}. {hint}"
