"""From the data part of a configuration to shards, class tables and loaders."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gcahng.data.images.transform_settings import TransformSettings, transform_settings
from gcahng.data.loader import TrainLoader
from gcahng.data.plans.class_table import ClassTable, Integers
from gcahng.data.plans.validation_classes import split_validation
from gcahng.data.shards.reader import ShardSet
from gcahng.data.stores import CacheSettings, ShardStore, open_store
from gcahng.distributed import ONE, Ranks
from gcahng.errors import ConfigError
from gcahng.training.config import Config, DataConfig, TransformConfig

log = logging.getLogger(__name__)

TRAIN_SPLIT = "train"


@dataclass(frozen=True)
class RunData:
    """Everything a run reads.

    Attributes:
        shards: The converted data set.
        table: Training classes, validation classes taken out.
        validation_rows: Rows of the held-out classes; empty without validation.
        transform: Image transforms.
    """

    shards: ShardSet
    table: ClassTable
    validation_rows: NDArray[np.int64]
    transform: TransformSettings


def image_transform(config: TransformConfig) -> TransformSettings:
    """The preset with the configuration's values put in."""
    return transform_settings(**config.arguments())


def data_store(config: DataConfig) -> ShardStore:
    """The place of the shards, with the configuration's cache if it is remote.

    Raises:
        ConfigError: `data.dir` is no place that shards can be read from.
    """
    folder = None if config.cache_dir is None else Path(config.cache_dir)
    return open_store(config.dir, CacheSettings(folder, config.cache_bytes, config.remote))


def open_data(config: Config) -> RunData:
    """Open the shards and split off the validation classes.

    Raises:
        DataError: The data set is damaged or out of reach, or has no training split.
        ConfigError: It has fewer training classes than a batch takes, or the validation share holds out too few.
    """
    data = config.data
    shards = ShardSet.open(data.dir, store=data_store(data))
    table = ClassTable.from_shards(
        shards,
        TRAIN_SPLIT,
        samples_per_class=config.batch.num_samples,
        small_classes=data.small_classes,
    )
    _report_small_classes(table, data)
    training, held_out = split_validation(table, data.validation, config.seed)
    _check_validation(table, held_out, data)
    if training.num_classes < config.batch.num_classes:
        raise ConfigError(
            f"`batch.num_classes` must not exceed the training classes of `{data.dir}`: expected at "
            f"most {training.num_classes}, got {config.batch.num_classes}. Lower it or data.validation."
        )
    return RunData(
        shards,
        training,
        table.rows_of_classes(held_out),
        image_transform(data.transform),
    )


def build_train_loader(config: Config, data: RunData, *, ranks: Ranks = ONE, pin_memory: bool = False) -> TrainLoader:
    """Batches of the configuration's shape: this rank's part of each."""
    return TrainLoader(
        data.shards,
        data.table,
        seed=config.seed,
        num_classes=config.batch.num_classes,
        num_samples=config.batch.num_samples,
        transform=data.transform,
        sampler=config.batch.sampler,
        passes=config.batch.passes,
        rank=ranks.rank,
        world_size=ranks.size,
        num_workers=config.data.num_workers,
        on_error=config.data.on_error,
        pin_memory=pin_memory,
    )


def _check_validation(table: ClassTable, held_out: Integers, config: DataConfig) -> None:
    """One class alone, or classes of one image, have nothing that could be confused or found."""
    if not config.validation:
        return
    sizes = table.counts[np.isin(table.class_ids, held_out)]
    if sizes.size < 2 or sizes.max() < 2:
        found = f"{sizes.size} classes" + (f" of at most {sizes.max()} images" if sizes.size else "")
        raise ConfigError(
            f"`data.validation` {config.validation} of {table.num_classes} training classes of `{config.dir}` must "
            f"hold out at least 2 classes and 2 images of one: got {found}. Raise it, or set it to 0."
        )


def _report_small_classes(table: ClassTable, config: DataConfig) -> None:
    for ids, fate in ((table.repeated, "their images are repeated"), (table.dropped, "left out")):
        if ids.size:
            listed = ", ".join(map(str, ids[:10])) + (" ..." if ids.size > 10 else "")
            log.warning(
                "%d classes of %s have fewer images than batch.num_samples; %s (data.small_classes: %s): %s",
                ids.size,
                config.dir,
                fate,
                config.small_classes,
                listed,
            )
