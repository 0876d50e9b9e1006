"""Runs on the backend of several ranks: cases of `exact_cases`, a metric model with a warm-up, parts that go wrong."""

import itertools
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from exact_cases import ExactCase, Outcome, run_case
from launched_here import launched_here
from maths_cases import randomise
from torch import Tensor, nn
from torch.optim import Optimizer

from gcahng.data.ranks import rank_sizes
from gcahng.distributed import Ranks
from gcahng.distributed.class_shards import ShardedLinear
from gcahng.errors import InputError
from gcahng.models import build_embedder
from gcahng.training import finite_checks
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import PlainBackend
from gcahng.training.config_schema import OptimizerConfig
from gcahng.training.ddp_backend import DistributedBackend
from gcahng.training.finite_checks import NotFinite
from gcahng.training.launched import Launched
from gcahng.training.optimizers import PassGate, build_optimizer
from gcahng.training.step import StepSettings, TrainingStep


@dataclass(frozen=True, kw_only=True)
class WarmUpCase(ExactCase):
    """With an `Embedder` that begins with a warm-up.

    Attributes:
        warm_up_steps: First steps in which the head alone is trained.
        factors: Of J_cls, J_sim and J_div.
    """

    warm_up_steps: int = 2
    factors: tuple[float, float, float] = (20.0, 20.0, 0.6)

    def modules(self) -> dict[str, nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            model = build_embedder(
                "small_conv",
                backbone_args={"widths": (4, 6)},
                embedding_dim=self.dim,
                head="bn_linear" if self.batch_norm else "linear",
                freeze_batch_norm=not self.batch_norm,
            )
        randomise(model.to(self.dtype), 7)
        calls = itertools.count()
        model.register_forward_pre_hook(lambda module, _: module.set_warm_up(next(calls) < self.warm_up_steps))
        return super().modules() | {"metric_model": model}

    def settings(self) -> StepSettings:
        classification, similarity, diversity = self.factors
        return replace(
            super().settings(),
            classification_weight=classification,
            similarity_weight=similarity,
            diversity_weight=diversity,
        )


# Four steps are two of a warm-up and two after it.
CASES: dict[str, ExactCase] = {
    "warm-up, proxies, dropout": WarmUpCase(num_classes=7, layers=2, loss="proxy_anchor", edge_dropout="tied", steps=4),
    "warm-up, live BatchNorms": WarmUpCase(batch_norm=True, num_classes=5, num_samples=3, steps=4),
    "clipping that binds": WarmUpCase(clip=0.02, optimizer="sgd", layers=2, num_classes=5, warm_up_steps=1, steps=3),
    "a class each": ExactCase(num_classes=3, layers=2, steps=2),
    "independent dropout, no wait": ExactCase(edge_dropout="independent", deferred=True, num_classes=4, steps=3),
    "J_sim alone": WarmUpCase(factors=(0.0, 20.0, 0.0), num_classes=5, warm_up_steps=0, steps=2),
    "own loss, sparse graph": ExactCase(loss="own", neighbours=2, num_classes=7, steps=2),
    "no graph": ExactCase(graph=False, channel=False, loss="proxy_anchor", steps=2),
    "no generation": ExactCase(generate=False, num_classes=5, steps=2),
    "single coefficients": ExactCase(channel=False, num_classes=5, layers=2, steps=2),
    "metric loss alone": ExactCase(graph=False, generate=False, num_classes=5, steps=2),
    "edge list": ExactCase(backend="scatter", num_classes=3, num_samples=3, steps=2),
}
SCALED = "loss scaler"
# On three ranks.
UNEVEN = tuple(CASES)[:5]


def scaled(backend: PlainBackend, scale: float = 2.0**12) -> PlainBackend:
    """With a loss scaler put in by hand, as fp16 has it on CUDA."""
    backend.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return backend


class Backends:
    """Makes backends for `run_case`: plain on one rank, DDP on several."""

    def __init__(self, launched: Launched, scale: float | None = None) -> None:
        self.launched = launched
        self.scale = scale

    def __call__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        gates: Mapping[str, PassGate],
        ranks: Ranks,
        deferred: bool,
    ) -> PlainBackend:
        parts = (modules, optimizers, gates)
        if ranks.size == 1:
            backend = PlainBackend(*parts, deferred_checks=deferred)
        else:
            backend = DistributedBackend(*parts, launched=self.launched, deferred_checks=deferred)
        return backend if self.scale is None else scaled(backend, self.scale)


def run_all(ranks: Ranks) -> dict[str, Outcome]:
    """The cases, on this rank's part of the batches."""
    launched = launched_here(ranks)
    names = UNEVEN if ranks.size > 2 else CASES
    found = {name: run_case(CASES[name], ranks, Backends(launched)) for name in names}
    # Scaled by a power of two, float64 gradients come back bit by bit.
    found[SCALED] = run_case(CASES["clipping that binds"], ranks, Backends(launched, 2.0**12))
    return found


class OwnRows(nn.Module):
    """A centre of its own on each rank; its gradient can be spoilt there."""

    own_rows = True

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.full((dim,), float(rank), dtype=torch.float64))
        self.register_buffer("rank", torch.tensor(rank))

    def forward(self, z: Tensor) -> Tensor:
        return (z.detach() - self.centre).square().mean()


class Mixed(nn.Module):
    """A metric loss of a shared centre and an own one; on one rank alone it goes wrong in one step.

    Args:
        ranks: All ranks.
        dim: D.
        fault: "loss" or "gradient" that is not finite in step 1 on the last rank; "": never.
    """

    def __init__(self, ranks: Ranks, dim: int, fault: str) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.full((dim,), float(ranks.rank), dtype=torch.float64))
        self.own = OwnRows(dim, ranks.rank)
        self.fault = fault if ranks.rank == ranks.size - 1 else ""
        self.calls = 0
        self.expected: list[Tensor] = []
        self.got: list[Tensor] = []
        self.own.centre.register_hook(self._note)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        bad = math.inf if self._is_bad("loss") else 0.0
        self.expected.append(2 * (self.own.centre.detach() - z.detach()).sum(0) / z.numel())
        return (z - self.shared).square().mean() + self.own(z) + bad

    def _note(self, gradient: Tensor) -> Tensor:
        self.got.append(gradient.clone())
        return gradient * math.nan if self._is_bad("gradient") else gradient

    def _is_bad(self, what: str) -> bool:
        return self.fault == what and self.calls == 2


def parts_of(case: ExactCase, ranks: Ranks, fault: str) -> tuple[dict[str, nn.Module], dict[str, Any], dict[str, Any]]:
    """Parts with the mixed loss; those of other ranks than the first start somewhere else."""
    modules = case.modules() | {"metric_loss": Mixed(ranks, case.dim, fault)}
    modules["metric_model"].register_buffer("mark", torch.tensor(1.0))
    with torch.no_grad():
        for tensor in [*modules["metric_model"].parameters(), *modules["metric_model"].buffers()]:
            tensor.add_(ranks.rank)
    optimizers, gates = {}, {}
    for name, module in modules.items():
        chosen = OptimizerConfig(lr=1e-2, weight_decay=0.1)
        optimizers[name], gates[name] = build_optimizer(module, chosen, fused=case.deferred)
    return modules, optimizers, gates


def snapshot(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{n}": t.clone() for part, module in modules.items() for n, t in module.state_dict().items()}


def run_mixed(
    ranks: Ranks, launched: Launched, fault: str, deferred: bool, scale: float | None = None
) -> dict[str, Any]:
    """Some steps, until an error comes: what it was, in which step, and parameters before, on the way, at the end."""
    case = ExactCase(batch_norm=True, deferred=deferred, num_classes=5, graph=False, generate=False)
    parts = parts_of(case, ranks, fault)
    modules = parts[0]
    backend = Backends(launched, scale)(*parts, ranks, deferred)
    found: dict[str, Any] = {"start": snapshot(modules), "error": None, "states": []}
    modules["metric_model"].get_buffer("mark").fill_(ranks.rank)
    step = TrainingStep(backend, case.settings(), ranks=ranks, class_counts=rank_sizes(case.num_classes, ranks.size))
    for number in range(5):
        try:
            step(*case.batch(number, ranks), EpochAverages(), step=number)
        except NotFinite as error:
            found["error"] = (number, str(error))
            break
        found["states"].append(snapshot(modules))
    if found["error"] is None:
        backend.checks.finish()
    found["end"] = snapshot(modules)
    loss = modules["metric_loss"]
    assert isinstance(loss, Mixed)
    found["expected"], found["got"] = loss.expected, loss.got
    found["scale"] = None if backend.scaler is None else backend.scaler.get_scale()
    backend.close()
    return found


class _Arrives:
    """Whether copies to the host arrive, on this rank."""

    def __init__(self, now: bool) -> None:
        self.now = now

    def __enter__(self) -> None:
        self.before = finite_checks._Arrival.arrived
        finite_checks._Arrival.arrived = self.now  # type: ignore[assignment, method-assign]

    def __exit__(self, *error: object) -> None:
        finite_checks._Arrival.arrived = self.before  # type: ignore[method-assign]


def go_wrong(ranks: Ranks) -> dict[str, Any]:
    """Runs with faults on one rank, where the copies of rank 0 are slow; and one without."""
    launched = launched_here(ranks)
    found: dict[str, Any] = {"good": run_mixed(ranks, launched, "", False)}
    with _Arrives(ranks.rank != 0):
        for fault, deferred in itertools.product(("loss", "gradient"), (False, True)):
            found[f"{fault} {deferred}"] = run_mixed(ranks, launched, fault, deferred)
    found["scaler"] = run_mixed(ranks, launched, "gradient", False, 2.0**12)
    found["frozen"] = _runs_frozen_parts(launched)
    found["dtypes"] = _dtypes_in_bf16(launched)
    found["sharded"] = _state_of_a_sharded_part(launched)
    found["drawn"] = _losses_that_draw(ranks, launched)
    found["search"] = _search_over_steps(ranks, launched)
    return found


class Drawing(nn.Module):
    """A metric loss that draws numbers."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return (z * torch.rand_like(z)).square().mean()


def _losses_that_draw(ranks: Ranks, launched: Launched) -> tuple[list[float], list[float]]:
    """Two steps' losses, where the generators stand elsewhere on each rank; and a draw of this rank after each."""
    case = ExactCase(num_classes=5, graph=False, generate=False)
    modules = case.modules() | {"metric_loss": Drawing()}
    optimizer, gate = build_optimizer(modules["metric_model"], OptimizerConfig(lr=1e-2))
    backend = DistributedBackend(modules, {"metric_model": optimizer}, {"metric_model": gate}, launched=launched)
    step = TrainingStep(backend, case.settings(), ranks=ranks, class_counts=rank_sizes(case.num_classes, ranks.size))
    losses, draws = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ranks.rank)
        for number in range(2):
            report = step(*case.batch(0, ranks), EpochAverages(), step=number)
            losses.append(float(report["metric_loss"]))
            draws.append(float(torch.rand(())))
    backend.close()
    return losses, draws


def _search_over_steps(ranks: Ranks, launched: Launched) -> dict[str, Any]:
    """Which parts DDP searches before each of three steps and after them; the last one leaves a backbone out again."""
    case = WarmUpCase(loss="own", num_classes=5, warm_up_steps=1)
    modules = case.modules()
    built = {name: build_optimizer(module, OptimizerConfig(lr=1e-2)) for name, module in modules.items()}
    optimizers, gates = (
        {n: optimizer for n, (optimizer, _) in built.items()},
        {n: gate for n, (_, gate) in built.items()},
    )
    backend = DistributedBackend(modules, optimizers, gates, launched=launched)
    step = TrainingStep(backend, case.settings(), ranks=ranks, class_counts=rank_sizes(case.num_classes, ranks.size))
    found: dict[str, Any] = {"searched": [], "error": None}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    before: list[Tensor] = []
    for number in range(3):
        found["searched"].append(_searched(backend))
        if number == 2:
            modules["metric_model"].register_forward_pre_hook(lambda module, _: module.set_warm_up(True))
            before = [parameter.detach().clone() for parameter in parameters]
        try:
            step(*case.batch(number, ranks), EpochAverages(), step=number)
        except InputError as error:
            found["error"] = (number, str(error))
    found["searched"].append(_searched(backend))
    found["moved"] = sum(not torch.equal(*pair) for pair in zip(before, parameters, strict=True))
    backend.close()
    return found


def _searched(backend: DistributedBackend) -> list[str]:
    wrapped: dict[str, Any] = backend._wrapped
    return [name for name, wrapper in wrapped.items() if wrapper.find_unused_parameters]


def _runs_frozen_parts(launched: Launched) -> bool:
    torch.manual_seed(launched.ranks.rank)
    layer = nn.Linear(4, 4).requires_grad_(False)
    backend = DistributedBackend({"metric_model": layer}, {}, {}, launched=launched)
    found: Tensor = backend.forward("metric_model", torch.ones(2, 4))
    weights = launched.ranks.all_of(layer.weight)
    return torch.equal(found, layer(torch.ones(2, 4))) and all(torch.equal(layer.weight, other) for other in weights)


def _dtypes_in_bf16(launched: Launched) -> dict[str, torch.dtype]:
    parts = {name: nn.Linear(4, 4) for name in ("metric_model", "metric_loss")}
    backend = DistributedBackend(parts, {}, {}, launched=launched, precision="bf16")
    return {name: backend.forward(name, torch.ones(2, 4)).dtype for name in parts}


def _state_of_a_sharded_part(launched: Launched) -> dict[str, Any]:
    """Moments by kind after a step with row numbers as gradients; and of the rows of this rank, once loaded."""
    layer = ShardedLinear(nn.Linear(2, 7, bias=False), launched.ranks)
    optimizer, gate = build_optimizer(layer, OptimizerConfig(lr=0.1))
    backend = DistributedBackend({"part": layer}, {"part": optimizer}, {"part": gate}, launched=launched)
    layer.weight.grad = torch.arange(7.0)[layer.rows, None].expand(-1, 2).clone()
    optimizer.step()
    whole = launched.ranks.all_of(backend.optimizer_state("part"))
    other, gate = build_optimizer(layer, OptimizerConfig(lr=0.1))
    again = DistributedBackend({"part": layer}, {"part": other}, {"part": gate}, launched=launched)
    again.load_optimizer_state("part", whole[0])
    return {
        "others": whole[1:],
        "whole": whole[0]["state"][0]["exp_avg"],
        "loaded": torch.equal(other.state[layer.weight]["exp_avg"], optimizer.state[layer.weight]["exp_avg"]),
    }


def all_of_it(ranks: Ranks) -> dict[str, Any]:
    """What the tests of the backend look at, in one start of the processes, and what was printed meanwhile."""
    warnings.simplefilter("error")
    with tempfile.TemporaryFile() as printed:
        # Of the process: what DDP says from C++ is no warning of Python's.
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            found: dict[str, Any] = {"cases": run_all(ranks), "wrong": go_wrong(ranks)}
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        printed.seek(0)
        found["printed"] = printed.read().decode()
    return found
