"""What must be unchanged for a run to go on from a checkpoint."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gcahng.errors import ConfigError
from gcahng.training.checkpoint import CONFIG
from gcahng.training.config import Config, load_config
from gcahng.training.data_setup import RunData
from gcahng.training.parts import OPTIMIZER_OF


def class_digest(data: RunData) -> str:
    """Checksum (hexadecimal sha256) of the training classes' names in the order of their labels."""
    names = [data.shards.classes[i].name for i in data.table.class_ids.tolist()]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def check_resumable(
    folder: Path,
    saved_data: Mapping[str, Any],
    data: Mapping[str, Any],
    config: Config,
    parts: Iterable[str],
) -> None:
    """Refuse a resume that would silently become another experiment.

    Args:
        folder: Checkpoint.
        saved_data: What it says about its data.
        data: The same of this run.
        config: Of this run.
        parts: Names of the parts that have an optimiser.
    Raises:
        ConfigError: Data or training classes differ, or a setting differs that the saved state would override.
    """
    if saved_data["manifest"] != data["manifest"]:
        raise ConfigError(
            f"`train.resume`: {folder} was trained on other data than `{config.data.dir}` (the manifests differ). "
            "Restore the data, or start a new run with train.init_from."
        )
    if saved_data["classes"] != data["classes"]:
        raise ConfigError(
            f"`train.resume`: {folder} was trained on other classes of `{config.data.dir}` "
            f"({saved_data['num_classes']}, now {data['num_classes']}). Set seed, data.validation and "
            "data.small_classes back, or start a new run with train.init_from."
        )
    changed = _overridden_settings(load_config(folder / CONFIG), config, parts)
    if changed:
        raise ConfigError(
            f"`train.resume`: optimisers and schedules go on as {folder} saved them, but the configuration says "
            f"otherwise: {'; '.join(changed)}. Set these back, or start a new run with train.init_from."
        )


def _overridden_settings(saved: Config, now: Config, parts: Iterable[str]) -> list[str]:
    """Settings that the saved states of optimisers and schedules would silently override."""
    changed, cosine = [], False
    for name in sorted({OPTIMIZER_OF[part] for part in parts}):
        before, after = (dataclasses.asdict(getattr(c.optim, name)) for c in (saved, now))
        for key, value in before.items():
            if after[key] != value:
                changed.append(f"optim.{name}.{key} was {value}, is {after[key]}")
        cosine |= after["schedule"]["name"] == "cosine"
    if cosine and saved.train.epochs != now.train.epochs:
        changed.append(f"train.epochs was {saved.train.epochs}, is {now.train.epochs} (cosine schedules end with it)")
    return changed
