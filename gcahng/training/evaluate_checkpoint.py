"""Evaluate a saved metric model on any converted data set, or on plain tars."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gcahng.data.shards.reader import ShardSet
from gcahng.models import Embedder
from gcahng.training import checkpoint
from gcahng.training.config import Config, load_config
from gcahng.training.data_setup import data_store, image_transform
from gcahng.training.evaluation import (
    EmbeddingSettings,
    TarSets,
    as_row,
    check_evaluation,
    evaluate,
    evaluate_tars,
)
from gcahng.training.parts import build_metric_model, choose_device

log = logging.getLogger(__name__)


def load_metric_model(path: Path, overrides: Sequence[str] = ()) -> tuple[Embedder, Config]:
    """The metric model of a checkpoint and the configuration it was trained with.

    Args:
        path: Checkpoint folder, a link to one, or a file inside.
        overrides: `section.key=value`, for example another data.dir.
    Raises:
        ConfigError: There is no checkpoint, or it does not fit.
        DataError: The checkpoint is damaged.
    """
    folder = checkpoint.find_checkpoint(path)
    checkpoint.verify(folder)
    config = _evaluation_config(folder / checkpoint.CONFIG, overrides)
    model = build_metric_model(config.model, load_weights=False)
    checkpoint.load_module(model, folder, "metric_model")
    return model.to(choose_device(config.train.device)).eval(), config


def _evaluation_config(file: Path, overrides: Sequence[str]) -> Config:
    """The configuration, where fp16 and a CPU go together: that rule is for training, embedding falls back."""
    device = load_config(file, [*overrides, "train.precision=fp32"]).train.device
    config = load_config(file, [*overrides, "train.device=auto"])
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device=device))


def embedding_settings(
    config: Config, *, device: torch.device | None = None, progress_bars: bool = False
) -> EmbeddingSettings:
    """How a run's configuration turns images into embeddings; fp32 in place of fp16 where there is no CUDA.

    Args:
        config: Of the run.
        device: Where the model is; by default the one of `train.device`.
        progress_bars: Show a bar.
    """
    device = choose_device(config.train.device) if device is None else device
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    if dtype is torch.float16 and device.type != "cuda":
        log.info("Embedding in fp32: train.precision fp16 needs CUDA, the device is %s.", device.type)
        dtype = None
    return EmbeddingSettings(
        image_transform(config.data.transform),
        config.eval.batch_size,
        config.data.num_workers,
        device,
        dtype,
        progress_bars,
    )


def evaluate_checkpoint(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    tars: TarSets | None = None,
    save_to: Path | None = None,
    progress_bars: bool = False,
) -> dict[str, Any]:
    """Metrics of a checkpoint as a row (see `gcahng.training.evaluation.as_row`).

    Args:
        path: Checkpoint folder, a link to one, or a file inside.
        overrides: `section.key=value`, for example another data.dir.
        tars: Plain WebDataset tars to evaluate in place of data.dir.
        save_to: Write the embeddings to this file, see `gcahng.training.saved_embeddings.save_embeddings`.
        progress_bars: Show a bar.
    Raises:
        ConfigError: There is no checkpoint, it does not fit, or a k exceeds what a query can find.
        DataError: Checkpoint or data are damaged, or the split cannot be evaluated.
    """
    model, config = load_metric_model(path, overrides)
    settings = embedding_settings(config, progress_bars=progress_bars)
    if tars is not None:
        return as_row(evaluate_tars(model, tars, config.eval, settings, save_to=save_to))
    shards = ShardSet.open(config.data.dir, store=data_store(config.data))
    check_evaluation(shards, config.eval)
    return as_row(evaluate(model, shards, config.eval, settings, save_to=save_to))
