"""What each of W ranks does in the tests of exactness: run cases, compare them with one process, break things."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from exact_cases import ExactCase, MakeBackend, errors_by_kind, plain, run_case, too_large
from exact_sums import WrongSums, wrong_sums
from maths_cases import OWN_PATHS
from torch import Tensor, nn
from torch.optim import Optimizer

import gcahng.training.step as step_module
from gcahng.data.ranks import rank_classes
from gcahng.distributed import Ranks
from gcahng.errors import InputError
from gcahng.graph import PairPlan
from gcahng.graph.pairs import chunked
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import Backend
from gcahng.training.launched import Launched
from gcahng.training.optimizers import PassGate
from gcahng.training.step import TrainingStep

Errors = dict[str, tuple[float, str]]

# Errors above it are no rounding.
NOTICED = 1e-6


@dataclass(frozen=True)
class Found:
    """How a case went on one rank.

    Attributes:
        case: Which.
        errors: Against one process, the largest of each kind of quantity and whose it is.
        digest: Of every bit of losses, gradients, parameters and buffers.
        same_bits: Whether one process has the very same.
    """

    case: str
    errors: Errors
    digest: str
    same_bits: bool


@dataclass(frozen=True)
class InFloat32:
    """Errors against float64 of the ranks, and of one process with the plain list of all edges."""

    case: str
    ours: Errors
    plain: Errors


@dataclass(frozen=True)
class FaultyBatches:
    """Errors of batches that are not as planned, and how the case went in between them."""

    messages: list[str]
    errors: Errors


@dataclass(frozen=True)
class Report:
    """Everything that one rank found."""

    cases: list[Found]
    controls: dict[str, Errors]
    sums: WrongSums | None
    faulty: FaultyBatches | None
    in_float32: list[InFloat32]


def exactness(ranks: Ranks, cases: Sequence[ExactCase], low_cases: Sequence[ExactCase], controls: bool) -> Report:
    """All comparisons of one group of processes.

    Args:
        ranks: All of them.
        cases: Compared in float64.
        low_cases: Compared in float32.
        controls: Whether to break things, too.
    """
    make_backend = over_ranks(ranks)
    one_step = [replace(case, steps=1) for case in cases if case.num_classes < 10]
    return Report(
        compare(ranks, cases, make_backend),
        run_controls(ranks, make_backend) if controls else {},
        wrong_sums(ranks, one_step, make_backend, NOTICED) if controls and ranks.size == 2 else None,
        faulty_batches(ranks, make_backend) if controls else None,
        [in_float32(ranks, case, make_backend) for case in low_cases],
    )


def check_cases(reports: list[Report], count: int) -> None:
    """Every rank has one process's numbers, and all ranks have the same bits."""
    for ranks_found in zip(*(report.cases for report in reports), strict=True):
        assert len({found.digest for found in ranks_found}) == 1, ranks_found[0].case
        for found in ranks_found:
            assert found.errors.keys() >= {"loss", "gradient:metric_model", "parameter:metric_model"}
            assert too_large(found.errors, OWN_PATHS) == {}, found.case
            assert found.same_bits or len(reports) > 1, found.case
    assert len(reports[0].cases) == count


def compare(ranks: Ranks, cases: Sequence[ExactCase], make_backend: MakeBackend) -> list[Found]:
    """Cases over ranks against one process; each rank is the one process of every W-th case."""
    found = []
    for start in range(0, len(cases), ranks.size):
        turn = cases[start : start + ranks.size]
        wanted = ranks.all_of(run_case(turn[ranks.rank]) if ranks.rank < len(turn) else None)
        for case, want in zip(turn, wanted, strict=False):
            assert want is not None
            got = run_case(case, ranks, make_backend)
            digest = got.digest()
            found.append(Found(str(case), errors_by_kind(got, want), digest, digest == want.digest()))
    return found


def in_float32(ranks: Ranks, case: ExactCase, make_backend: MakeBackend) -> InFloat32:
    low = replace(case, dtype=torch.float32)
    exact = run_case(case)
    ours, by_list = run_case(low, ranks, make_backend), run_case(replace(low, backend="scatter"))
    return InFloat32(str(case), errors_by_kind(ours, exact), errors_by_kind(by_list, exact))


def over_ranks(ranks: Ranks) -> MakeBackend:
    """DDP as a launched run has it; for one rank the plain backend."""
    if ranks.size == 1:
        return plain
    from accelerate import Accelerator

    from gcahng.training.ddp_backend import DistributedBackend

    # What a launcher would say; the process group is there already.
    said = {"RANK": ranks.rank, "LOCAL_RANK": ranks.rank, "WORLD_SIZE": ranks.size, "LOCAL_WORLD_SIZE": ranks.size}
    os.environ.update({name: str(value) for name, value in said.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == ranks.size
    launched = Launched(ranks, torch.device("cpu"), "ddp", accelerator, owns_groups=False)

    def make(
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        gates: Mapping[str, PassGate],
        ranks: Ranks,
        deferred: bool,
    ) -> Backend:
        return DistributedBackend(modules, optimizers, gates, launched=launched, deferred_checks=deferred)

    return make


CONTROL_CASE = ExactCase(layers=2, num_samples=3, num_classes=7, edge_dropout="tied", batch_norm=True, steps=1)


def run_controls(ranks: Ranks, make_backend: MakeBackend) -> dict[str, Errors]:
    """Errors with one thing broken each; and with nothing broken, for comparison."""
    want = run_case(CONTROL_CASE)
    found = {}
    for name, broken in CONTROLS.items():
        with broken(ranks):
            backend = plain if name == "no average" else make_backend
            local = {"statistics_of_all": _own_statistics} if name == "statistics of each rank" else {}
            found[name] = errors_by_kind(run_case(CONTROL_CASE, ranks, backend, **local), want)
    return found


def faulty_batches(ranks: Ranks, make_backend: MakeBackend) -> FaultyBatches:
    """Before each good step the last rank has batches that nobody planned; the good steps know nothing of it."""
    case = replace(CONTROL_CASE, steps=2)
    messages = []

    def disturb(step: TrainingStep, number: int) -> None:
        images, labels = case.batch(number, ranks)
        faults: list[tuple[Tensor, Tensor, int]] = [
            (images[:-1], labels[:-1], number),
            (torch.cat([images, images]), labels.repeat(2), number),
            # The model's Linear cannot take it, nor its BatchNorms while the other ranks wait in theirs.
            (images[..., :1], labels, number),
            (images, labels, number + 1),
        ]
        for fault in faults:
            *batch, at = fault if ranks.rank == ranks.size - 1 else (images, labels, number)
            try:
                step(*batch, EpochAverages(), step=at)
            except InputError as error:
                messages.append(str(error))

    got = run_case(case, ranks, make_backend, before_step=disturb)
    return FaultyBatches(messages, errors_by_kind(got, run_case(case)))


def _own_statistics(module: nn.Module, ranks: Ranks) -> nn.Module:
    return module


def _nothing(ranks: Ranks) -> AbstractContextManager[Any]:
    return nullcontext()


def _detached_gather(ranks: Ranks) -> AbstractContextManager[Any]:
    """Everybody's embeddings come together, but only the own ones carry a gradient."""
    whole = Ranks.gather

    def gather(self: Ranks, local: Tensor, class_counts: Sequence[int]) -> Tensor:
        found = whole(self, local.detach(), class_counts)
        own = rank_classes(sum(class_counts), self.rank, self.size)
        by_class = found.view(-1, sum(class_counts), *found.shape[1:]).clone()
        by_class[:, own] = local.view(by_class.shape[0], -1, *local.shape[1:])
        return by_class.view(found.shape)

    return patch.object(Ranks, "gather", gather)


def _dropped_pair(ranks: Ranks) -> AbstractContextManager[Any]:
    """The last rank leaves out one of its block pairs."""
    whole = step_module.class_major_plan

    def plan(num_classes: int, num_samples: int, device: Any, share: tuple[int, int]) -> PairPlan:
        found = whole(num_classes, num_samples, device, share)
        if ranks.rank < ranks.size - 1:
            return found
        diagonal, *others = found.chunks
        first, second = (torch.cat([getattr(chunk, end) for chunk in others])[1:] for end in ("first", "second"))
        return replace(found, chunks=chunked(diagonal.first, first, second, found.block_size))

    return patch.object(step_module, "class_major_plan", plan)


def _masks_by_rank(ranks: Ranks) -> AbstractContextManager[Any]:
    """Each rank draws dropout masks of its own."""
    whole = step_module.stream_key
    return patch.object(step_module, "stream_key", lambda *parts: whole(*parts, ranks.rank))


def _mixing_by_rank(ranks: Ranks) -> AbstractContextManager[Any]:
    """Each rank draws mixing weights of its own."""
    whole = step_module.mixing_weights

    def draw(num_samples: int, *, seed: int, **call: Any) -> Tensor:
        return whole(num_samples, seed=seed + ranks.rank, **call)

    return patch.object(step_module, "mixing_weights", draw)


CONTROLS: dict[str, Callable[[Ranks], AbstractContextManager[Any]]] = {
    "nothing": _nothing,
    "detached gather": _detached_gather,
    "no average": _nothing,
    "dropped block pair": _dropped_pair,
    "masks of each rank": _masks_by_rank,
    "mixing weights of each rank": _mixing_by_rank,
    "statistics of each rank": _nothing,
}
