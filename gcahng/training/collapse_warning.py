"""A word about a model whose embeddings draw together, or fall into few directions, while it trains."""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gcahng.training.config import Config
from gcahng.training.observers import RunFacts, RunObserver
from gcahng.training.progress import Progress

# Of embeddings on a uniform sphere 1; docs/health.md has measured runs.
SMALLEST_STD = 0.1
# Of the directions that the classes of a batch can span; ops/alerts.yml has the same numbers.
SMALLEST_RANK_SHARE = 0.1
# A fresh model may begin anywhere: only steps behind these count, and so many logged ones in a row.
FIRST_STEP = 50
PATIENCE = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Signal:
    """A number of a logged step, the value under which it says collapse, and what that means and asks for."""

    name: str
    least: float
    meaning: str


def class_directions(config: Config) -> int:
    """How many directions the classes of a batch can span: P - 1, at most D."""
    return min(config.batch.num_classes - 1, config.model.embedding_dim)


class CollapseWarning(RunObserver):
    """Warns once, on rank 0, when a signal stays under its threshold and does not rise."""

    def __init__(self, config: Config) -> None:
        directions = class_directions(config)
        self._signals = (
            _Signal("embedding_std", SMALLEST_STD, "all embeddings point nearly the same way (1: a uniform sphere)"),
            _Signal(
                "effective_rank",
                SMALLEST_RANK_SHARE * directions,
                f"embeddings differ in next to no directions (the batch's classes can span {directions})",
            ),
        )
        self._metric = config.loss.metric
        self._low: dict[str, deque[float]] = {}
        self._silent = False

    def begin(self, facts: RunFacts, progress: Progress) -> None:
        self._silent = not facts.ranks.first
        self._low = {signal.name: deque(maxlen=PATIENCE) for signal in self._signals}

    def logged(self, progress: Progress, values: Mapping[str, Any]) -> None:
        if self._silent or progress.step < FIRST_STEP:
            return
        for signal in self._signals:
            low, value = self._low[signal.name], float(values[signal.name])
            if value >= signal.least:
                low.clear()
                continue
            low.append(value)
            # A model that begins there and leaves, however slowly, has not collapsed.
            if len(low) == PATIENCE and value <= low[0]:
                self._silent = True
                self._warn(signal, value, progress)
                return

    def _warn(self, signal: _Signal, value: float, progress: Progress) -> None:
        advice = "take loss.metric=shn or sct in place of hn, or lower" if self._metric == "hn" else "lower"
        log.warning(
            f"The model seems to have collapsed: {signal.name} is {value:.3g} at step {progress.step}, under "
            f"{signal.least:.3g} in {PATIENCE} logged steps and not rising, so that {signal.meaning}. Look at map_at_r "
            f"of the next evaluation; {advice} optim.metric_model.lr, and start the run anew "
            "(health.collapse_warning=false: no such warning)."
        )
