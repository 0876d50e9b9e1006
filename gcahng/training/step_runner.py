"""One step after another: inputs, draws that depend on the step alone, and faults with their samples named."""

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gcahng.data.images.transforms import normalise
from gcahng.distributed import Ranks
from gcahng.errors import TrainingError
from gcahng.random import stream_key
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import Backend
from gcahng.training.config import Config
from gcahng.training.data_setup import RunData
from gcahng.training.finite_checks import MOST_AHEAD, NonFiniteEmbedding, NotFinite, host_numbers
from gcahng.training.hardness import HardnessRecord
from gcahng.training.step import TrainingStep
from gcahng.training.step_faults import StepFaults

log = logging.getLogger(__name__)


class StepRunner:
    """Runs the training step on batches of the loader."""

    def __init__(
        self,
        config: Config,
        step: TrainingStep,
        backend: Backend,
        data: RunData,
        ranks: Ranks,
        averages: EpochAverages,
    ) -> None:
        self.step = step
        self.ranks = ranks
        self._config, self._backend, self._data, self._averages = config, backend, data, averages
        # (step, rows of its batch) of the steps that a late finding may be about.
        self._recent: deque[tuple[int, Tensor]] = deque(maxlen=MOST_AHEAD + 1)
        self._faults = StepFaults(config, backend, data, ranks)
        self.left_out = ""  # why the newest step was, if it was

    def run(
        self, images: Tensor, labels: Tensor, rows: Tensor, step: int, record: HardnessRecord | None, dropped: int
    ) -> dict[str, Tensor] | None:
        """One step of a run; None if it met numbers that are not finite and was left out, as `health` allows.

        Args:
            images, labels, rows, step, record: As for `run_alone`.
            dropped: Steps of the run left out so far.
        """
        try:
            trace = self._faults.begin(step, images, labels, rows, self._averages)
            return self._run(images, labels, rows, step, record, trace)
        except TrainingError as error:
            fault = error if isinstance(error, NotFinite) else error.__cause__
            if not isinstance(fault, NotFinite) or not self._config.health.skip_non_finite:
                raise
            if not self._faults.left_out(dropped):
                most = self._config.health.skip_non_finite
                raise TrainingError(
                    f"{error} {dropped} steps were left out before (health.skip_non_finite={most})."
                ) from error
            self.left_out = str(error)
            log.warning("Left out: %s", error)
            return None

    def run_alone(
        self, images: Tensor, labels: Tensor, rows: Tensor, step: int, record: HardnessRecord | None = None
    ) -> dict[str, Tensor]:
        """One step that is no part of a run: numbers that are not finite are an error, and nothing is written of them.

        Args:
            images: (K * P_r, 3, H, W) uint8 on the run's device: this rank's part.
            labels, rows: (K * P_r,) int64, best left on the CPU.
            step: Global step.
            record: Takes the hardness of the batch.
        """
        return self._run(images, labels, rows, step, record, None)

    def _run(
        self,
        images: Tensor,
        labels: Tensor,
        rows: Tensor,
        step: int,
        record: HardnessRecord | None,
        trace: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        self._recent.append((step, rows))
        inputs = normalise(images, self._data.transform)
        # Dropout or stochastic depth inside a backbone draws from torch's generators: make them, too, a function of
        # the step, so that a resumed run draws what the undisturbed one would have; each rank for its own images.
        torch.manual_seed(model_seed(self._config.seed, step, self.ranks.rank))
        with self._faults_met():
            return self.step(inputs, labels, self._averages, step=step, record=record, trace=trace)

    def finish_checks(self) -> None:
        """Wait for the steps so far, and raise if one of them met numbers that are not finite."""
        with self._faults_met():
            self._backend.checks.finish()

    def read(self, report: Mapping[str, Tensor], record: HardnessRecord | None = None) -> dict[str, float]:
        """A report's numbers: one wait for the device, and no number of a step that is not to be trusted.

        Args:
            report: What the step gave.
            record: What the step was given; adds what is computed on the host.
        """
        self.finish_checks()
        unread = None if record is None else record.unread
        pieces = [torch.stack([value.double() for value in report.values()])]
        if record is None or unread is None:
            return dict(zip(report, pieces[0].tolist(), strict=True))
        numbers = torch.cat([*pieces, unread.flatten()]).cpu()
        values = dict(zip(report, host_numbers(numbers[: len(report)]), strict=True))
        return values | record.late_signals(numbers[len(report) :].view_as(unread))

    def newest_rows(self) -> Tensor:
        """(B,) rows of the newest step's global batch, group-major; all ranks call it."""
        return self._rows_of_all(self._recent[-1][1])

    @contextmanager
    def _faults_met(self) -> Iterator[None]:
        try:
            yield
        except NotFinite as error:
            # Met on all ranks, in the same step: the positions are those of the global batch.
            self._faults.met(error)
            if not isinstance(error, NonFiniteEmbedding):
                raise
            rows = self._rows_of_all(next(rows for step, rows in self._recent if step == error.step))
            keys = [self._data.shards.key(int(rows[p])) for p in error.positions[:5]]
            raise TrainingError(f"{error} Samples: {', '.join(keys)}.") from error

    def _rows_of_all(self, own: Tensor) -> Tensor:
        """(B,) rows of the global batch, group-major, from each rank's (K * P_r,)."""
        parts = self.ranks.all_of(own.cpu().reshape(self._config.batch.num_samples, -1))
        return torch.cat(parts, 1).flatten()


def model_seed(seed: int, step: int, rank: int) -> int:
    """Of torch's generators in the forward pass of a step, each rank for its own images."""
    return stream_key(seed, "model", step, rank) >> 1
