"""Small training steps with cached accumulation, and the whole batch with a graph to compare them with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed_cases import DDP, STAGES, launched_as
from maths_cases import randomise
from step_cases import Case, NotingBackend, averages_of
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gcahng.data.ranks import rank_classes, rank_sizes
from gcahng.distributed import ONE, Ranks
from gcahng.distributed.batch_norm import use_statistics_of_all
from gcahng.models import Backbone, Embedder
from gcahng.training.averages import EpochAverages
from gcahng.training.ddp_backend import DistributedBackend
from gcahng.training.deepspeed_backend import DeepSpeedBackend
from gcahng.training.launched import Launched
from gcahng.training.step import TrainingStep

CHANNELS = 6


class DropBlock(nn.Module):
    """Stochastic depth: a residual branch that images skip by chance."""

    def __init__(self, branch: nn.Module, keep: float) -> None:
        super().__init__()
        self.branch, self.keep = branch, keep

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), self.keep, dtype=x.dtype, device=x.device))
        return x + self.branch(x) * kept / self.keep


class CountingShift(nn.Module):
    """A layer whose buffer decides its output and changes at each use: replaced, not written into."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.level = self.level + 0.5
        return x * self.level


class SmallBackbone(Backbone):
    """May have a layer that its features do not need, as pretrained networks have their classifiers."""

    def __init__(self, network: nn.Module, unused: bool) -> None:
        super().__init__(network, CHANNELS)
        self.unused = nn.Linear(CHANNELS, 3) if unused else nn.Identity()


def _layers(kind: str) -> list[nn.Module]:
    conv = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
    if kind == "dropout":
        return [nn.Dropout(0.4), DropBlock(conv, 0.6), nn.Dropout2d(0.2)]
    if kind in ("frozen", "live"):
        return [nn.BatchNorm2d(CHANNELS), nn.GELU(), conv, nn.BatchNorm2d(CHANNELS, momentum=None)]
    if kind == "shift":
        return [CountingShift(), conv]
    return [nn.GELU(), conv]


@dataclass
class AccumulationCase(Case):
    """A run whose metric model has a backbone and a head.

    Attributes:
        backbone: "plain", "dropout", "frozen" or "live" (BatchNorms), "shift" (a buffer that decides the output).
        head: Of the embedder.
        micro_batch: None for the whole batch at once.
        warm_up: The head alone is trained.
        unused: Whether the backbone has a layer that its features do not need.
        reference: Whether small batches keep their graphs until the backward pass.
    """

    backbone: str = "plain"
    head: str = "bn_linear"
    micro_batch: int | None = None
    warm_up: bool = False
    unused: bool = True
    reference: bool = False

    def modules(self) -> dict[str, nn.Module]:
        modules = super().modules()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            # No bias, and bent at the end: a shift before a BatchNorm has no gradient but rounding, which AdamW makes
            # large.
            network = nn.Sequential(
                nn.Conv2d(3, CHANNELS, 2, padding=1, bias=False), *_layers(self.backbone), nn.GELU()
            )
            model = Embedder(
                SmallBackbone(network, self.unused),
                self.size.dim,
                pooling="avg+max",
                head=self.head,
                freeze_batch_norm=self.backbone == "frozen",
            )
        if self.backbone == "dropout":
            model.head.append(nn.Dropout(0.2))  # draws between the two passes
        randomise(model.to(self.dtype), 9)
        model.set_warm_up(self.warm_up)
        return modules | {"metric_model": model}

    def step_on(self, backend: Any, *, ranks: Ranks = ONE, class_counts: list[int] | None = None) -> TrainingStep:
        settings = super().step_on(backend).settings
        kind = ReferenceStep if self.reference else TrainingStep
        return kind(backend, settings, ranks=ranks, class_counts=class_counts)

    def with_micro_batch(self, micro_batch: int, *, reference: bool = False) -> "AccumulationCase":
        """The same run in small batches; as a reference, all of them keep their graph."""
        values = vars(self) | {"micro_batch": micro_batch, "reference": reference}
        settings = {"micro_batch": micro_batch, "microbatch_statistics": self.backbone == "live"}
        return type(self)(**(values | {"settings": self.settings | settings}))


class ReferenceStep(TrainingStep):
    """Small batches the plain way: the features of each with its graph, all kept until the backward pass."""

    def _embed(self, images: Tensor) -> Tensor:
        micro_batch = self.settings.micro_batch
        assert micro_batch is not None
        found: Tensor = self.backend.run("metric_model", kept_graphs, images, -(-images.shape[0] // micro_batch))
        return found


def kept_graphs(model: Any, images: Tensor, number: int) -> Tensor:
    found: Tensor = model.embed_features(torch.cat([model.features(part) for part in images.tensor_split(number)]))
    return found


@dataclass
class Trace:
    """What a run of some steps left: reports, gradients and parameters of each move, buffers at the end."""

    reports: list[dict[str, Tensor]]
    gradients: list[dict[str, Tensor]]
    parameters: list[dict[str, Tensor]]
    buffers: dict[str, Tensor]
    draws: list[float]


def trace(case: AccumulationCase, steps: int = 3) -> Trace:
    """Some steps on one process."""
    backend = case.backend()
    step = case.step_on(backend)
    averages = averages_of()
    reports, draws = [], []
    for number in range(steps):
        reports.append(seeded_step(step, *case.images(number), averages, number))
        draws.append(float(torch.rand(())))
    return trace_of(backend, reports, draws)


def seeded_step(
    step: TrainingStep, images: Tensor, labels: Tensor, averages: EpochAverages, number: int
) -> dict[str, Tensor]:
    torch.manual_seed(100 + number)
    return step(images, labels, averages, step=number)


def trace_of(backend: NotingBackend, reports: list[dict[str, Tensor]], draws: list[float]) -> Trace:
    return Trace(
        reports,
        [phase.gradients for phase in backend.phases],
        [phase.parameters for phase in backend.phases],
        {
            f"{part}.{name}": buffer.double()
            for part, module in backend.modules.items()
            for name, buffer in module.named_buffers()
        },
        draws,
    )


class NotingDistributedBackend(NotingBackend, DistributedBackend):
    """DDP with notes, and a count of the reductions of the metric model's gradients (one bucket each)."""

    def step(self, names: Sequence[str], reach: str) -> None:
        for name in names:
            if name in self.gates:
                # What a pass does not reach of the graph has zeros until now; not to be noted.
                self.gates[name].active = reach
                self.gates[name]._close(self.optimizers[name], (), {})
        super().step(names, reach)

    def count_reductions(self) -> list[int]:
        sizes: list[int] = []

        def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            sizes.append(bucket.buffer().numel())
            return allreduce_hook(group, bucket)

        cast(Any, self._wrapped["metric_model"]).register_comm_hook(None, hook)
        return sizes


class NotingDeepSpeedBackend(NotingBackend, DeepSpeedBackend):
    """ZeRO with notes; gradients are noted before they are averaged."""


@dataclass
class Found:
    """What one rank found.

    Attributes:
        ddp: Of each case, what three steps left and the sizes of the gradients reduced.
        zero: What three steps of one case left, by backend.
    """

    ddp: list[tuple[Trace, list[int]]]
    zero: dict[str, Trace]


def on_ranks(ranks: Ranks, cases: Sequence[AccumulationCase], zero: AccumulationCase) -> Found:
    """Three steps of each case under DDP, and of one in small batches under every backend."""
    with launched_as(DDP, ranks) as started:
        found = Found([_trace_with_reductions(started, case) for case in cases], {})
    for kind in (DDP, *STAGES):
        with launched_as(kind, ranks) as started:
            found.zero[kind] = _trace_on_rank(_spread(started, zero), zero)
    return found


def _spread(started: Launched, case: AccumulationCase) -> Any:
    """The case's parts on the backend of how this rank was started."""
    plain = case.backend()
    use_statistics_of_all(plain.modules["metric_model"].head, started.ranks)
    kind: Any = NotingDeepSpeedBackend if started.kind == "deepspeed" else NotingDistributedBackend
    return kind(plain.modules, plain.optimizers, plain.gates, launched=started)


def _trace_with_reductions(started: Launched, case: AccumulationCase) -> tuple[Trace, list[int]]:
    backend = _spread(started, case)
    sizes = backend.count_reductions()
    return _trace_on_rank(backend, case), sizes


def _trace_on_rank(backend: Any, case: AccumulationCase) -> Trace:
    ranks, size = backend.ranks, case.size
    counts = rank_sizes(size.num_classes, ranks.size)
    step = case.step_on(backend, ranks=ranks, class_counts=counts)
    mine = rank_classes(size.num_classes, ranks.rank, ranks.size)
    averages, reports = averages_of(), []
    for number in range(3):
        images, labels = (
            part.view(size.num_samples, size.num_classes, *part.shape[1:])[:, mine].flatten(0, 1)
            for part in case.images(number)
        )
        torch.manual_seed(7 * number + ranks.rank)
        reports.append(step(images, labels, averages, step=number))
    found = trace_of(backend, reports, [])
    backend.close()
    return found
