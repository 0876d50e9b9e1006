"""The observer behind live metrics: what happens becomes values of `gcahng.monitor.metrics`."""

import importlib.metadata
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gcahng.distributed import Ranks
from gcahng.distributed.agreement import agreed
from gcahng.monitor.endpoint import Endpoint, open_endpoint
from gcahng.monitor.metrics import Labelled, Metrics
from gcahng.monitor.process_facts import resident_memory_bytes
from gcahng.monitor.specs import SIGNALS
from gcahng.monitor.textfile import Textfile
from gcahng.training.collapse_warning import class_directions
from gcahng.training.config import Config
from gcahng.training.observers import RunFacts, RunObserver
from gcahng.training.output_files import check_output
from gcahng.training.progress import Progress
from gcahng.training.saving import Saved

_AT_K = re.compile(r"(recall|precision)_at_([0-9]+)")
_SPLIT_VALUES = ("map_at_r", "r_precision")


def metrics_observers(config: Config, ranks: Ranks) -> list[RunObserver]:
    """The observer that exports this rank's metrics, if the configuration asks for one; all ranks call it.

    That prometheus_client is there has been checked before (`gcahng.training.preflight`).

    Raises:
        ConfigError: The text file cannot be written.
    """
    monitor = config.monitor
    if monitor.textfile is not None:
        path = Path(monitor.textfile)
        agreed(ranks, lambda: check_output("monitor.textfile", path) if ranks.first else None)
    listens = monitor.port is not None and (ranks.first or monitor.each_rank)
    writes = monitor.textfile is not None and ranks.first
    return [MetricsObserver()] if listens or writes else []


class MetricsObserver(RunObserver):
    """Counts, and shows it by an endpoint, a text file, or both."""

    def __init__(self) -> None:
        self._metrics: Metrics | None = None
        self._endpoint: Endpoint | None = None
        self._textfile: Textfile | None = None
        self._images_per_step = 0
        self._counted = (0, 0)
        self._evaluating_since: float | None = None

    def begin(self, facts: RunFacts, progress: Progress) -> None:
        monitor, first = facts.config.monitor, facts.ranks.first
        self._metrics = Metrics(of_run=first)
        _introduce(self._metrics, facts)
        self._images_per_step = facts.config.batch.num_classes * facts.config.batch.num_samples
        self._counted = (progress.skipped, progress.repaired)
        self._set("last_step_timestamp_seconds", time.time())
        self._set("last_checkpoint_timestamp_seconds", time.time())
        self._set("planned_steps", facts.steps_per_epoch * facts.config.train.epochs)
        self._set("planned_epochs", facts.config.train.epochs)
        self._set("class_directions", class_directions(facts.config))
        self._evaluation(None)
        self._stand(progress)
        if monitor.port is not None and (first or monitor.each_rank):
            self._endpoint = open_endpoint(self._metrics, monitor.address, monitor.port + facts.local_rank)
        if monitor.textfile is not None and first:
            # Several runs of one machine meet in one scrape.
            self._textfile = Textfile(Path(monitor.textfile), Labelled(self._metrics, {"run": _name(facts)}))
        self._write()

    def step(self, progress: Progress, seconds: float, waited: float, images: int) -> None:
        self._observe("step_seconds", seconds)
        self._observe("data_wait_seconds", waited)
        self._set("last_step_timestamp_seconds", time.time())
        self._count("steps_total")
        self._count("images_total", self._images_per_step)
        self._stand(progress)

    def logged(self, progress: Progress, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name in SIGNALS:
                if value is not None:
                    self._set(name, float(value))
            elif name.endswith("_loss"):
                self._set("loss", float(value), name=name.removesuffix("_loss"))
            elif name.startswith("lr_"):
                self._set("learning_rate", float(value), part=name.removeprefix("lr_"))
        self._set("mean_step_seconds", values["step_seconds"])
        self._set("mean_data_wait_seconds", values["data_seconds"])
        self._count_images(progress)
        self._write()

    def evaluating(self, progress: Progress) -> None:
        self._evaluation(time.monotonic())
        self._stand(progress)
        self._write()

    def evaluated(self, progress: Progress, row: Mapping[str, Any]) -> None:
        split = str(row["split"])
        for name, value in row.items():
            if (found := _AT_K.fullmatch(name)) is not None:
                self._set(f"{found[1]}_at_k", value, split=split, k=found[2])
            elif name in _SPLIT_VALUES:
                self._set(name, value, split=split)
        if self._evaluating_since is not None:  # the rows of all splits come one after the other
            self._set("last_evaluation_seconds", time.monotonic() - self._evaluating_since)
            self._evaluation(None)
            self._set("last_step_timestamp_seconds", time.time())  # no step is late yet
        self._write()

    def dropped(self, progress: Progress, reason: str) -> None:
        self._count("non_finite_steps_total")
        self._write()

    def paused(self, progress: Progress, seconds: float) -> None:
        self._observe("checkpoint_pause_seconds", seconds)
        self._count_images(progress)

    def saved(self, progress: Progress, saved: Saved) -> None:
        if saved.error is None:
            self._observe("checkpoint_seconds", saved.seconds)
            self._set("last_checkpoint_timestamp_seconds", time.time())
        else:
            self._count("checkpoint_failures_total")
        self._write()

    def end(self, progress: Progress, status: str) -> None:
        self._evaluation(None)
        self._stand(progress)
        if self._metrics is not None:
            self._metrics.state("gcahng_run_state", status)
        self._write()
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def _evaluation(self, since: float | None) -> None:
        self._evaluating_since = since
        self._set("evaluating", float(since is not None))

    def _stand(self, progress: Progress) -> None:
        self._set("step", progress.step)
        self._set("epoch", progress.epoch)

    def _count_images(self, progress: Progress) -> None:
        """The counters of the run go on from a checkpoint, those exported from 0."""
        skipped, repaired = self._counted
        self._count("skipped_images_total", progress.skipped - skipped)
        self._count("repaired_draws_total", progress.repaired - repaired)
        self._counted = (progress.skipped, progress.repaired)

    def _set(self, name: str, value: float, /, **labels: str) -> None:
        if self._metrics is not None:
            self._metrics.set(f"gcahng_{name}", value, **labels)

    def _count(self, name: str, amount: float = 1.0) -> None:
        if self._metrics is not None:
            self._metrics.count(f"gcahng_{name}", amount)

    def _observe(self, name: str, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.observe(f"gcahng_{name}", seconds)

    def _write(self) -> None:
        if self._textfile is not None:
            self._textfile.write()


def _name(facts: RunFacts) -> str:
    """The run folder's path as it was given."""
    return facts.run_dir.as_posix()


def _version() -> str:
    try:
        return importlib.metadata.version("gcahng")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _introduce(metrics: Metrics, facts: RunFacts) -> None:
    """What does not change while the run lasts, and what is read when asked for."""
    config, ranks, device = facts.config, facts.ranks, facts.device
    metrics.describe(
        "gcahng_build_info",
        version=_version(),
        torch=str(torch.__version__),
        python=platform.python_version(),
        cuda=str(torch.version.cuda or ""),
    )
    metrics.describe(
        "gcahng_rank_info",
        rank=str(ranks.rank),
        local_rank=str(facts.local_rank),
        world_size=str(ranks.size),
        device=str(device),
    )
    metrics.describe(
        "gcahng_run_info",
        run=_name(facts),
        backbone=config.model.backbone,
        loss=config.loss.metric,
        seed=str(config.seed),
        precision=config.train.precision,
    )
    metrics.state("gcahng_run_state", "running")
    metrics.measure("gcahng_resident_memory_bytes", resident_memory_bytes)
    if device.type == "cuda":
        # Counters of the allocator on the host: no wait for the device.
        metrics.measure("gcahng_gpu_memory_allocated_bytes", lambda: torch.cuda.memory_allocated(device))
        metrics.measure("gcahng_gpu_memory_reserved_bytes", lambda: torch.cuda.memory_reserved(device))
        metrics.measure("gcahng_gpu_memory_peak_bytes", lambda: torch.cuda.max_memory_allocated(device))
