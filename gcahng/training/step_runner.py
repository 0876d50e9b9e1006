"""One step after another: inputs, draws that depend on the step alone, and faults with their samples named."""

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
from gcahng.training.finite_checks import MOST_AHEAD, NonFiniteEmbedding
from gcahng.training.hardness import HardnessRecord
from gcahng.training.step import TrainingStep


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

    def run(
        self, images: Tensor, labels: Tensor, rows: Tensor, step: int, record: HardnessRecord | None = None
    ) -> dict[str, Tensor]:
        """One step on a batch.

        Args:
            images: (K * P_r, 3, H, W) uint8 on the run's device: this rank's part.
            labels, rows: (K * P_r,) int64, best left on the CPU.
            step: Global step.
            record: Takes the hardness of the batch.
        """
        self._recent.append((step, rows))
        inputs = normalise(images, self._data.transform)
        # Dropout or stochastic depth inside a backbone draws from torch's generators: make them, too, a function of
        # the step, so that a resumed run draws what the undisturbed one would have; each rank for its own images.
        torch.manual_seed(stream_key(self._config.seed, "model", step, self.ranks.rank) >> 1)
        with self._samples_named():
            return self.step(inputs, labels, self._averages, step=step, record=record)

    def finish_checks(self) -> None:
        """Wait for the steps so far, and raise if one of them met numbers that are not finite."""
        with self._samples_named():
            self._backend.checks.finish()

    def read(self, report: Mapping[str, Tensor]) -> dict[str, float]:
        """A report's numbers: one wait for the device, and no number of a step that is not to be trusted."""
        self.finish_checks()
        numbers = torch.stack([value.double() for value in report.values()]).tolist()
        return dict(zip(report, numbers, strict=True))

    def newest_rows(self) -> Tensor:
        """(B,) rows of the newest step's global batch, group-major; all ranks call it."""
        return self._rows_of_all(self._recent[-1][1])

    @contextmanager
    def _samples_named(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteEmbedding as error:
            # Met on all ranks, in the same step: the positions are those of the global batch.
            rows = self._rows_of_all(next(rows for step, rows in self._recent if step == error.step))
            keys = [self._data.shards.key(int(rows[p])) for p in error.positions[:5]]
            raise TrainingError(f"{error} Samples: {', '.join(keys)}.") from error

    def _rows_of_all(self, own: Tensor) -> Tensor:
        """(B,) rows of the global batch, group-major, from each rank's (K * P_r,)."""
        parts = self.ranks.all_of(own.cpu().reshape(self._config.batch.num_samples, -1))
        return torch.cat(parts, 1).flatten()
