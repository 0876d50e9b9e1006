"""The training loop: epochs, logging, evaluation, checkpoints. The iteration itself is `step.py`.

A run folder holds `config.yaml` (resolved), `metrics.jsonl`, `hardness.jsonl`, `tensorboard/`, `step-N/` checkpoints
with the links `last`, `best` (by validation) and `best_test`, and `results.json` at the end.

With several ranks each runs this loop on its part of every batch; rank 0 writes, logs and shows bars. What all ranks
say to each other outside of a step happens at places that the step number fixes (logged steps, ends of epochs).
"""

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gcahng.data.images.transforms import normalise
from gcahng.distributed.agreement import agreed, raised_by_all
from gcahng.distributed.batch_norm import share_buffers
from gcahng.distributed.failures import EACH_RANK
from gcahng.errors import TrainingError
from gcahng.random import stream_key
from gcahng.training import checkpoint
from gcahng.training.averages import EpochAverages
from gcahng.training.config import Config, resolved_yaml
from gcahng.training.evaluate_checkpoint import embedding_settings
from gcahng.training.evaluation import as_row, evaluate, recall_at_1
from gcahng.training.finite_checks import MOST_AHEAD, NonFiniteEmbedding
from gcahng.training.hardness import HardnessRecord
from gcahng.training.launched import Launched
from gcahng.training.memory import peak_memory_bytes
from gcahng.training.parts import build_parts, build_step
from gcahng.training.pull_hint import PullHint
from gcahng.training.run_log import NoLog, RunLog, beside_the_bar
from gcahng.training.run_start import alone, start_run
from gcahng.training.run_state import load_optimizers, load_schedules, schedule_states, whole_states
from gcahng.training.sharded_parts import saved_with
from gcahng.training.step_clock import StepClock

log = logging.getLogger(__name__)
each_rank = logging.getLogger(EACH_RANK)

RESULTS_FILE = "results.json"
SELECTION_NOTE = "chosen on the test classes, as the papers' numbers are"


@dataclass
class Progress:
    """Where a run stands; saved in `state.json`.

    Attributes:
        epoch: Epochs finished.
        step: Iterations finished.
        skipped: Unreadable images replaced so far, on all ranks.
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

    def __init__(
        self,
        config: Config,
        *,
        launched: Launched | None = None,
        progress_bars: bool = True,
        overwrite: bool = False,
    ) -> None:
        """
        Args:
            config: A checked configuration.
            launched: How this process was started; by default it is alone. All ranks make a Trainer.
            progress_bars: Show bars on stderr, on rank 0.
            overwrite: Replace a run that `run.dir` holds, when training starts.
        Raises:
            InputError: Data, weights or settings cannot be used, or differ between ranks; nothing has been written.
        """
        launched = alone(config) if launched is None else launched
        self.config = config
        self.ranks = launched.ranks
        self.bars = progress_bars and self.ranks.first
        self.overwrite = overwrite
        self.run_dir = Path(config.run.dir)
        self.device = launched.device
        start = start_run(config, launched, overwrite=overwrite)
        self.data, self.loader, self._resume_from = start.data, start.loader, start.resume_from
        self._data_identity = start.data_identity
        self.parts = build_parts(config, start.modules, self.device)
        self.step, self.backend = build_step(config, self.parts, launched)
        self.averages = EpochAverages()
        self.progress = Progress()
        self._uncounted = [0, 0]  # skipped and repaired on this rank since the ranks' numbers were added up
        self._clock = StepClock()
        # (step, rows of its batch) of the steps that a late finding may be about.
        self._recent: deque[tuple[int, Tensor]] = deque(maxlen=MOST_AHEAD + 1)
        if self._resume_from is not None:
            self._load(self._resume_from)

    def run(self) -> dict[str, Any]:
        """Train to the last epoch and return what `results.json` holds."""
        resumed = self.progress.step if self._resume_from is not None else None
        pull_hint = PullHint(self.config)
        with agreed(self.ranks, lambda: self._open_folder(resumed)) as run_log:
            if resumed is not None and self._evaluation_is_due():  # the run ended in it
                self._evaluate_and_save(run_log)
            for epoch in range(self.progress.epoch, self.config.train.epochs):
                self._train_epoch(epoch, run_log)
                pull_hint.end_epoch(self.averages, epoch)
                for schedule in self.parts.schedules.values():
                    schedule.step()
                self.progress.epoch = epoch + 1
                self._evaluate_and_save(run_log)
        return self._finish()

    def close(self) -> None:
        """Training has ended on every rank: let go of loaders and engines."""
        self.loader.close()
        self.backend.close()

    def _open_folder(self, resumed: int | None) -> RunLog | NoLog:
        """Prepare the run folder; its log goes on at step `resumed`, or starts anew."""
        if not self.ranks.first:
            return NoLog()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.overwrite:
            checkpoint.clear_run(self.run_dir)
        (self.run_dir / checkpoint.CONFIG).write_text(resolved_yaml(self.config), encoding="utf-8")
        return RunLog(self.run_dir, from_step=resumed)

    def _train_epoch(self, epoch: int, run_log: RunLog | NoLog) -> None:
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
                    each_rank.warning("Skipped: %s", problem)
                self._uncounted[0] += batch.skipped
                self._uncounted[1] += batch.repaired
                # Labels and rows are looked at on the CPU; the step sends the labels on.
                images = batch.images.to(self.device, non_blocking=True)
                record = self._hardness_record(number)
                report = self.run_step(images, batch.labels, batch.rows, record)
                self.progress.step += 1
                values = self._read(report) if self._is_logged(self.progress.step) else None
                if record is not None and record.edges:
                    self.finish_checks()
                    run_log.write_hardness(self.progress.step, {"epoch": epoch} | record.row())
                ended = time.perf_counter()
                self._clock.add(ended - started, loaded - started)
                if values is not None or self.backend.checks.gate is None:
                    self._clock.settle()
                if values is not None:
                    self._log_step(values, epoch, run_log)
                    bar.set_postfix(beside_the_bar(values), refresh=False)
                bar.update()
                started = time.perf_counter()
                if number >= total:
                    break
            self.finish_checks()
            self._clock.settle(time.perf_counter() - started)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0

    def _hardness_record(self, number: int) -> HardnessRecord | None:
        """What the next step is to measure, the `number`-th of its epoch; the same on all ranks."""
        every = self.config.train.record_every
        edges = number == 1 if every is None else every > 0 and self.progress.step % every == 0
        if not edges and not self._is_logged(self.progress.step + 1):
            return None
        return HardnessRecord(edges=edges, reduce=self.ranks.sum)

    def run_step(
        self, images: Tensor, labels: Tensor, rows: Tensor, record: HardnessRecord | None = None
    ) -> dict[str, Tensor]:
        """One step on a batch.

        Args:
            images: (K * P_r, 3, H, W) uint8 on the run's device: this rank's part.
            labels, rows: (K * P_r,) int64, best left on the CPU.
            record: Takes the hardness of the batch.
        """
        self._recent.append((self.progress.step, rows))
        inputs = normalise(images, self.data.transform)
        # Dropout or stochastic depth inside a backbone draws from torch's generators: make them, too, a function of
        # the step, so that a resumed run draws what the undisturbed one would have; each rank for its own images.
        torch.manual_seed(stream_key(self.config.seed, "model", self.progress.step, self.ranks.rank) >> 1)
        with self._samples_named():
            return self.step(inputs, labels, self.averages, step=self.progress.step, record=record)

    def finish_checks(self) -> None:
        """Wait for the steps so far, and raise if one of them met numbers that are not finite."""
        with self._samples_named():
            self.backend.checks.finish()

    @contextmanager
    def _samples_named(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteEmbedding as error:
            # Met on all ranks, in the same step: the positions are those of the global batch.
            rows = self._rows_of_all(next(rows for step, rows in self._recent if step == error.step))
            keys = [self.data.shards.key(int(rows[p])) for p in error.positions[:5]]
            raise TrainingError(f"{error} Samples: {', '.join(keys)}.") from error

    def _rows_of_all(self, own: Tensor) -> Tensor:
        """(B,) rows of the global batch, group-major, from each rank's (K * P_r,)."""
        parts = self.ranks.all_of(own.cpu().reshape(self.config.batch.num_samples, -1))
        return torch.cat(parts, 1).flatten()

    def _read(self, report: Mapping[str, Tensor]) -> dict[str, float]:
        """A report's numbers: one wait for the device, and no number of a step that is not to be trusted."""
        self.finish_checks()
        numbers = torch.stack([value.double() for value in report.values()]).tolist()
        return dict(zip(report, numbers, strict=True))

    def _count(self) -> None:
        """Add up what the ranks counted since the last time."""
        skipped, repaired = self.ranks.host_sum(self._uncounted)
        self.progress.skipped += int(skipped)
        self.progress.repaired += int(repaired)
        self._uncounted = [0, 0]

    def _log_step(self, report: Mapping[str, float], epoch: int, run_log: RunLog | NoLog) -> None:
        values: dict[str, Any] = dict(report)
        rows = self._rows_of_all(self._recent[-1][1])
        values["samples"] = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
        self._count()
        values["skipped_images"] = self.progress.skipped
        values["repaired_draws"] = self.progress.repaired
        for name, optimizer in self.parts.optimizers.items():
            values[f"lr_{saved_with(name)}"] = float(optimizer.param_groups[0]["lr"])
        seconds = self.ranks.host_max(self._clock.recent(self.config.train.log_every))
        values["step_seconds"], values["data_seconds"] = seconds
        run_log.write("step", self.progress.step, {"epoch": epoch} | values)

    def _evaluate_and_save(self, run_log: RunLog | NoLog) -> None:
        """Evaluate the finished epoch if it is time, and save it, whatever becomes of the evaluation."""
        if self._evaluation_is_due():
            try:
                self._evaluate(run_log)
            except BaseException as error:
                # The epoch is not lost to an unreadable test image or Ctrl-C: a resume evaluates it first. Older
                # checkpoints stay too, since this one may hold a model that diverged. Saving takes all ranks: of
                # several, only what all of them met leaves them able to.
                if self.ranks.size == 1 or raised_by_all(error):
                    self._save(keep_all=True)
                raise
        self._save()

    def _evaluation_is_due(self) -> bool:
        epoch = self.progress.epoch
        done = self.progress.last.get("test", {}).get("epoch") == epoch
        return not done and (epoch % self.config.eval.every_epochs == 0 or epoch == self.config.train.epochs)

    def _evaluate(self, run_log: RunLog | NoLog) -> None:
        """Evaluate all splits, then log them and note what is best so far."""
        settings = embedding_settings(self.config, device=self.device, progress_bars=self.bars)
        self._share_buffers()
        splits: dict[str, Any] = {"test": None}
        if self.data.validation_rows.size:
            splits["validation"] = self.data.validation_rows
        model, shards = self.parts.metric_model, self.data.shards
        # No row before all are there: a failure in between must leave nothing that a resume would log again.
        results = {
            split: evaluate(model, shards, self.config.eval, settings, rows=rows, ranks=self.ranks)
            for split, rows in splits.items()
        }
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

    def _share_buffers(self) -> None:
        """Rank 0's running statistics for all, where each rank has gathered its own."""
        if self.config.distributed.batch_norm == "local" or self.config.accumulation.microbatch_statistics:
            share_buffers(self.parts.metric_model, self.ranks)

    def _save(self, *, keep_all: bool = False) -> None:
        """Collect the state from all ranks; rank 0 writes, and all know whether it could."""
        self.finish_checks()
        self._count()
        self._share_buffers()
        modules, optimizers = whole_states(self.parts, self.backend)

        def write() -> None:
            if self.ranks.first:
                self._write(modules, optimizers, keep_all)

        agreed(self.ranks, write)

    def _write(
        self,
        modules: Mapping[str, Mapping[str, Tensor]],
        optimizers: Mapping[str, Mapping[str, Any]],
        keep_all: bool,
    ) -> None:
        folder = checkpoint.save_checkpoint(
            self.run_dir,
            self.progress.step,
            modules=modules,
            optimizers=optimizers,
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
            "schedules": schedule_states(self.parts),
            "backend": self.backend.state_dict(),
            "data": self._data_identity,
        }

    def _load(self, folder: Path) -> None:
        """Go on from a checkpoint whose weights the parts have already."""
        state = checkpoint.read_state(folder)
        load_optimizers(folder, self.parts, self.backend, self.ranks)
        load_schedules(state["schedules"], self.parts)
        self.averages.load_state_dict(state["averages"])
        self.backend.load_state_dict(state["backend"])
        self.progress = Progress(**state["progress"])
        log.info("Resumed from %s: epoch %d, step %d.", folder, self.progress.epoch, self.progress.step)

    def _finish(self) -> dict[str, Any]:
        path = self.run_dir / RESULTS_FILE
        seconds = self.ranks.host_max([self._clock.steady() or 0.0])[0] if self._clock else None
        peak_memory = int(self.ranks.host_max([peak_memory_bytes(self.device)])[0])
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
            "seconds_per_step": seconds,
            "peak_memory_bytes": peak_memory,
        }
        if not self.ranks.first:
            return results
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        return results
