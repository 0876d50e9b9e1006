"""What must be unchanged for a run to go on from a checkpoint."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gcahng.errors import ConfigError
from gcahng.training.checkpoint import CONFIG
from gcahng.training.config import Config, load_config, resolved_yaml
from gcahng.training.config_load import walk_settings
from gcahng.training.config_types import show
from gcahng.training.data_setup import RunData
from gcahng.training.parts import OPTIMIZER_OF

# What a resumed run may have otherwise: none of it moves a weight. The data is compared by its manifest, not by its
# folder; `train.epochs` is free where no schedule depends on it.
FREE = frozenset(
    {
        "data.cache_bytes",
        "data.cache_dir",
        "data.dir",
        "data.num_workers",
        "data.remote",
        "distributed.shard_classes",
        "distributed.timeout_seconds",
        "train.device",
        "train.epochs",
        "train.keep_last",
        "train.log_every",
        "train.record_every",
        "train.save_every_steps",
        "train.save_in_background",
        "train.resume",
        "run.dir",
    }
)
FREE_SECTIONS = ("eval.", "health.", "monitor.")


def class_digest(data: RunData) -> str:
    """Checksum (hexadecimal sha256) of the training classes' names in the order of their labels."""
    digest = hashlib.sha256(b"[")  # of the names as one JSON list, which is never held as a whole
    for label, class_id in enumerate(data.table.class_ids.tolist()):
        name = json.dumps(data.shards.classes[class_id].name)
        digest.update(f"{', ' if label else ''}{name}".encode())
    digest.update(b"]")
    return digest.hexdigest()


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
        ConfigError: Data, settings or training classes differ; the message lists every differing setting.
    """
    if saved_data["manifest"] is None:
        raise ConfigError(
            f"`train.resume`: {folder} was made of a released file, which holds weights alone: there is no training to "
            "go on with. Start a new run from it, in another run.dir, with train.init_from."
        )
    if saved_data["manifest"] != data["manifest"]:
        raise ConfigError(
            f"`train.resume`: {folder} was trained on other data than `{config.data.dir}` (the manifests differ). "
            "Restore the data, or start a new run with train.init_from."
        )
    changed = _changed_settings(load_config(folder / CONFIG), config, parts)
    if changed:
        raise ConfigError(
            f"`train.resume`: {folder} belongs to another experiment: {'; '.join(changed)}. Set these back, or start "
            "a new run with train.init_from."
        )
    if saved_data["classes"] != data["classes"]:  # with the same settings: another version drew them
        raise ConfigError(
            f"`train.resume`: {folder} was trained on other classes of `{config.data.dir}` "
            f"({saved_data['num_classes']}, now {data['num_classes']}). Start a new run with train.init_from."
        )


def setting_of(tree: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in a resolved configuration."""
    return functools.reduce(lambda section, name: section[name], key.split("."), tree)


def _changed_settings(saved: Config, now: Config, parts: Iterable[str]) -> list[str]:
    """Every setting that differs and matters, with both values."""
    # As YAML holds them: a tuple made in Python comes back from the file as a list.
    before, after = (yaml.safe_load(resolved_yaml(config)) for config in (saved, now))
    sections = {OPTIMIZER_OF[part] for part in parts}
    cosine = any(getattr(now.optim, name).schedule.name == "cosine" for name in sections)
    changed = []
    for key, _, _ in walk_settings():
        old, new = (setting_of(tree, key) for tree in (before, after))
        if old == new:
            continue
        if key == "train.epochs" and cosine:
            changed.append(f"{key} was {show(old)}, is {show(new)} (cosine schedules end with it)")
        elif key not in FREE and not key.startswith(FREE_SECTIONS):
            changed.append(f"{key} was {show(old)}, is {show(new)}")
    return changed
