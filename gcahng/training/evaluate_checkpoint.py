"""Evaluate a saved metric model on any converted data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gcahng.data.shard_reader import ShardSet
from gcahng.models import Embedder
from gcahng.training import checkpoint
from gcahng.training.config import Config, load_config
from gcahng.training.data_setup import image_transform
from gcahng.training.evaluation import EmbeddingSettings, as_row, evaluate
from gcahng.training.parts import build_metric_model, choose_device


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
    config = load_config(folder / checkpoint.CONFIG, overrides)
    model = build_metric_model(config.model, load_weights=False)
    checkpoint.load_module(model, folder, "metric_model")
    return model.to(choose_device(config.train.device)).eval(), config


def embedding_settings(config: Config, *, progress_bars: bool = False) -> EmbeddingSettings:
    """How a run's configuration turns images into embeddings."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    return EmbeddingSettings(
        image_transform(config.data.transform),
        config.eval.batch_size,
        config.data.num_workers,
        choose_device(config.train.device),
        dtype,
        progress_bars,
    )


def evaluate_checkpoint(path: Path, overrides: Sequence[str] = (), *, progress_bars: bool = False) -> dict[str, Any]:
    """Metrics of a checkpoint as a row (see `gcahng.training.evaluation.as_row`)."""
    model, config = load_metric_model(path, overrides)
    shards = ShardSet.open(config.data.dir)
    settings = embedding_settings(config, progress_bars=progress_bars)
    return as_row(evaluate(model, shards, config.eval, settings))
