"""Evaluate a saved metric model on any converted data set, or on plain tars, with one rank or several."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from gcahng.data.shards.reader import ShardSet
from gcahng.distributed import ONE, Ranks
from gcahng.distributed.agreement import agreed, check_same
from gcahng.errors import ConfigError
from gcahng.models import Embedder
from gcahng.training import checkpoint
from gcahng.training.config import Config, load_config, resolved_yaml
from gcahng.training.data_setup import data_store, image_transform
from gcahng.training.evaluation import (
    EmbeddingSettings,
    Evaluation,
    TarSets,
    as_row,
    check_evaluation,
    evaluate,
    evaluate_tars,
)
from gcahng.training.launched import Launched
from gcahng.training.parts import build_metric_model, choose_device
from gcahng.training.trusted import check_components

log = logging.getLogger(__name__)


class SavedModel(Protocol):
    """A metric model in files, with the configuration that it belongs to."""

    def config(self, overrides: Sequence[str]) -> Config:
        """The configuration with `section.key=value` replaced, for embedding (see `embedding_config`)."""

    def load(self, overrides: Sequence[str], device: torch.device) -> tuple[Embedder, Config]:
        """The model, ready to embed, and that configuration."""

    def digest(self) -> str:
        """Checksum (hexadecimal sha256) of what the weights were read from."""

    def chosen_on_test(self) -> bool:
        """Whether it is the one of several that did best on the test classes."""


@dataclass(frozen=True)
class CheckpointModel:
    """The metric model of a checkpoint: a folder, a link to one, or a file inside.

    Attributes:
        path: Of the checkpoint.
        trust_components: See `load_metric_model`.
    """

    path: Path
    trust_components: bool = False

    def config(self, overrides: Sequence[str]) -> Config:
        """See `evaluation_config`."""
        return evaluation_config(self.path, overrides)

    def load(self, overrides: Sequence[str], device: torch.device) -> tuple[Embedder, Config]:
        """See `load_metric_model`."""
        return load_metric_model(self.path, overrides, device=device, trust_components=self.trust_components)

    def digest(self) -> str:
        """Of its manifest, which holds the checksums of all files."""
        manifest = (checkpoint.find_checkpoint(self.path) / checkpoint.MANIFEST).read_bytes()
        return hashlib.sha256(manifest).hexdigest()

    def chosen_on_test(self) -> bool:
        """Whether `path` is the link `best_test`, or a file in it, or was made of a released file of which it is so."""
        if "best_test" in (self.path.name, self.path.parent.name):
            return True
        state = checkpoint.read_state(checkpoint.find_checkpoint(self.path))
        return bool(state.get(checkpoint.RELEASED, {}).get(checkpoint.CHOSEN_ON_TEST, False))


def load_metric_model(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    device: torch.device | None = None,
    trust_components: bool = False,
) -> tuple[Embedder, Config]:
    """The metric model of a checkpoint and the configuration it was trained with.

    Args:
        path: Checkpoint folder, a link to one, or a file inside.
        overrides: `section.key=value`, for example another data.dir.
        device: Where to put it; by default where `train.device` says.
        trust_components: Run a backbone from outside this library, if its configuration names one.
    Raises:
        ConfigError: There is no checkpoint, it does not fit, or it needs `trust_components`.
        DataError: The checkpoint is damaged.
    """
    folder = checkpoint.find_checkpoint(path)
    checkpoint.verify(folder)
    config = evaluation_config(folder, overrides)
    check_components(config, folder, trusted=trust_components)
    model = build_metric_model(config.model, load_weights=False)
    checkpoint.load_module(model, folder, "metric_model")
    return model.to(choose_device(config.train.device) if device is None else device).eval(), config


def evaluation_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A checkpoint's configuration, see `embedding_config`.

    Raises:
        ConfigError: There is no checkpoint, or a setting is impossible.
    """
    file = checkpoint.find_checkpoint(path) / checkpoint.CONFIG
    if not file.is_file():  # a pipe would be waited for
        raise ConfigError(f"`{file.parent}` lacks {file.name}: expected a file. Use another checkpoint.")
    return embedding_config(file, overrides)


def embedding_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """A configuration file, where fp16 and a CPU go together: that rule is for training, embedding falls back.

    Raises:
        ConfigError: There is no such file, or a setting is impossible.
    """
    device = load_config(file, [*overrides, "train.precision=fp32"]).train.device
    config = load_config(file, [*overrides, "train.device=auto"])
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device=device))


def embedding_settings(
    config: Config,
    *,
    device: torch.device | None = None,
    progress_bars: bool = False,
    between_batches: Callable[[], None] | None = None,
) -> EmbeddingSettings:
    """How a run's configuration turns images into embeddings; fp32 in place of fp16 where there is no CUDA.

    Args:
        config: Of the run.
        device: Where the model is; by default the one of `train.device`.
        progress_bars: Show a bar.
        between_batches: Called before each batch; what it raises ends the embedding.
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
        between_batches,
    )


def evaluate_checkpoint(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    tars: TarSets | None = None,
    save_to: Path | None = None,
    progress_bars: bool = False,
    trust_components: bool = False,
) -> dict[str, Any]:
    """Metrics of a checkpoint as a row (see `gcahng.training.evaluation.as_row`), by this process alone.

    Args:
        path: Checkpoint folder, a link to one, or a file inside.
        overrides: `section.key=value`, for example another data.dir.
        tars: Plain WebDataset tars to evaluate in place of data.dir.
        save_to: Write the embeddings to this file, see `gcahng.training.saved_embeddings.save_embeddings`.
        progress_bars: Show a bar.
        trust_components: See `load_metric_model`.
    Raises:
        ConfigError: There is no checkpoint, it does not fit or needs `trust_components`, or a k exceeds what a query
            can find.
        DataError: Checkpoint or data are damaged, or the split cannot be evaluated.
    """
    started = Launched(ONE, choose_device(evaluation_config(path, overrides).train.device), "plain")
    model = CheckpointModel(path, trust_components)
    return as_row(evaluation_of(model, overrides, started, tars=tars, save_to=save_to, progress_bars=progress_bars))


def evaluation_of(
    saved: SavedModel,
    overrides: Sequence[str],
    started: Launched,
    *,
    tars: TarSets | None = None,
    save_to: Path | None = None,
    keep_embeddings: bool = False,
    num_neighbours: int = 0,
    progress_bars: bool = False,
) -> Evaluation:
    """Evaluate a saved model on one rank or several; other arguments and errors as of `evaluate_checkpoint`.

    Args:
        saved: The model; each rank reads it.
        started: How this process was started; every rank calls this.
        keep_embeddings: Return the embeddings, on rank 0.
        num_neighbours: Nearest neighbours to return per query.
    """
    ranks = started.ranks

    def read() -> tuple[Embedder, Config, ShardSet | None]:
        model, config = saved.load(overrides, started.device)
        if tars is not None:
            return model, config, None
        shards = ShardSet.open(config.data.dir, store=data_store(config.data))
        check_evaluation(shards, config.eval)
        return model, config, shards

    model, config, shards = agreed(ranks, read)
    _check_same(ranks, saved, config, shards)
    bars = progress_bars and ranks.first
    settings = embedding_settings(config, device=started.device, progress_bars=bars)
    if shards is None:
        assert tars is not None
        return evaluate_tars(
            model,
            tars,
            config.eval,
            settings,
            num_neighbours=num_neighbours,
            save_to=save_to,
            keep_embeddings=keep_embeddings,
            ranks=ranks,
        )
    return evaluate(
        model,
        shards,
        config.eval,
        settings,
        num_neighbours=num_neighbours,
        save_to=save_to,
        keep_embeddings=keep_embeddings,
        ranks=ranks,
    )


def _check_same(ranks: Ranks, saved: SavedModel, config: Config, shards: ShardSet | None) -> None:
    """Ranks that embed with other weights, settings or data would rank a mixture."""
    facts = {
        "checkpoint": saved.digest()[:12],
        "configuration": hashlib.sha256(resolved_yaml(config).encode()).hexdigest()[:12],
        "data (manifest)": "tars" if shards is None else shards.manifest.digest()[:12],
    }
    check_same(ranks, facts)
