"""Training steps with every loss and switch there is, as one process runs them and as W ranks do.

A case is a handful of values; what it gives (losses, the gradient of every parameter in every pass of every step,
parameters and buffers at the end) is compared quantity by quantity. How gradients come together is the backend's
business, which the cases do not know.

Sizes are small, so that hundreds of cases take seconds: D 8, batches of 8 to 21 samples, images of 2 x 2.
"""

import hashlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from maths_cases import generator, randomise
from pairwise import all_pairs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gcahng.data.ranks import rank_classes, rank_sizes
from gcahng.distributed import ONE, Ranks
from gcahng.distributed.batch_norm import use_statistics_of_all
from gcahng.graph import GraphNetwork
from gcahng.losses import (
    HardNegativeLoss,
    NPairLoss,
    NPairPlusLoss,
    ProxyAnchorLoss,
    SelectivelyContrastiveLoss,
    SemiHardNegativeLoss,
)
from gcahng.random import stream_key
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import Backend, PlainBackend
from gcahng.training.config_schema import OptimizerConfig
from gcahng.training.optimizers import PassGate, build_optimizer, clip_by_value
from gcahng.training.step import StepSettings, TrainingStep

# Every switch of the maths; the first value is what a case has where the switch has no say.
MATHS: dict[str, tuple[Hashable, ...]] = {
    "loss": ("n_pair_plus", "n_pair", "proxy_anchor", "sct", "shn", "hn", "own"),
    "graph": (True, False),
    "generate": (True, False),
    "channel": (True, False),
    "edge_dropout": (None, "tied", "independent"),
    "norm": ("gelu_layer_norm", "layer_norm"),
    "node_propagation": (True, False),
    "edge_to_node": (True, False),
    "edge_aggregation": ("sum", "mean", "scaled"),
    "neighbours": (None, 2),
    "normalised_distance": (False, True),
    "backend": ("eager", "scatter"),
    "layers": (1, 2),
    "num_samples": (2, 3),
}
# What else a step is made of. Of the numbers of classes none is a multiple of 2, 3 and 4.
SURROUNDINGS: dict[str, tuple[Hashable, ...]] = {
    "num_classes": (4, 6, 7),
    "batch_norm": (False, True),
    "clip": (None, 0.02),
    "optimizer": ("adamw", "sgd"),
    "deferred": (False, True),
    "fusion": ("mix", "pick"),
}
FACTORS = MATHS | SURROUNDINGS
OF_THE_GRAPH = ("edge_dropout", "norm", "node_propagation", "edge_to_node", "edge_aggregation", "backend", "layers")

# Names of quantities, and whether all values given so far may stand in one case.
_RULES: tuple[tuple[tuple[str, ...], Callable[..., bool]], ...] = (
    (("loss", "num_samples"), lambda loss, samples: loss != "n_pair" or samples == 2),
    (("graph", "generate", "channel"), lambda graph, generate, channel: graph or not (generate and channel)),
    (("backend", "neighbours"), lambda backend, neighbours: backend != "scatter" or neighbours is None),
    # From here on: a switch that has no say stands at its first value.
    (("generate", "channel"), lambda generate, channel: generate or channel),
    (("generate", "normalised_distance"), lambda generate, normalised: generate or not normalised),
    (("generate", "fusion"), lambda generate, fusion: generate or fusion == "mix"),
    (("graph", "generate", "neighbours"), lambda graph, generate, number: graph or generate or number is None),
    (("node_propagation", "edge_to_node"), lambda propagates, sums: propagates or sums),
    (("node_propagation", "edge_aggregation"), lambda propagates, kind: propagates or kind == "sum"),
    (("edge_to_node", "edge_aggregation"), lambda sums, kind: sums or kind == "sum"),
)


def possible(values: Mapping[str, Hashable]) -> bool:
    """Whether values of some or all switches may stand in one case, and each has a say in it."""
    for names, rule in _RULES:
        if all(name in values for name in names) and not rule(*(values[name] for name in names)):
            return False
    return values.get("graph", True) or all(values.get(n, FACTORS[n][0]) == FACTORS[n][0] for n in OF_THE_GRAPH)


class SoftCentres(nn.Module):
    """A metric loss as a user may write it: parameters of its own, every sample against all of them."""

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(num_classes, embedding_dim))
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(-self.slope * torch.cdist(embeddings, self.centres).square(), labels)


_LOSSES: dict[str, Callable[[int, int], nn.Module]] = {
    "n_pair_plus": lambda num_classes, dim: NPairPlusLoss(),
    "n_pair": lambda num_classes, dim: NPairLoss(),
    "proxy_anchor": ProxyAnchorLoss,
    "sct": lambda num_classes, dim: SelectivelyContrastiveLoss(),
    "shn": lambda num_classes, dim: SemiHardNegativeLoss(),
    "hn": lambda num_classes, dim: HardNegativeLoss(),
    "own": SoftCentres,
}


@dataclass(frozen=True, kw_only=True)
class ExactCase:
    """One small training run; the switches as in `FACTORS`.

    Attributes:
        steps: How many iterations.
        dtype: Of images and parameters. The numbers are those of float32 in any case.
        seed: Of images and draws.
        dim, heads, training_classes: D, H, N.
    """

    loss: str = "n_pair_plus"
    graph: bool = True
    generate: bool = True
    channel: bool = True
    edge_dropout: str | None = None
    norm: str = "gelu_layer_norm"
    node_propagation: bool = True
    edge_to_node: bool = True
    edge_aggregation: str = "sum"
    neighbours: int | None = None
    normalised_distance: bool = False
    backend: str = "eager"
    layers: int = 1
    num_samples: int = 2
    num_classes: int = 4
    batch_norm: bool = False
    clip: float | None = None
    optimizer: str = "adamw"
    deferred: bool = False
    fusion: str = "mix"
    steps: int = 5
    dtype: torch.dtype = torch.float64
    seed: int = 0
    dim: int = 8
    heads: int = 2
    training_classes: int = 9

    def __str__(self) -> str:
        """What differs from the defaults."""
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return " ".join(f"{name}={value}" for name, value, usual in values if value != usual) or "defaults"

    def modules(self) -> dict[str, nn.Module]:
        """The parts with random parameters, the same in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            modules: dict[str, nn.Module] = {
                "metric_model": _metric_model(self.dim, self.batch_norm),
                "metric_loss": _LOSSES[self.loss](self.training_classes, self.dim),
            }
            if self.graph:
                modules["graph"] = GraphNetwork(
                    self.dim,
                    self.training_classes,
                    self.layers,
                    self.heads,
                    dropout=0.0 if self.edge_dropout is None else 0.3,
                    edge_dropout=self.edge_dropout or "tied",  # type: ignore[arg-type]
                    backend=self.backend,  # type: ignore[arg-type]
                    norm=self.norm,  # type: ignore[arg-type]
                    node_propagation=self.node_propagation,
                    edge_to_node=self.edge_to_node,
                    edge_aggregation=self.edge_aggregation,  # type: ignore[arg-type]
                )
            if self.generate:
                modules["classifier"] = nn.Linear(self.dim, self.training_classes)
        for number, module in enumerate(modules.values()):
            randomise(module, number)
            module.to(self.dtype)
        return modules

    def settings(self) -> StepSettings:
        return StepSettings(
            seed=self.seed,
            num_samples=self.num_samples,
            generate=self.generate,
            channel_coefficients=self.channel,
            fusion=self.fusion,  # type: ignore[arg-type]
            alpha=2.0,
            beta=5.0,
            neighbours=self.neighbours,
            normalised_distance=self.normalised_distance,
        )

    def batch(self, number: int, ranks: Ranks = ONE) -> tuple[Tensor, Tensor]:
        """A rank's part of a batch: images (K * P_r, 3, 2, 2) that look alike within a class, group-major labels."""
        draw = generator(1000 * self.seed + number)
        shape = (self.num_samples, self.num_classes, 3, 2, 2)
        images = torch.randn(shape[1:], generator=draw) + 0.5 * torch.randn(shape, generator=draw)
        classes = torch.randperm(self.training_classes, generator=draw)[: self.num_classes]
        own = rank_classes(self.num_classes, ranks.rank, ranks.size)
        return images[:, own].flatten(0, 1).to(self.dtype), classes[own].repeat(self.num_samples)


def _metric_model(dim: int, batch_norm: bool) -> nn.Module:
    """A backbone and a head of two layers each, BatchNorms among them or not."""
    norms = (nn.BatchNorm2d(5), nn.BatchNorm1d(10)) if batch_norm else (nn.Identity(), nn.Identity())
    backbone = OrderedDict(
        conv=nn.Conv2d(3, 5, 1, bias=False),
        norm=norms[0],
        gelu=nn.GELU(),
        flat=nn.Flatten(),
        linear=nn.Linear(20, 10),
        last=nn.GELU(),
    )
    head = OrderedDict(norm=norms[1], linear=nn.Linear(10, dim))
    return nn.Sequential(OrderedDict(backbone=nn.Sequential(backbone), head=nn.Sequential(head)))


def pair_cases() -> list[ExactCase]:
    """Every pair of values of two switches is in one of these, but those that cannot stand together."""
    return [ExactCase(**values) for values in all_pairs(FACTORS, possible)]  # type: ignore[arg-type]


def large_cases() -> list[ExactCase]:
    """The released batch of 27 classes x 3 images, which neither 2 nor 4 ranks divide evenly."""
    common: dict[str, Any] = {"num_classes": 27, "num_samples": 3, "training_classes": 30, "layers": 2}
    return [
        ExactCase(**common, edge_dropout="tied", batch_norm=True, clip=0.02),
        ExactCase(**common, loss="proxy_anchor", neighbours=3, optimizer="sgd"),
    ]


def full_product(steps: int = 3) -> Iterator[ExactCase]:
    """Every combination of the switches of the maths; what surrounds them is dealt out as if by chance."""
    surroundings = [dict(zip(SURROUNDINGS, v, strict=True)) for v in itertools.product(*SURROUNDINGS.values())]
    maths = (dict(zip(MATHS, v, strict=True)) for v in itertools.product(*MATHS.values()))
    for number, values in enumerate(v for v in maths if possible(v)):
        dealt = surroundings[stream_key("surroundings", number) % len(surroundings)]
        yield ExactCase(**values, **dealt, steps=steps)  # type: ignore[arg-type]


@dataclass
class Notes:
    """What a run gives, by name: "KIND:PART FAMILY | QUANTITY"; errors are relative to the largest of a family."""

    values: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0

    def add(self, family: str, name: str, value: Tensor) -> None:
        self.values[f"{family} | {name}"] = value.detach().clone()

    def watch(self, part: str, module: nn.Module, optimizer: Optimizer, gate: PassGate) -> None:
        """Note the gradients that come to an optimiser: averaged already, not yet clipped."""

        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    self.add(f"gradient:{part} step {self.step} {gate.active}", name, parameter.grad)

        optimizer.register_step_pre_hook(note)

    def outcome(self) -> "Outcome":
        sizes = tuple(value.numel() for value in self.values.values())
        flat = torch.cat([value.reshape(-1).double() for value in self.values.values()])
        return Outcome(tuple(self.values), sizes, flat)


@dataclass(frozen=True)
class Outcome:
    """All quantities of a run in one tensor, float64, which travels well between processes."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    flat: Tensor

    def digest(self) -> str:
        """Of every bit."""
        content = repr((self.names, self.sizes)).encode() + self.flat.numpy().tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def by_name(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.flat.split(self.sizes), strict=True))


# (modules, optimisers, gates, ranks, deferred checks) -> what runs them on all ranks.
MakeBackend = Callable[[Mapping[str, nn.Module], Mapping[str, Optimizer], Mapping[str, PassGate], Ranks, bool], Backend]


def plain(
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    gates: Mapping[str, PassGate],
    ranks: Ranks,
    deferred: bool,
) -> Backend:
    """The backend of one process; between several it averages nothing."""
    return PlainBackend(modules, optimizers, gates, deferred_checks=deferred)


def run_case(
    case: ExactCase,
    ranks: Ranks = ONE,
    make_backend: MakeBackend = plain,
    statistics_of_all: Callable[[nn.Module, Ranks], nn.Module] = use_statistics_of_all,
    before_step: Callable[[TrainingStep, int], None] = lambda step, number: None,
) -> Outcome:
    """All steps of a case on this rank's part of each batch, and everything that came out."""
    notes = Notes()
    modules = case.modules()
    modules["metric_model"] = statistics_of_all(modules["metric_model"], ranks)
    optimizers, gates = {}, {}
    for part, module in modules.items():
        if any(True for _ in module.parameters()):
            momentum = 0.9 if case.optimizer == "sgd" else 0.0
            chosen = OptimizerConfig(name=case.optimizer, lr=3e-3, weight_decay=0.1, momentum=momentum)
            optimizers[part], gates[part] = build_optimizer(module, chosen, fused=case.deferred)
            for group in optimizers[part].param_groups:
                # By default AdamW makes a large step of a gradient that is zero but for rounding: that of a bias whose
                # only way leads into a BatchNorm, for one.
                group.update({"eps": 1e-4} if "eps" in group else {})
            notes.watch(part, module, optimizers[part], gates[part])
            if case.clip is not None:
                clip_by_value(optimizers[part], case.clip)
    backend = make_backend(modules, optimizers, gates, ranks, case.deferred)
    counts = rank_sizes(case.num_classes, ranks.size)
    step = TrainingStep(backend, case.settings(), ranks=ranks, class_counts=counts)
    averages = EpochAverages()
    averages.metric_loss, averages.generation_loss = 3.0, 10.0
    for notes.step in range(case.steps):
        before_step(step, notes.step)
        report = step(*case.batch(notes.step, ranks), averages, step=notes.step)
        for name, value in report.items():
            notes.add(f"loss {name} step {notes.step}", name, value)
        if notes.step == 2:
            # From here on the means of these steps set pull and trust.
            averages.end_epoch()
    backend.checks.finish()
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            notes.add(f"parameter:{part}", name, parameter)
        for name, buffer in module.named_buffers():
            notes.add(f"buffer:{part} {name}", name, buffer)
    for name in ("metric_loss", "generation_loss"):
        notes.add(f"average {name}", name, torch.tensor(getattr(averages, name), dtype=torch.float64))
    backend.close()
    return notes.outcome()


def errors_by_kind(got: Outcome, want: Outcome) -> dict[str, tuple[float, str]]:
    """The largest error of each kind of quantity and whose it is; what one side lacks is infinitely wrong.

    The measure of `maths_cases.errors`: the largest difference over the largest wanted value, the latter at least 1e-3
    of the largest in the family.
    """
    ours, theirs = got.by_name(), want.by_name()
    worst = {name.split()[0]: (0.0, "") for name in want.names}
    for name in ours.keys() ^ theirs.keys():
        worst[name.split()[0]] = (float("inf"), f"{name}: only {'got' if name in ours else 'wanted'}")
    names = [name for name in want.names if name in ours]
    wanted = [theirs[name] for name in names]
    differences = torch._foreach_sub([ours[name] for name in names], wanted)
    largest, apart = (
        torch.stack(torch._foreach_norm(values, ord=float("inf"))).tolist() for values in (wanted, differences)
    )
    of_family: dict[str, float] = {}
    for name, size in zip(names, largest, strict=True):
        family = name.split(" | ")[0]
        of_family[family] = max(of_family.get(family, 0.0), size)
    for name, size, difference in zip(names, largest, apart, strict=True):
        scale = max(size, 1e-3 * of_family[name.split(" | ")[0]])
        error = difference / scale if scale else difference
        kind = name.split()[0]
        # A NaN compares with nothing.
        if not error <= worst[kind][0]:
            worst[kind] = (error if math.isfinite(error) else math.inf, name)
    return worst


def too_large(errors: Mapping[str, tuple[float, str]], tolerance: float) -> dict[str, tuple[float, str]]:
    return {kind: found for kind, found in errors.items() if found[0] > tolerance}
