"""One training step on one of several processes, and what it costs there, counted: operations, bytes, messages."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from graph_arms import Size
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gcahng.data.ranks import rank_classes, rank_sizes
from gcahng.distributed import Ranks
from gcahng.graph import GraphNetwork, PairPlan
from gcahng.graph.pairs import PairChunk
from gcahng.losses import NPairPlusLoss
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import PlainBackend
from gcahng.training.config_schema import OptimizerConfig
from gcahng.training.optimizers import build_optimizer
from gcahng.training.step import StepSettings, TrainingStep

# Numbers of an "image": the metric model is next to nothing.
INPUTS = 8


@dataclass
class Sent:
    """Collectives of one kind: how many, the bytes of their results or inputs, whichever is larger."""

    calls: int = 0
    bytes: int = 0


@dataclass
class RankCounts:
    """What one step of one rank took.

    Attributes:
        rows: Rows of the edge buffer.
        flop: Operations of matrix products, attention included.
        edge_bytes: Peak of the tensors that have a row per row of the edge buffer and D columns.
        peak_bytes: Peak of all tensors that the step made.
        sent: Collectives between devices by name.
        host: Messages between the ranks' CPUs.
        parameters: Numbers of trained parameters by part.
    """

    rows: int
    flop: float
    edge_bytes: int
    peak_bytes: int
    sent: dict[str, Sent]
    host: Sent
    parameters: dict[str, int]

    def ring_bytes(self, ranks: int) -> float:
        """What a rank sends in rings: an all-reduce goes around twice, the others once."""
        rounds = {"all_reduce": 2}
        return sum(rounds.get(kind, 1) * one.bytes for kind, one in self.sent.items()) * (ranks - 1) / ranks


class StepCounter(TorchDispatchMode):
    """Adds up operations of matrix products and the bytes of living tensors, backward passes included."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.rows = -1
        self.flop = 0.0
        self._live: dict[int, tuple[int, bool]] = {}
        self._now = [0, 0]
        self.peaks = [0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.flop += product_flop(func, args, kwargs or {}, result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def _note(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._live or not storage.nbytes():
            return
        edges = value.dim() == 2 and tuple(value.shape) == (self.rows, self.dim)
        self._live[key] = storage.nbytes(), edges
        self._add(storage.nbytes(), edges)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, edges = self._live.pop(key)
        self._add(-size, edges)

    def _add(self, size: int, edges: bool) -> None:
        self._now[0] += size
        self._now[1] += size * edges
        self.peaks = [max(pair) for pair in zip(self.peaks, self._now, strict=True)]


def product_flop(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Operations of one call, in-place and `out` variants included; 0 for what is no product."""
    packet = func._overloadpacket
    name = packet.__name__.rstrip("_")
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        left, right = args[-2:] if name in ("mm", "bmm") else args[1:3]
        return 2.0 * left.numel() * right.shape[-1]
    if packet in flop_registry:
        found: float = flop_registry[packet](*args, **kwargs, out_val=result)
        return found
    return 0.0


@dataclass
class Collectives:
    """Notes torch's collectives while it is entered.

    Attributes:
        sent: Of float32 tensors, by name of the function.
        host: All others: labels, flags and checks between CPUs.
    """

    sent: dict[str, Sent] = field(default_factory=dict)
    host: Sent = field(default_factory=Sent)

    def __enter__(self) -> "Collectives":
        names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast")
        self._originals = {name: getattr(dist, name) for name in names}
        for name, original in self._originals.items():
            setattr(dist, name, self._noting(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _noting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
            between_devices = tensors[0].dtype == torch.float32
            noted = self.sent.setdefault(name, Sent()) if between_devices else self.host
            noted.calls += 1
            noted.bytes += max(value.numel() * value.element_size() for value in tensors)
            return original(*args, **kwargs)

        return call


class _StepWithoutPairs(TrainingStep):
    """What is left of a step for a rank that has no pairs: what every rank repeats."""

    def _plan(self, z: Tensor) -> PairPlan:
        plan = super()._plan(z)
        nothing = plan.order[:0]
        return replace(plan, chunks=(PairChunk(nothing, nothing, plan.block_size, 0, False),))


def count_step(ranks: Ranks, size: Size, keep_bytes: int, with_pairs: bool = True) -> RankCounts:
    """The second of two steps of this rank, in float32 on the CPU."""
    step = _step(ranks, size, keep_bytes, TrainingStep if with_pairs else _StepWithoutPairs)
    averages = EpochAverages()
    averages.metric_loss, averages.generation_loss = 3.0, 10.0
    own = rank_classes(size.num_classes, ranks.rank, ranks.size)
    images = torch.randn(size.num_samples, size.num_classes, INPUTS, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(size.num_classes).expand(size.num_samples, -1)
    batch = images[:, own].flatten(0, 1), labels[:, own].reshape(-1)
    step(*batch, averages, step=0)
    counter = StepCounter(size.dim)
    counter.rows = step._plan(torch.empty(size.batch, 0)).num_rows
    with Collectives() as collectives, counter:
        step(*batch, averages, step=1)
    parameters = {
        name: sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in step.backend.modules.items()  # type: ignore[attr-defined]
    }
    peak, edges = counter.peaks
    return RankCounts(counter.rows, counter.flop, edges, peak, collectives.sent, collectives.host, parameters)


def _step(ranks: Ranks, size: Size, keep_bytes: int, kind: type[TrainingStep]) -> TrainingStep:
    torch.manual_seed(0)
    graph = GraphNetwork(size.dim, size.training_classes, size.layers, size.heads, backend="eager")
    graph.keep_bytes = keep_bytes
    modules = {
        "metric_model": nn.Linear(INPUTS, size.dim),
        "metric_loss": NPairPlusLoss(),
        "graph": graph,
        "classifier": nn.Linear(size.dim, size.training_classes),
    }
    optimizers, gates = {}, {}
    for name in ("metric_model", "graph", "classifier"):
        optimizers[name], gates[name] = build_optimizer(modules[name], OptimizerConfig(lr=1e-4))
    backend = PlainBackend(modules, optimizers, gates, ranks=ranks)
    settings = StepSettings(seed=0, num_samples=size.num_samples)
    return kind(backend, settings, ranks=ranks, class_counts=rank_sizes(size.num_classes, ranks.size))


def all_counts(ranks: Ranks, sizes: list[Size], keep_bytes: list[int]) -> list[list[RankCounts]]:
    """Of each size, a step for each `keep_bytes`; on one rank a last one without pairs."""
    found = []
    for size in sizes:
        found.append([count_step(ranks, size, keep) for keep in keep_bytes])
        if ranks.size == 1:
            found[-1].append(count_step(ranks, size, keep_bytes[0], with_pairs=False))
    return found
