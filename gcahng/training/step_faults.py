"""What a run does about a step that met numbers that are not finite: undo it, keep it for a replay, go on or not.

Undone is what the failing pass and the batch have changed beside parameters: buffers of all parts (running statistics,
also of the passes before it) and what else their state dictionaries hold (the memory of a metric loss) are those from
before the step. Nothing has moved in the failing pass; what earlier passes of the same step have moved stays moved.
Epoch averages are added to at the end of a step, so a step that fails is not in them.

Letters: B samples of the global batch, W ranks with P_r classes each, K samples per class.
"""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcahng.data.ranks import rank_sizes
from gcahng.distributed import Ranks
from gcahng.distributed.agreement import agreed
from gcahng.distributed.rows import rows_on_first
from gcahng.distributed.shard_states import whole_state
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import Backend
from gcahng.training.config import Config, resolved_yaml
from gcahng.training.data_setup import RunData
from gcahng.training.finite_checks import MOST_AHEAD, NotFinite
from gcahng.training.kept_state import KeptState
from gcahng.training.sharded_parts import NODE_CLASSIFIER, joined
from gcahng.training.step_dump import Fault, StepDump, has_room, write_dump

PARTS = ("metric_model", "metric_loss", "graph", NODE_CLASSIFIER, "classifier", "generator")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BegunStep:
    """What is kept of a step until it is known to be good.

    Attributes:
        step: Global step.
        images, labels, rows: This rank's part of the batch, (K * P_r, ...).
        metric_loss, generation_loss: Means of the epoch before.
        state: Of the parts, beside parameters, from before the step.
        trace: What the later passes begin with, once the step knows it.
    """

    step: int
    images: Tensor
    labels: Tensor
    rows: Tensor
    metric_loss: float
    generation_loss: float
    state: KeptState
    trace: dict[str, Tensor] = field(default_factory=dict)


class StepFaults:
    """Keeps what the newest steps began with, and deals with those that fail."""

    def __init__(self, config: Config, backend: Backend, data: RunData, ranks: Ranks) -> None:
        self._config, self._backend, self._data, self._ranks = config, backend, data, ranks
        self._health = config.health
        self._modules = {name: backend.module(name) for name in PARTS if backend.has(name)}
        # Where a step's numbers are looked at once, no later finding can be about it.
        ahead = 0 if backend.checks.gate is None else MOST_AHEAD
        self._begun: deque[BegunStep] = deque(maxlen=ahead + 1)

    def begin(
        self, step: int, images: Tensor, labels: Tensor, rows: Tensor, averages: EpochAverages
    ) -> dict[str, Tensor] | None:
        """A step begins, arguments as in `BegunStep`; gives what it puts its trace into, if anything is kept."""
        if not self._health.skip_non_finite and not self._health.keep_dumps:
            return None
        full = len(self._begun) == self._begun.maxlen
        state = self._begun.popleft().state if full else KeptState(self._modules)
        state.take()
        means = averages.metric_loss, averages.generation_loss
        self._begun.append(BegunStep(step, images, labels, rows, *means, state))
        return self._begun[-1].trace

    def met(self, error: NotFinite) -> None:
        """Undo a step that failed and write it down; all ranks call it. Steps that were not begun here are left."""
        begun = next((one for one in self._begun if one.step == error.step), None)
        if begun is None:
            return
        begun.state.put_back()
        self._begun.clear()
        self._dump(begun, error)

    def left_out(self, dropped: int) -> bool:
        """Whether a step that failed is left out, `dropped` having been so far."""
        return dropped < self._health.skip_non_finite

    def _dump(self, begun: BegunStep, error: NotFinite) -> None:
        run_dir = Path(self._config.run.dir)
        room = self._ranks.first and has_room(run_dir, begun.step, self._health.keep_dumps)
        if not self._ranks.host_max([float(room)])[0]:
            return
        batch = {name: self._of_all(getattr(begun, name)) for name in ("images", "labels", "rows")}
        parts = joined({name: whole_state(module) for name, module in self._modules.items()})
        # The others wait: a rank that left meanwhile would have rank 0 ended.
        agreed(self._ranks, lambda: self._write(begun, error, batch, parts) if self._ranks.first else None)

    def _write(
        self,
        begun: BegunStep,
        error: NotFinite,
        batch: Mapping[str, Tensor | None],
        parts: dict[str, dict[str, Tensor]],
    ) -> None:
        found = {name: tensor for name, tensor in batch.items() if tensor is not None}
        if error.finding.reach != "metric":
            found |= begun.trace
        fault = self._fault(begun, error, found["rows"])
        folder = write_dump(Path(self._config.run.dir), StepDump(fault, resolved_yaml(self._config), found, parts))
        if folder is not None:
            log.error("Step %d is kept: python launch/replay.py %s", begun.step, folder)

    def _fault(self, begun: BegunStep, error: NotFinite, rows: Tensor) -> Fault:
        finding = error.finding
        warm_up: Any = getattr(self._modules["metric_model"], "warm_up", False)
        return Fault(
            step=begun.step,
            message=str(error),
            what=finding.what,
            reach=finding.reach,
            part=finding.part,
            positions=finding.positions,
            keys=tuple(self._data.shards.key(row) for row in rows.tolist()),
            class_counts=tuple(self._class_counts()),
            num_training_classes=self._data.table.num_classes,
            metric_loss=begun.metric_loss,
            generation_loss=begun.generation_loss,
            warm_up=bool(warm_up),
            precision=self._config.train.precision,
            device=begun.images.device.type,
        )

    def _class_counts(self) -> list[int]:
        return list(rank_sizes(self._config.batch.num_classes, self._ranks.size))

    def _of_all(self, own: Tensor) -> Tensor | None:
        """(B, ...) of the global batch, group-major, on rank 0's CPU, from each rank's (K * P_r, ...)."""
        rows = rows_on_first(
            own.detach().cpu().flatten(1) if own.dim() > 1 else own.detach().cpu()[:, None], self._ranks
        )
        if rows is None:
            return None
        num_samples = self._config.batch.num_samples
        parts = rows.view(-1, *own.shape[1:]).split([num_samples * count for count in self._class_counts()])
        by_group = [part.unflatten(0, (num_samples, -1)) for part in parts]
        return torch.cat(by_group, 1).flatten(0, 1)
