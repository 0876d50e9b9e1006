"""Export the metric model of a checkpoint: written, checked against the model, and only then published."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.shards.reader import ShardSet
from gcahng.data.stores.urls import redact
from gcahng.errors import DataError, InputError
from gcahng.export.check import TOLERANCE, Agreement, agreement
from gcahng.export.formats import FORMATS, Embed, capture, require_packages
from gcahng.export.model import ExportedModel
from gcahng.models import Embedder
from gcahng.training import checkpoint
from gcahng.training.config import Config
from gcahng.training.data_setup import data_store, image_transform
from gcahng.training.evaluate_checkpoint import load_metric_model

BATCH_SIZES = (1, 3, 8)
"""Numbers of random images that a file is checked on."""
_REAL_IMAGES = 8
_WEIGHTS = "metric_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is exported, and how.

    Attributes:
        format: `onnx` or `torch-export`.
        preprocess: Take bytes (B, H, W, 3) in place of normalised numbers (B, 3, H, W).
        l2_normalise: Give embeddings of length 1.
        image_size: Side of the images in pixels; None: that of evaluation.
        tolerance: See `gcahng.export.check.TOLERANCE`.
    """

    format: str = "onnx"
    preprocess: bool = False
    l2_normalise: bool = False
    image_size: int | None = None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: The file; after it the one with the weights, where they need their own.
        metadata: As the file holds it.
        agreements: How it compares with the model.
        notes: What was not checked, and why.
    """

    files: list[Path]
    metadata: dict[str, Any]
    agreements: list[Agreement]
    notes: list[str]


def export_checkpoint(
    path: Path,
    output: Path,
    settings: ExportSettings,
    overrides: Sequence[str] = (),
    *,
    trust_components: bool = False,
) -> Exported:
    """Write the metric model of a checkpoint for other programs; the file appears when it is whole and checked.

    The model runs in evaluation mode and float32, whatever precision it was trained in. The file is opened again by
    its runtime (onnxruntime, torch), on the CPU, and compared with the model on random images and, where the data
    of the run lie on this machine, on real ones.

    Args:
        path: Checkpoint folder, a link to one, or a file inside.
        output: File to write.
        settings: What is exported.
        overrides: `section.key=value`, for example another data.dir.
        trust_components: See `load_metric_model`.
    Raises:
        ConfigError: There is no checkpoint, it does not fit, or it needs `trust_components`.
        DataError: The checkpoint is damaged.
        InputError: The file cannot be written, the backbone cannot be exported or refuses the image size, or the file
            differs from the model.
    """
    check_target(output, settings)
    require_packages(settings.format)
    embedder, config = load_metric_model(path, [*overrides, "train.device=cpu"], trust_components=trust_components)
    transform = _transform(image_transform(config.data.transform), settings.image_size)
    model = ExportedModel(embedder, transform, preprocess=settings.preprocess, l2_normalise=settings.l2_normalise)
    noise = random_images(transform.eval_crop)
    real, notes = _real_images(config, transform)
    example = model.inputs(list(noise.values())[-1])
    check_image_size(model, example)
    metadata = describe(checkpoint.find_checkpoint(path), embedder, config, model)
    program = capture(model, example, config.model.backbone)
    partial = output.parent / f".{output.name}.{os.getpid()}.partial"
    chosen = FORMATS[settings.format]
    try:
        partial.mkdir()
        chosen.write(program, partial / output.name, metadata)
        agreements = compare(model, chosen.open(partial / output.name), noise | real, settings.tolerance)
        files = _publish(partial, output)
    except OSError as error:
        raise InputError(f"`--output` {output} cannot be written ({error.strerror or error}). Name another.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(files, metadata, agreements, notes)


def check_target(output: Path, settings: ExportSettings) -> None:
    """Refuse, before anything is loaded, settings and a file that cannot be.

    Raises:
        InputError: Unknown format, a name that does not fit it, a file that exists, a folder that does not, an
            impossible size or tolerance.
    """
    if settings.format not in FORMATS:
        raise InputError(f"`--format` must be one of {', '.join(FORMATS)}: got {settings.format!r}.")
    suffix = FORMATS[settings.format].suffix
    if output.suffix != suffix:
        raise InputError(
            f"`--output` {output}: --format {settings.format} needs a name that ends in {suffix}. Rename it."
        )
    if not output.parent.is_dir():
        raise InputError(f"`--output` {output}: the folder does not exist. Create it first.")
    for file in (output, _data_file(output)):
        if file.exists():
            raise InputError(f"`--output` {file} exists. Name another, or remove it first.")
    if settings.image_size is not None and settings.image_size < 1:
        raise InputError(f"`--image-size` must be at least 1 pixel, got {settings.image_size}. Give 224, say.")
    if not 0 < settings.tolerance < 1:
        raise InputError(
            f"`--tolerance` must lie between 0 and 1, got {settings.tolerance}. The default is {TOLERANCE}."
        )


def random_images(size: int) -> dict[str, Tensor]:
    """Batches of noise (n, 3, size, size) uint8 by what they are, always the same."""
    draws = torch.Generator().manual_seed(0)
    return {
        f"{n} random image{'s' if n > 1 else ''}": torch.randint(
            0, 256, (n, 3, size, size), dtype=torch.uint8, generator=draws
        )
        for n in BATCH_SIZES
    }


def compare(model: ExportedModel, embed: Embed, batches: dict[str, Tensor], tolerance: float) -> list[Agreement]:
    """Compare an opened file with the model on each batch of images (n, 3, H, W) uint8.

    Raises:
        InputError: They differ by more than the tolerance.
    """
    return [
        agreement(what, model.expected(images), embed(model.inputs(images)), tolerance)
        for what, images in batches.items()
    ]


def describe(folder: Path, embedder: Embedder, config: Config, model: ExportedModel) -> dict[str, Any]:
    """What a file says of itself: all that a program needs to prepare images, and where the weights come from.

    Args:
        folder: Checkpoint.
        embedder: Its metric model.
        config: Of its run.
        model: What is exported.
    """
    progress = checkpoint.read_state(folder)["progress"]
    listing = json.loads((folder / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    transform, size = model.transform, model.transform.eval_crop
    layout = ["batch", size, size, 3] if model.preprocess else ["batch", 3, size, size]
    return {
        "model": f"{type(embedder).__module__}.{type(embedder).__name__}",
        "backbone": config.model.backbone,
        "pooling": config.model.pooling,
        "embedding_dim": embedder.embedding_dim,
        "l2_normalised": model.l2_normalise,
        "input": "uint8 RGB, 0 to 255" if model.preprocess else "float32 RGB, (pixel / 255 - mean) / std",
        "input_shape": layout,
        "image_size": size,
        "resize_short_side": transform.eval_resize,
        "mean": list(transform.mean),
        "std": list(transform.std),
        "normalisation_included": model.preprocess,
        "precision": "float32",
        "run": folder.parent.name,
        "checkpoint": folder.name,
        "step": progress["step"],
        "epoch": progress["epoch"],
        "weights_sha256": listing[_WEIGHTS]["sha256"],
        "gcahng": version("gcahng"),
        "torch": str(torch.__version__),
    }


def _transform(settings: TransformSettings, image_size: int | None) -> TransformSettings:
    """The evaluation's transform, its resize in proportion where another size is asked for."""
    if image_size is None:
        return settings
    resize = round(settings.eval_resize * image_size / settings.eval_crop)
    return replace(settings, eval_crop=image_size, eval_resize=resize)


def _real_images(config: Config, transform: TransformSettings) -> tuple[dict[str, Tensor], list[str]]:
    """Images spread over the split that the run evaluates, by what they are; without data a note says why."""
    if "://" in config.data.dir or not Path(config.data.dir).is_dir():
        place = redact(config.data.dir)
        return {}, [f"Not compared on real images: `{place}` is no folder of this machine (data.dir=FOLDER)."]
    try:
        shards = ShardSet.open(config.data.dir, store=data_store(config.data))
        rows = shards.split_samples(config.eval.split)
        chosen = rows[:: max(1, len(rows) // _REAL_IMAGES)][:_REAL_IMAGES]
        images, _, _ = next(iter(eval_loader(shards, chosen, transform=transform, batch_size=_REAL_IMAGES)))
    except DataError as error:
        return {}, [f"Not compared on real images: {error}"]
    return {f"{len(images)} images of {config.data.dir}": images}, []


def check_image_size(model: ExportedModel, example: Tensor) -> None:
    """Embed once: a backbone may be built for one image size alone.

    Args:
        model: What is exported.
        example: Images as its `forward` takes them.
    Raises:
        InputError: The model refuses them.
    """
    try:
        with torch.no_grad():
            model(example)
    except (InputError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        size = model.transform.eval_crop
        raise InputError(
            f"`--image-size`: the model cannot embed images of {size} x {size} pixels: {reason} Use the size it was "
            "trained with."
        ) from error


def _data_file(output: Path) -> Path:
    """Where ONNX keeps weights that protobuf cannot hold."""
    return output.with_name(f"{output.name}.data")


def _publish(partial: Path, output: Path) -> list[Path]:
    """Move the written files to their place, the one that is opened last."""
    others = sorted(file.name for file in partial.iterdir() if file.name != output.name)
    for name in (*others, output.name):
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial / name, output.with_name(name))
    return [output, *(output.with_name(name) for name in others)]
