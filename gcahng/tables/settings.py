"""When two runs are one experiment: the settings that decide a run's numbers, apart from its seed."""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from gcahng.data.shards.manifest import Manifest
from gcahng.errors import DataError
from gcahng.training.config import Config, GenerationConfig, GraphConfig
from gcahng.training.config_load import walk_settings
from gcahng.training.resume import FREE

# Length decides the numbers though a resumed run may change it. Of an evaluation, the protocol, the splits and how
# often it is made (the best of more evaluations is better) count; which ks are reported, and how fast, do not. Backends
# of the graph differ by rounding.
NOT_COMPARED = (FREE - {"train.epochs"}) | {
    "seed",
    "graph.backend",
    "eval.batch_size",
    "eval.memory_mb",
    "eval.ks",
    "eval.precision_ks",
    "eval.coarse_label",
    "eval.coarse_ks",
    "eval.clustering",
}
"""Settings that runs of one experiment may have otherwise. Data is compared by its manifest, not by its folder."""

WITHOUT_PROXIES = ("n_pair", "n_pair_plus", "hn", "shn", "sct")


@functools.cache
def _compared_keys() -> tuple[tuple[str, str], ...]:
    """Each compared setting with its default as JSON."""
    return tuple((key, _json(default)) for key, _, default in walk_settings() if key not in NOT_COMPARED)


def compared_settings(config: Config) -> dict[str, str]:
    """What must be equal for two runs to be one experiment: dotted keys and their values as JSON.

    Settings of parts that a run does not have are left out.
    """
    unused = tuple(_unused_sections(config))
    return {
        key: _json(functools.reduce(getattr, key.split("."), config))
        for key, _ in _compared_keys()
        if not key.startswith(unused)
    }


def _unused_sections(config: Config) -> Iterator[str]:
    """Beginnings of keys that nothing reads in a run of this configuration."""
    graph, generation = config.graph.enabled, config.generation.enabled
    if not graph:
        yield from (f"graph.{field.name}" for field in fields(GraphConfig) if field.name != "enabled")
        yield "optim.graph."
    if not generation:
        yield from (f"generation.{field.name}" for field in fields(GenerationConfig) if field.name != "enabled")
        yield "optim.classifier."
    if not generation or config.generation.method == "interpolation":
        yield from ("generation.generator.", "optim.generator.")
    if config.loss.metric in WITHOUT_PROXIES:
        yield "optim.proxies."


def experiment_digest(config: Config) -> str:
    """Eight hexadecimal digits that tell experiments apart, with the name of the data's folder.

    Only settings other than their defaults count, so that a later version with more settings finds the same folder.
    """
    settings = compared_settings(config)
    own = {key: settings[key] for key, default in _compared_keys() if settings.get(key, default) != default}
    text = json.dumps([config.data.dir, own], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differing(one: Config, other: Config) -> list[str]:
    """The compared settings in which two configurations differ."""
    first, second = compared_settings(one), compared_settings(other)
    return [key for key in {**first, **second} if first.get(key) != second.get(key)]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@functools.cache
def local_manifest(folder: str) -> tuple[str, str] | None:
    """Source and digest of a converted data set in a local folder; None where none can be read."""
    if "://" in folder:
        return None
    try:
        manifest = Manifest.load(Path(folder))
    except DataError:
        return None
    return manifest.source, manifest.digest()
