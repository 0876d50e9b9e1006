"""Seconds per batch of inference for finished runs, as table 7 wants it.

The paper does not say what an iteration of inference holds. Ours: a batch of as many test images as a training batch
has, already decoded, goes to the device, is normalised and embedded by the metric model of the run's newest checkpoint;
the graph network plays no part in it. The result stands in `timing.json` of the run folder.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gcahng.data.eval_loader import eval_loader
from gcahng.data.shards.reader import ShardSet
from gcahng.errors import ConfigError
from gcahng.tables.collect import Collected
from gcahng.tables.found_runs import TIMING_FILE
from gcahng.training.data_setup import data_store
from gcahng.training.embedding import embed_batch, evaluating
from gcahng.training.evaluate_checkpoint import embedding_settings, evaluation_config, load_metric_model

NUM_BATCHES = 30
WARM_UP = 3
"""Batches before the clock starts: memory is taken and kernels are chosen in the first ones."""


def time_runs(tables: Sequence[Collected], num_batches: int, say: Callable[[str], None]) -> None:
    """Measure every finished run of some tables, and leave `timing.json` in its folder.

    Args:
        tables: What has been run.
        num_batches: Batches that are timed, at least 1.
        say: Prints a line.
    Raises:
        ConfigError: Nothing is finished, or `num_batches` is below 1.
        InputError: A checkpoint or its data cannot be read.
    """
    if num_batches < 1:
        raise ConfigError(f"--batches must be at least 1: got {num_batches}.")
    finished = {result.folder: found.cell for table in tables for found in table.cells for result in found.results}
    if not finished:
        raise ConfigError("No run of these tables is finished: expected at least one. `run` or `submit` them first.")
    for folder, cell in finished.items():
        assert cell.config is not None
        # Where the data lies now, and the device that is here.
        overrides = [f"data.dir={json.dumps(cell.config.data.dir)}", f"train.device={cell.config.train.device}"]
        # The table's own configuration is the user's word for what it names.
        trusted = evaluation_config(folder / "last").model == cell.config.model
        row = inference_seconds(folder, overrides, num_batches, trust_components=trusted)
        (folder / TIMING_FILE).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        say("{}: {seconds_per_batch:.4f} s per batch of {batch_size} on {device}".format(folder, **row))


def inference_seconds(
    folder: Path, overrides: Sequence[str], num_batches: int, *, trust_components: bool = False
) -> dict[str, Any]:
    """Time a run's metric model on batches of its test images.

    Args:
        folder: Run folder with a checkpoint `last`.
        overrides: `section.key=value`.
        num_batches: Batches that are timed.
        trust_components: See `load_metric_model`.
    Returns:
        `seconds_per_batch` (median), `batch_size`, `batches`, `device`.
    Raises:
        InputError: The checkpoint or the data cannot be read, or the split has fewer images than a batch.
    """
    model, config = load_metric_model(folder / "last", overrides, trust_components=trust_components)
    settings = embedding_settings(config)
    size = config.batch.num_classes * config.batch.num_samples
    shards = ShardSet.open(config.data.dir, store=data_store(config.data))
    rows = shards.split_samples(config.eval.split)
    if len(rows) < size:
        raise ConfigError(
            f"Split {config.eval.split!r} of {config.data.dir} is too small to time a batch of {size} images (P x K): "
            f"it has {len(rows)}."
        )
    loader = eval_loader(shards, rows, transform=settings.transform, batch_size=size, num_workers=settings.num_workers)
    batches = [images for images, _, _ in islice(loader, num_batches) if len(images) == size]

    keys = [str(number) for number in range(size)]
    seconds = []
    with evaluating(model):
        for number in range(WARM_UP + num_batches):
            started = time.perf_counter()
            embed_batch(model, batches[number % len(batches)], settings, keys)  # ends on the CPU: nothing is open
            seconds.append(time.perf_counter() - started)
    return {
        "seconds_per_batch": statistics.median(seconds[WARM_UP:]),
        "batch_size": size,
        "batches": num_batches,
        "device": _device_name(settings.device),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
