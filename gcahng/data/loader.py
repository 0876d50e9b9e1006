"""Loaders: plan -> requests -> worker processes -> batches, in the plan's order.

The main process plans and the workers read, decode and transform. Each request says everything
about its batch, so the batches do not depend on the number of workers, and a run that continues at
(epoch, batch) sees what it would have seen.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcahng.data.dataset import Batch, ImageSource, OnError, TrainImages
from gcahng.data.images.decode import MAX_PIXELS
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.plans.batch_plan import EpochPlan
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import make_plan
from gcahng.data.plans.windows import training_shards
from gcahng.data.ranks import rank_classes, rank_sizes
from gcahng.data.requests import Requests
from gcahng.data.workers import Failure, next_answer, requests_in_flight, worker_loader
from gcahng.errors import DataError, InputError

__all__ = ["Batch", "EpochLoader", "TrainLoader", "train_loader"]


class TrainLoader:
    """Batches of P classes x K samples, epoch after epoch, from one set of worker processes.

    With several ranks every rank has a loader of the same arguments but `rank`, and each yields its
    own classes of every batch: same number of batches everywhere, and the same global batches for any
    number of ranks. Nothing is exchanged.

    Args:
        shards: Where encoded images come from. If it has `expect(present, following)`, it is told
            which shards are read now and next.
        table: Training classes.
        seed: Seed of the run: decides plans, crops and flips.
        num_classes: P.
        num_samples: K.
        transform: Transforms of training images.
        sampler: Name or dotted path, see `gcahng.data.plans.plan.make_plan`.
        passes: Passes per epoch, for samplers that count in them.
        rank: Which part of each batch this loader yields, in 0..world_size-1.
        world_size: W, number of ranks.
        num_workers: Worker processes; 0 works in this process.
        on_error: "fail" or "skip", see `gcahng.data.dataset.TrainImages`.
        pin_memory: Put batches into page-locked memory (for copies to a CUDA device).
        max_pixels: Limit of a decoded image.
    Raises:
        InputError: P, K, the rank or `num_workers` is impossible, P < W, or `on_error` has another
            value.
        ConfigError: There is no such sampler, or it has no passes.

    Attributes:
        rank_sizes: (W,) classes of a batch that each rank holds.
    """

    def __init__(
        self,
        shards: ImageSource,
        table: ClassTable,
        *,
        seed: int,
        num_classes: int,
        num_samples: int,
        transform: TransformSettings,
        sampler: str = "uniform",
        passes: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        on_error: OnError = "fail",
        pin_memory: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise InputError(f"`on_error` must be 'fail' or 'skip', got {on_error!r}. Choose one.")
        self._table = table
        self._plan_options: dict[str, Any] = {
            "seed": seed,
            "num_classes": num_classes,
            "num_samples": num_samples,
            "sampler": sampler,
            "passes": passes,
        }
        self.rank_sizes = rank_sizes(num_classes, world_size)
        self.plan(0)  # a fault of the arguments is found now, not in the first epoch
        self._requests = Requests(
            rank_classes(num_classes, rank, world_size),
            getattr(shards, "expect", None),
            lambda: training_shards(table),
            requests_in_flight(num_workers),
        )
        images = TrainImages(shards, table, transform, seed, on_error, max_pixels)
        self._make_loader = partial(worker_loader, images, self._requests, num_workers, pin_memory, keep=True)
        self._loader = self._make_loader()

    def plan(self, epoch: int, class_centres: NDArray[np.floating[Any]] | None = None) -> EpochPlan:
        """The plan of an epoch, whole batches over all ranks."""
        return make_plan(self._table, epoch=epoch, class_centres=class_centres, **self._plan_options)

    def epoch_iterator(
        self, epoch: int, start_batch: int = 0, class_centres: NDArray[np.floating[Any]] | None = None
    ) -> "EpochLoader":
        """The batches of an epoch, from `start_batch` on.

        One epoch at a time: it becomes invalid when the next one is begun.

        Args:
            epoch: Counted from 0.
            start_batch: Batches to leave out, for a run that goes on in the middle of an epoch.
            class_centres: (N, D) mean embedding of each training class, for a sampler that puts
                similar classes together; the same on every rank.
        Raises:
            InputError: `start_batch` is not in 0..number of batches, the epoch is negative, or the
                centres have another shape.
        """
        plan = self.plan(epoch, class_centres)
        if not 0 <= start_batch <= len(plan):
            raise InputError(
                f"`start_batch` must be from 0 to {len(plan)}, got {start_batch}: epoch {epoch} "
                "has no such batch. Check that data set and batch size are those of the checkpoint."
            )
        return EpochLoader(self, plan, epoch, start_batch)

    def close(self) -> None:
        """End the worker processes; another epoch would start new ones."""
        self._loader = self._make_loader()

    def _run(self, plan: EpochPlan, epoch: int, start_batch: int) -> Iterator[Batch]:
        self._requests.begin(plan, epoch, start_batch)
        mine = self._requests.run
        answers = iter(self._loader)
        while (answer := next_answer(answers)) is not None:
            if isinstance(answer, Failure):
                # The traceback would keep the workers, and torch takes seconds to end each of them
                # once they are left to the garbage collector.
                del answers
                self.close()
                raise DataError(answer.message)
            yield answer
            if self._requests.run != mine:
                raise InputError(
                    f"The iterator of epoch {epoch} is no longer valid: another one of the same "
                    "TrainLoader was begun. Finish one before the next, or use two loaders."
                )


class EpochLoader:
    """The rest of one epoch; iterate it once. `len` is the number of batches left at its start."""

    def __init__(self, loader: TrainLoader, plan: EpochPlan, epoch: int, start_batch: int) -> None:
        self._loader = loader
        self._plan = plan
        self._epoch = epoch
        self._start_batch = start_batch

    def __len__(self) -> int:
        return len(self._plan) - self._start_batch

    def __iter__(self) -> Iterator[Batch]:
        return self._loader._run(self._plan, self._epoch, self._start_batch)


def train_loader(
    shards: ImageSource,
    table: ClassTable,
    *,
    seed: int,
    epoch: int,
    start_batch: int = 0,
    num_classes: int,
    num_samples: int,
    transform: TransformSettings,
    **options: Any,
) -> EpochLoader:
    """The batches of one epoch; `TrainLoader` keeps its workers over epochs.

    Args: see `TrainLoader`, whose other arguments are the `options`, and `TrainLoader.epoch_iterator`.
    """
    loader = TrainLoader(
        shards,
        table,
        seed=seed,
        num_classes=num_classes,
        num_samples=num_samples,
        transform=transform,
        **options,
    )
    return loader.epoch_iterator(epoch, start_batch)
