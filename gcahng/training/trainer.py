"""The training loop: epochs, logging, evaluation, checkpoints. The iteration itself is `step.py`.

A run folder holds `config.yaml` (resolved), `metrics.jsonl`, `tensorboard/`, `step-N/` checkpoints with the links
`last`, `best` (by validation) and `best_test`, and `results.json` at the end.
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gcahng.data.images.transforms import normalise
from gcahng.errors import ConfigError, TrainingError
from gcahng.random import stream_key
from gcahng.training import checkpoint
from gcahng.training.averages import EpochAverages
from gcahng.training.config import Config, resolved_yaml
from gcahng.training.data_setup import RunData, build_train_loader, open_data
from gcahng.training.evaluate_checkpoint import embedding_settings
from gcahng.training.evaluation import as_row, check_evaluation, evaluate, recall_at_1
from gcahng.training.finite_checks import MOST_AHEAD, NonFiniteEmbedding
from gcahng.training.memory import peak_memory_bytes
from gcahng.training.parts import build_modules, build_parts, build_step, choose_device
from gcahng.training.preflight import preflight
from gcahng.training.resume import check_resumable, class_digest
from gcahng.training.run_log import RunLog
from gcahng.training.step_clock import StepClock

log = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
SELECTION_NOTE = "chosen on the test classes, as the papers' numbers are"


@dataclass
class Progress:
    """Where a run stands; saved in `state.json`.

    Attributes:
        epoch: Epochs finished.
        step: Iterations finished.
        skipped: Unreadable images replaced so far.
        repaired: Draws of the sampler so far that gave way to others, since their batch held them already.
        best: Best evaluation row by split: "validation" by MAP@R, "test" by R@1 and then MAP@R.
        scores: What the best rows were chosen by: [MAP@R], or [R@1, MAP@R].
        last: Newest evaluation rows by split.
    """

    epoch: int = 0
    step: int = 0
    skipped: int = 0
    repaired: int = 0
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)


class Trainer:
    """Builds everything a configuration names and runs it."""

    def __init__(self, config: Config, *, progress_bars: bool = True, overwrite: bool = False) -> None:
        """
        Args:
            config: A checked configuration.
            progress_bars: Show bars on stderr.
            overwrite: Replace a run that `run.dir` holds, when training starts.
        Raises:
            InputError: Data, weights or settings cannot be used; nothing has been written.
        """
        preflight(config, overwrite=overwrite)
        self.config = config
        self.bars = progress_bars
        self.overwrite = overwrite
        self.run_dir = Path(config.run.dir)
        self.device = choose_device(config.train.device)
        self.data: RunData = open_data(config)
        check_evaluation(self.data.shards, config.eval)
        self._resume_from = self._find_resume()
        self._check_run_dir()
        self.loader = build_train_loader(config, self.data, pin_memory=self.device.type == "cuda")
        starts_anew = self._resume_from is None and config.train.init_from is None
        modules = build_modules(config, self.data.table.num_classes, load_weights=starts_anew)
        self._start_weights(modules)
        self.parts = build_parts(config, modules, self.device)
        self.step, self.backend = build_step(config, self.parts, self.device)
        self.averages = EpochAverages()
        self.progress = Progress()
        self._clock = StepClock()
        # (step, rows of its batch) of the steps that a late finding may be about.
        self._recent: deque[tuple[int, Tensor]] = deque(maxlen=MOST_AHEAD + 1)
        if self._resume_from is not None:
            self._load(self._resume_from)

    def run(self) -> dict[str, Any]:
        """Train to the last epoch and return what `results.json` holds."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.overwrite:
            checkpoint.clear_run(self.run_dir)
        (self.run_dir / checkpoint.CONFIG).write_text(resolved_yaml(self.config), encoding="utf-8")
        resumed = self.progress.step if self._resume_from is not None else None
        with RunLog(self.run_dir, from_step=resumed) as run_log:
            if resumed is not None and self._evaluation_is_due():  # the run ended in it
                self._evaluate_and_save(run_log)
            for epoch in range(self.progress.epoch, self.config.train.epochs):
                self._train_epoch(epoch, run_log)
                self.averages.end_epoch()
                for schedule in self.parts.schedules.values():
                    schedule.step()
                self.progress.epoch = epoch + 1
                self._evaluate_and_save(run_log)
        return self._finish()

    def _train_epoch(self, epoch: int, run_log: RunLog) -> None:
        self.parts.metric_model.set_warm_up(epoch < self.config.train.warm_up_epochs)
        batches = self.loader.epoch_iterator(epoch)
        limit = self.config.train.max_steps_per_epoch
        total = len(batches) if limit is None else min(limit, len(batches))
        bar = tqdm(
            total=total,
            desc=f"epoch {epoch + 1}/{self.config.train.epochs}",
            unit="step",
            leave=False,
            disable=not self.bars,
        )
        with bar:
            started = time.perf_counter()
            for number, batch in enumerate(batches, 1):
                loaded = time.perf_counter()
                for problem in batch.problems:
                    log.warning("Skipped: %s", problem)
                self.progress.skipped += batch.skipped
                self.progress.repaired += batch.repaired
                # Labels and rows are looked at on the CPU; the step sends the labels on.
                images = batch.images.to(self.device, non_blocking=True)
                report = self.run_step(images, batch.labels, batch.rows)
                self.progress.step += 1
                values = self._read(report) if self.progress.step % self.config.train.log_every == 0 else None
                ended = time.perf_counter()
                self._clock.add(ended - started, loaded - started)
                if values is not None or self.backend.checks.gate is None:
                    self._clock.settle()
                if values is not None:
                    self._log_step(values, epoch, run_log)
                    bar.set_postfix(loss=f"{values['total_loss']:.3f}", refresh=False)
                bar.update()
                started = time.perf_counter()
                if number >= total:
                    break
            self._finish_checks()
            self._clock.settle(time.perf_counter() - started)

    def run_step(self, images: Tensor, labels: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """One step on a batch.

        Args:
            images: (B, 3, H, W) uint8 on the run's device.
            labels, rows: (B,) int64, best left on the CPU.
        """
        self._recent.append((self.progress.step, rows))
        inputs = normalise(images, self.data.transform)
        # Dropout or stochastic depth inside a backbone draws from torch's generators: make them, too, a function of
        # the step, so that a resumed run draws what the undisturbed one would have.
        torch.manual_seed(stream_key(self.config.seed, "model", self.progress.step) >> 1)
        with self._samples_named():
            return self.step(inputs, labels, self.averages, step=self.progress.step)

    def _finish_checks(self) -> None:
        """Wait for the steps so far, and raise if one of them met numbers that are not finite."""
        with self._samples_named():
            self.backend.checks.finish()

    @contextmanager
    def _samples_named(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteEmbedding as error:
            rows = next(rows for step, rows in self._recent if step == error.step)
            keys = [self.data.shards.key(int(rows[p])) for p in error.positions[:5]]
            raise TrainingError(f"{error} Samples: {', '.join(keys)}.") from error

    def _read(self, report: Mapping[str, Tensor]) -> dict[str, float]:
        """A report's numbers: one wait for the device, and no number of a step that is not to be trusted."""
        self._finish_checks()
        numbers = torch.stack([value.double() for value in report.values()]).tolist()
        return dict(zip(report, numbers, strict=True))

    def _log_step(self, report: Mapping[str, float], epoch: int, run_log: RunLog) -> None:
        values: dict[str, Any] = dict(report)
        values["skipped_images"] = self.progress.skipped
        values["repaired_draws"] = self.progress.repaired
        for name, optimizer in self.parts.optimizers.items():
            values[f"lr_{name}"] = float(optimizer.param_groups[0]["lr"])
        values["step_seconds"], values["data_seconds"] = self._clock.recent(self.config.train.log_every)
        run_log.write("step", self.progress.step, {"epoch": epoch} | values)

    def _evaluate_and_save(self, run_log: RunLog) -> None:
        """Evaluate the finished epoch if it is time, and save it, whatever becomes of the evaluation."""
        if self._evaluation_is_due():
            try:
                self._evaluate(run_log)
            except BaseException:
                # The epoch is not lost to an unreadable test image or Ctrl-C: a resume evaluates it first. Older
                # checkpoints stay too, since this one may hold a model that diverged.
                self._save(keep_all=True)
                raise
        self._save()

    def _evaluation_is_due(self) -> bool:
        epoch = self.progress.epoch
        done = self.progress.last.get("test", {}).get("epoch") == epoch
        return not done and (epoch % self.config.eval.every_epochs == 0 or epoch == self.config.train.epochs)

    def _evaluate(self, run_log: RunLog) -> None:
        """Evaluate all splits, then log them and note what is best so far."""
        settings = embedding_settings(self.config, progress_bars=self.bars)
        splits: dict[str, Any] = {"test": None}
        if self.data.validation_rows.size:
            splits["validation"] = self.data.validation_rows
        model, shards = self.parts.metric_model, self.data.shards
        # No row before all are there: a failure in between must leave nothing that a resume would log again.
        results = {s: evaluate(model, shards, self.config.eval, settings, rows=rows) for s, rows in splits.items()}
        for split, result in results.items():
            row: dict[str, Any] = {"epoch": self.progress.epoch, "split": split} | as_row(result)
            run_log.write("evaluation", self.progress.step, row)
            self.progress.last[split] = row
            score: list[float] = [row["map_at_r"]]
            if split == "test":
                score.insert(0, recall_at_1(result))
            if split not in self.progress.scores or score > self.progress.scores[split]:
                self.progress.scores[split] = score
                self.progress.best[split] = row | {"step": self.progress.step}

    def _save(self, *, keep_all: bool = False) -> None:
        self._finish_checks()
        folder = checkpoint.save_checkpoint(
            self.run_dir,
            self.progress.step,
            modules=self.parts.modules,
            optimizers=self.parts.optimizers,
            state=self._state(),
            config_yaml=resolved_yaml(self.config),
        )
        checkpoint.point(self.run_dir, "last", folder)
        for split, link in (("validation", "best"), ("test", "best_test")):
            # From the counters, not from what just improved: a run that was killed before it set a
            # link sets it after it was resumed.
            best = self.progress.best.get(split)
            if best is not None and (folder := self.run_dir / f"step-{best['step']}").is_dir():
                checkpoint.point(self.run_dir, link, folder)
        if not keep_all:
            checkpoint.prune(self.run_dir, self.config.train.keep_last)

    def _state(self) -> dict[str, Any]:
        return {
            "progress": vars(self.progress),
            "averages": self.averages.state_dict(),
            "schedules": {name: s.state_dict() for name, s in self.parts.schedules.items()},
            "backend": self.backend.state_dict(),
            "data": self._data_identity,
        }

    @cached_property
    def _data_identity(self) -> dict[str, Any]:
        return {
            "manifest": self.data.shards.manifest.digest(),
            "classes": class_digest(self.data),
            "num_classes": self.data.table.num_classes,
        }

    def _load(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        check_resumable(folder, state["data"], self._data_identity, self.config, self.parts.optimizers)
        for name, module in self.parts.modules.items():
            checkpoint.load_module(module, folder, name)
        for name, optimizer in self.parts.optimizers.items():
            checkpoint.load_optimizer(optimizer, folder, name)
        for name, schedule in self.parts.schedules.items():
            schedule.load_state_dict(state["schedules"][name])
        self.averages.load_state_dict(state["averages"])
        self.backend.load_state_dict(state["backend"])
        self.progress = Progress(**state["progress"])
        log.info("Resumed from %s: epoch %d, step %d.", folder, self.progress.epoch, self.progress.step)

    def _find_resume(self) -> Path | None:
        setting = self.config.train.resume
        if setting == "never" or self.overwrite:
            return None
        folder = (
            checkpoint.newest_checkpoint(self.run_dir)
            if setting == "auto"
            else checkpoint.find_checkpoint(Path(setting))
        )
        if folder is None:
            return None
        checkpoint.verify(folder)
        return folder.resolve()

    def _check_run_dir(self) -> None:
        newest = checkpoint.newest_checkpoint(self.run_dir)
        if newest is not None and not self.overwrite and newest.resolve() != self._resume_from:
            raise ConfigError(
                f"`run.dir` {self.run_dir} already holds a run, the newest checkpoint being {newest.name}. "
                "Continue it with train.resume=auto, replace it with --overwrite, or choose another run.dir."
            )
        existing = next(path for path in (self.run_dir, *self.run_dir.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(
                f"`run.dir` {self.run_dir} cannot be written: expected a folder that may be written to, got "
                f"{existing}. Choose another run.dir."
            )

    def _start_weights(self, modules: Mapping[str, torch.nn.Module]) -> None:
        if self.config.train.init_from is None or self._resume_from is not None:
            return
        folder = checkpoint.find_checkpoint(Path(self.config.train.init_from))
        checkpoint.verify(folder)
        same_classes = checkpoint.read_state(folder)["data"]["classes"] == self._data_identity["classes"]
        fresh = checkpoint.start_from(modules, folder, same_classes=same_classes)
        log.info("Started from %s; fresh: %s.", folder, ", ".join(fresh) or "none")

    def _finish(self) -> dict[str, Any]:
        path = self.run_dir / RESULTS_FILE
        if not self._clock and path.is_file():  # resumed after its end: keep what was measured then
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["steps"] == self.progress.step:
                return found
        best_test = self.progress.best.get("test")
        results = {
            "last": self.progress.last.get("test"),
            "best_validation": self.progress.best.get("validation"),
            "best_test": None if best_test is None else best_test | {"note": SELECTION_NOTE},
            "steps": self.progress.step,
            "skipped_images": self.progress.skipped,
            "repaired_draws": self.progress.repaired,
            "seconds_per_step": self._clock.steady(),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        return results
