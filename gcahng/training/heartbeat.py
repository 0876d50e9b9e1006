"""The observer behind `status.json`: rank 0 says where the run stands (`gcahng.monitor.heartbeat`)."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from gcahng.monitor.heartbeat import Heartbeat
from gcahng.training.observers import RunFacts, RunObserver
from gcahng.training.progress import Progress
from gcahng.training.saving import Saved

_STEPS = 50  # that a mean of step times reaches back, about
_LONGEST_ERROR = 500


class HeartbeatObserver(RunObserver):
    """Tells a `Heartbeat` of each event."""

    def __init__(self) -> None:
        self._heartbeat: Heartbeat | None = None
        self._seconds = self._waited = 0.0
        self._steps = self._failures = 0
        self._evaluating_since: float | None = None

    def begin(self, facts: RunFacts, progress: Progress) -> None:
        config, now = facts.config, time.time()
        self._heartbeat = Heartbeat(
            facts.run_dir,
            state="running",
            activity="training",
            started=now,
            step_time=now,
            ranks=facts.ranks.size,
            device=str(facts.device),
            epochs=config.train.epochs,
            steps_per_epoch=facts.steps_per_epoch,
            images_per_step=config.batch.num_classes * config.batch.num_samples,
            evaluate_every_epochs=config.eval.every_epochs,
            resumed_at=progress.step or None,
            **_counters(progress),
        )

    def step(self, progress: Progress, seconds: float, waited: float, images: int) -> None:
        self._steps += 1
        share = 1 / min(self._steps, _STEPS)
        self._seconds += share * (seconds - self._seconds)
        self._waited += share * (waited - self._waited)
        means = {"step_seconds": self._seconds, "data_seconds": self._waited}
        self._note(activity="training", step_time=time.time(), **means, **_counters(progress))

    def logged(self, progress: Progress, values: Mapping[str, Any]) -> None:
        losses = {name: value for name, value in values.items() if name.endswith("_loss")}
        self._note(losses=losses, logged_step=progress.step, **_counters(progress))

    def evaluating(self, progress: Progress) -> None:
        self._evaluating_since = time.monotonic()
        self._now(activity="evaluating", **_counters(progress))

    def evaluated(self, progress: Progress, row: Mapping[str, Any]) -> None:
        if self._evaluating_since is not None:  # the rows of all splits come one after the other
            self._note(evaluation_seconds=time.monotonic() - self._evaluating_since)
            self._evaluating_since = None
        self._now(activity="training", step_time=time.time(), **_counters(progress), **_evaluations(progress))

    def dropped(self, progress: Progress, reason: str) -> None:
        self._now(**_counters(progress))

    def saved(self, progress: Progress, saved: Saved) -> None:
        if saved.error is None:
            self._now(checkpoint={"step": saved.step, "seconds": saved.seconds, "time": time.time()}, save_error=None)
        else:
            self._failures += 1
            self._now(failed_saves=self._failures, save_error=str(saved.error)[:_LONGEST_ERROR])

    def end(self, progress: Progress, status: str) -> None:
        if self._heartbeat is None:  # it failed before it began
            return
        error = sys.exception()  # the one that ends the run, if it does not end by itself
        text = None if error is None else f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
        self._heartbeat.stop(state=status, activity=None, error=text, **_counters(progress), **_evaluations(progress))

    def _note(self, **facts: Any) -> None:
        if self._heartbeat is not None:
            self._heartbeat.note(**facts)

    def _now(self, **facts: Any) -> None:
        if self._heartbeat is not None:
            self._heartbeat.now(**facts)


def _counters(progress: Progress) -> dict[str, int]:
    names = ("epoch", "batch", "step", "skipped", "repaired", "dropped")
    return {name: getattr(progress, name) for name in names}


def _evaluations(progress: Progress) -> dict[str, Any]:
    """Copies: the thread of the heartbeat reads them later."""
    return {"last": dict(progress.last), "best": dict(progress.best)}
