"""The training loop: epochs, logging, evaluation, checkpoints. The iteration itself is `step.py`.

A run folder holds `config.yaml` (resolved), `metrics.jsonl`, `hardness.jsonl`, `tensorboard/`, `step-N/` checkpoints
with the links `last`, `best` (by validation) and `best_test`, and `results.json` at the end.

With several ranks each runs this loop on its part of every batch; rank 0 writes, logs and shows bars. What all ranks
say to each other outside of a step happens at places that the step number fixes (each step's end, logged steps, ends of
epochs).
"""

import hashlib
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from gcahng.data.loader import Batch
from gcahng.distributed.agreement import agreed
from gcahng.distributed.batch_norm import share_buffers
from gcahng.distributed.failures import EACH_RANK
from gcahng.errors import Interrupted, TrainingError
from gcahng.training import checkpoint
from gcahng.training.averages import EpochAverages
from gcahng.training.config import Config, resolved_yaml
from gcahng.training.evaluate_checkpoint import embedding_settings
from gcahng.training.evaluation import as_row, evaluate, recall_at_1
from gcahng.training.hardness import HardnessRecord
from gcahng.training.interruption import Interruption, leave_marker, remove_marker
from gcahng.training.launched import Launched, local_rank
from gcahng.training.memory import peak_memory_bytes
from gcahng.training.observers import RunFacts, make_observers
from gcahng.training.parts import build_parts, build_step
from gcahng.training.progress import Progress
from gcahng.training.pull_hint import PullHint
from gcahng.training.random_states import seed_generators
from gcahng.training.results_file import RESULTS_FILE, read_results, write_results, write_whole
from gcahng.training.run_log import NoLog, RunLog, beside_the_bar
from gcahng.training.run_saver import RunSaver
from gcahng.training.run_start import alone, start_run
from gcahng.training.sharded_parts import saved_with
from gcahng.training.signals import Signals
from gcahng.training.step import TrainingStep
from gcahng.training.step_clock import StepClock
from gcahng.training.step_runner import StepRunner

log = logging.getLogger(__name__)
each_rank = logging.getLogger(EACH_RANK)

SELECTION_NOTE = "chosen on the test classes, as the papers' numbers are"


class Trainer:
    """Builds everything a configuration names and runs it."""

    def __init__(
        self,
        config: Config,
        *,
        launched: Launched | None = None,
        progress_bars: bool = True,
        overwrite: bool = False,
        signals: Signals | None = None,
    ) -> None:
        """
        Args:
            config: A checked configuration.
            launched: How this process was started; by default it is alone. All ranks make a Trainer.
            progress_bars: Show bars on stderr, on rank 0.
            overwrite: Replace a run that `run.dir` holds, when training starts.
            signals: Of a process that notes them from its start; by default `run` does.
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
        seed_generators(config.seed, self.ranks.rank)
        start = start_run(config, launched, overwrite=overwrite)
        self.data, self.loader, self._resume_from = start.data, start.loader, start.resume_from
        self.parts = build_parts(config, start.modules, self.device)
        step, self.backend = build_step(config, self.parts, launched)
        self.averages = EpochAverages()
        self.progress = Progress()
        self.steps = StepRunner(config, step, self.backend, self.data, self.ranks, self.averages)
        self.interruption = Interruption(self.ranks, signals)
        self.observers = make_observers(config, self.ranks)
        self._saver = RunSaver(config, self.parts, self.backend, self.ranks, self.device, start.data_identity)
        self._uncounted = [0, 0]  # skipped and repaired on this rank since the ranks' numbers were added up
        self._clock = StepClock()
        if self._resume_from is not None:
            self.progress = self._saver.load(self._resume_from, self.averages)

    def run(self) -> dict[str, Any]:
        """Train to the last epoch and return what `results.json` holds.

        Raises:
            Interrupted: A signal asked the run to end (only where this is the main thread); it is saved or has not
                begun, and the run folder has the marker `PREEMPTED`.
            TrainingError: The run cannot go on, or its last checkpoint could not be written.
        """
        status = "failed"
        # Ready for signals before the folder is touched.
        with self.interruption.signals.noted():
            try:
                self.interruption.check()
                with agreed(self.ranks, self._open_folder) as run_log:
                    self._begin(run_log)
                    self._train(run_log)
                    self._saver.finish()
                    agreed(self.ranks, run_log.finish)
                results = self._finish()
                status = "finished"
            except Interrupted as error:
                self._saver.finish()
                agreed(self.ranks, partial(self._leave_marker, error))
                status = "interrupted"
                raise
            finally:
                try:
                    self._saver.settle()
                finally:
                    self.observers.end(self.progress, status)
        return results

    @property
    def step(self) -> TrainingStep:
        """The iteration; `steps` runs it."""
        return self.steps.step

    def close(self) -> None:
        """Training has ended on every rank: let go of loaders and engines."""
        self.loader.close()
        self.backend.close()

    def _open_folder(self) -> RunLog | NoLog:
        """Prepare the run folder; its log goes on where the checkpoint was saved, or starts anew."""
        if not self.ranks.first:
            return NoLog()
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if self.overwrite:
                checkpoint.clear_run(self.run_dir)
            elif self._resume_from is not None:
                checkpoint.put_in_order(self.run_dir, self._resume_from)
            remove_marker(self.run_dir)
            write_whole(self.run_dir / checkpoint.CONFIG, resolved_yaml(self.config))
        except OSError as error:
            raise TrainingError(f"{self.run_dir} cannot be written ({error}): make room or repair the disk.") from error
        resumed = None if self._resume_from is None else self.progress.step
        # Saved behind the last batch of an epoch: what was evaluated at that step came later, and was not saved.
        evaluated = self.progress.evaluated() and not self.progress.batch
        return RunLog(self.run_dir, from_step=resumed, evaluated=evaluated, unwritten=self._saver.unwritten)

    def _leave_marker(self, error: Interrupted) -> None:
        if self.ranks.first:
            leave_marker(self.run_dir, error, self.progress)

    def _begin(self, run_log: RunLog | NoLog) -> None:
        steps = self._steps_of_epoch(len(self.loader.epoch_iterator(self.progress.epoch)))
        facts = RunFacts(self.config, self.run_dir, self.ranks, self.device, local_rank(), steps)
        self._saver.watch(self.observers, self.progress, run_log)
        self.observers.begin(facts, self.progress)

    def _steps_of_epoch(self, batches: int) -> int:
        limit = self.config.train.max_steps_per_epoch
        return batches if limit is None else min(limit, batches)

    def _train(self, run_log: RunLog | NoLog) -> None:
        pull_hint = PullHint(self.config)
        if self._resume_from is not None and self._evaluation_is_due() and not self.progress.batch:
            self._evaluate_and_save(run_log)  # the run ended in it
        for epoch in range(self.progress.epoch, self.config.train.epochs):
            self._train_epoch(epoch, run_log)
            pull_hint.end_epoch(self.averages, epoch)
            for schedule in self.parts.schedules.values():
                schedule.step()
            self.progress.epoch, self.progress.batch = epoch + 1, 0
            self._evaluate_and_save(run_log)

    def _train_epoch(self, epoch: int, run_log: RunLog | NoLog) -> None:
        """The batches of an epoch that have not been trained on yet."""
        self.parts.metric_model.set_warm_up(epoch < self.config.train.warm_up_epochs)
        first = self.progress.batch
        batches = self.loader.epoch_iterator(epoch, first)
        total = self._steps_of_epoch(first + len(batches))
        if first >= total:
            return
        bar = tqdm(
            total=total,
            initial=first,
            desc=f"epoch {epoch + 1}/{self.config.train.epochs}",
            unit="step",
            leave=False,
            disable=not self.bars,
        )
        with bar:
            started = time.perf_counter()
            for number, batch in enumerate(batches, first + 1):
                loaded = time.perf_counter()
                values = self._train_batch(batch, number, epoch, run_log)
                ended = time.perf_counter()
                self._clock.add(ended - started, loaded - started)
                self.observers.step(self.progress, ended - started, loaded - started, len(batch.labels))
                if values is not None or self.backend.checks.gate is None:
                    self._clock.settle()
                if values is not None:
                    bar.set_postfix(beside_the_bar(self._log_step(values, epoch, run_log)), refresh=False)
                bar.update()
                self._between_steps(number < total)
                started = time.perf_counter()
                if number >= total:
                    break
            self.steps.finish_checks()
            self._clock.settle(time.perf_counter() - started)

    def _train_batch(
        self, batch: Batch, number: int, epoch: int, run_log: RunLog | NoLog
    ) -> Mapping[str, float] | None:
        """One step on the epoch's `number`-th batch; its numbers if they are logged."""
        for problem in batch.problems:
            each_rank.warning("Skipped: %s", problem)
        self._uncounted[0] += batch.skipped
        self._uncounted[1] += batch.repaired
        # Labels and rows are looked at on the CPU; the step sends the labels on.
        images = batch.images.to(self.device, non_blocking=True)
        record = self._hardness_record(number)
        dropped = self.progress.dropped
        report = self.steps.run(images, batch.labels, batch.rows, self.progress.step, record, dropped)
        self.progress.step += 1
        self.progress.batch = number
        if report is None:
            self.progress.dropped += 1
            run_log.write("dropped", self.progress.step, {"epoch": epoch, "reason": self.steps.left_out})
            self.observers.dropped(self.progress, self.steps.left_out)
            return None
        values = self.steps.read(report, record) if self._is_logged(self.progress.step) else None
        if record is not None and record.edges:
            self.steps.finish_checks()
            run_log.write_hardness(self.progress.step, {"epoch": epoch} | record.row())
        return values

    def _between_steps(self, within_epoch: bool) -> None:
        """Save where it is time; end where a signal asked for it."""
        every = self.config.train.save_every_steps
        interrupted = self.interruption.agreed()
        if interrupted or (within_epoch and every is not None and self.progress.step % every == 0):
            self._save()
        else:
            self._saver.tell()
        if interrupted:
            raise self.interruption.error()

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
        """One step on a batch, as `StepRunner.run_alone` has it, at the run's present step."""
        return self.steps.run_alone(images, labels, rows, self.progress.step, record)

    def _count(self) -> None:
        """Add up what the ranks counted since the last time."""
        skipped, repaired = self.ranks.host_sum(self._uncounted)
        self.progress.skipped += int(skipped)
        self.progress.repaired += int(repaired)
        self._uncounted = [0, 0]

    def _log_step(self, report: Mapping[str, float], epoch: int, run_log: RunLog | NoLog) -> Mapping[str, float]:
        values: dict[str, Any] = dict(report)
        values["samples"] = hashlib.sha256(self.steps.newest_rows().numpy().tobytes()).hexdigest()[:16]
        self._count()
        values["skipped_images"] = self.progress.skipped
        values["repaired_draws"] = self.progress.repaired
        for name, optimizer in self.parts.optimizers.items():
            values[f"lr_{saved_with(name)}"] = float(optimizer.param_groups[0]["lr"])
        seconds = self.ranks.host_max(self._clock.recent(self.config.train.log_every))
        values["step_seconds"], values["data_seconds"] = seconds
        run_log.write("step", self.progress.step, {"epoch": epoch} | values)
        self.observers.logged(self.progress, values)
        return report

    def _evaluate_and_save(self, run_log: RunLog | NoLog) -> None:
        """Save the finished epoch; if it is time evaluate it, and save what that found."""
        if self._evaluation_is_due():
            # First, so that an evaluation that fails or is killed costs no epoch: a resume evaluates at once. Older
            # checkpoints stay, since this one may hold a model that diverged.
            self._save(keep_all=True)
            self._evaluate(run_log)
        self._save()

    def _evaluation_is_due(self) -> bool:
        epoch = self.progress.epoch
        return not self.progress.evaluated() and (
            epoch % self.config.eval.every_epochs == 0 or epoch == self.config.train.epochs
        )

    def _evaluate(self, run_log: RunLog | NoLog) -> None:
        """Evaluate all splits, then log them and note what is best so far."""
        self.observers.evaluating(self.progress)
        settings = embedding_settings(
            self.config, device=self.device, progress_bars=self.bars, between_batches=self.interruption.poll
        )
        if self.config.local_statistics:
            share_buffers(self.parts.metric_model, self.ranks)
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
            score: list[float] = [row["map_at_r"]]
            if split == "test":
                score.insert(0, recall_at_1(result))
            self.progress.note_evaluation(split, row, score)
            self.observers.evaluated(self.progress, row)

    def _save(self, *, keep_all: bool = False) -> None:
        """A checkpoint of what has been trained so far; all ranks call it."""
        self.steps.finish_checks()
        self._count()
        self._saver.save(self.progress, self.averages, keep_all=keep_all)

    def _finish(self) -> dict[str, Any]:
        """What `results.json` holds; rank 0 writes it, and all know whether it could."""
        path = self.run_dir / RESULTS_FILE
        seconds = self.ranks.host_max([self._clock.steady() or 0.0])[0] if self._clock else None
        peak_memory = int(self.ranks.host_max([peak_memory_bytes(self.device)])[0])
        # Resumed after its end: keep what was measured then. Rank 0 reads, before it may write the file.
        if not self._clock:
            found = self.ranks.all_of(read_results(path) if self.ranks.first else {})[0]
            if found.get("steps") == self.progress.step:
                return found
        best_test = self.progress.best.get("test")
        results = {
            "last": self.progress.last.get("test"),
            "best_validation": self.progress.best.get("validation"),
            "best_test": None if best_test is None else best_test | {"note": SELECTION_NOTE},
            "steps": self.progress.step,
            "skipped_images": self.progress.skipped,
            "repaired_draws": self.progress.repaired,
            "dropped_steps": self.progress.dropped,
            "seconds_per_step": seconds,
            "peak_memory_bytes": peak_memory,
        }
        agreed(self.ranks, lambda: write_results(path, results) if self.ranks.first else None)
        return results
