"""What ranks with sharded classes do in the tests: single losses, whole steps, states; and one replicated process."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from maths_cases import Size, generator
from step_cases import Case, NotingBackend, averages_of
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.data.ranks import rank_classes, rank_sizes
from gcahng.distributed import ONE, Ranks, class_shards
from gcahng.distributed.class_shards import ShardedLinear
from gcahng.distributed.shard_states import (
    is_sharded,
    load_whole_optimizer_state,
    whole_optimizer_state,
    whole_state,
)
from gcahng.losses import ProxyAnchorLoss, proxy_anchor
from gcahng.training.config_schema import OptimizerConfig
from gcahng.training.finite_checks import ImmediateChecks, NotFinite
from gcahng.training.optimizers import build_optimizer
from gcahng.training.sharded_parts import (
    ShardedProxyAnchorLoss,
    joined,
    joined_optimizers,
    optimizer_of_saved,
    saved_with,
    shard_part,
)
from gcahng.training.step import TrainingStep

STEPS, FEW_STEPS, HALFWAY = 5, 2, 3
# N = 11 and 13 divide by no W above 1; every rank has a class of the batch at W = 4.
CASES = {
    "all": Case(proxies=True, size=Size(4, 3, 8, 2, 2, training_classes=11)),
    "clipped": Case(proxies=True, size=Size(7, 2, 8, 1, 2, training_classes=13), clip=1e-2),
    "sparse": Case(
        size=Size(7, 2, 8, 1, 2, training_classes=9),
        settings={"neighbours": 2},
        graph_options={"edge_dropout": "independent"},
    ),
    "no graph": Case(graph=False, channel=False, proxies=True, size=Size(5, 2, 8, 1, 2, training_classes=7)),
    "no generation": Case(generate=False, size=Size(5, 2, 8, 1, 2, training_classes=10), optimizer="sgd"),
}
LONG = ("all", "no graph", "no generation")
# Cases by the gradient that gets a NaN.
SPOILT = {"node_classifier.weight": "no generation", "metric_loss.proxies": "no graph", "classifier.bias": "no graph"}
# Of the operations alone.
CLASSES, DIM, BATCH = 11, 6, 9
LOSSES = ("linear", "unbiased", "proxies")


class RanksBackend(NotingBackend):
    """One process's backend whose gradients are averaged over ranks, but for own rows; one bad entry on request."""

    ranks: Ranks
    spoilt: str | None = None

    def step(self, names: Any, reach: str) -> None:
        for name, parameter in self.parameters().items():
            shared = not is_sharded(self.modules[name.split(".")[0]])
            if shared and parameter.grad is not None and self.ranks.size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.ranks.size
        if self.spoilt is not None and self.ranks.rank == self.ranks.size - 1:
            gradient = self.parameters()[self.spoilt].grad
            if gradient is not None:
                gradient[0] = math.nan
        super().step(names, reach)


@dataclass
class Found:
    """What one rank found.

    Attributes:
        reports: Losses of each step.
        gradients, parameters: Of each optimiser move, by replicated name; own rows only of sharded parts.
        states, optimizers: At the end, in the replicated form; of rank 0.
        entries: Entries of parameters and optimiser state of the sharded parts.
    """

    reports: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizers: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)


def backend_of(case: Case, ranks: Ranks, *, sharded: bool, start: tuple[Any, Any] | None = None) -> RanksBackend:
    """New parts; or parts and optimisers that go on from states in the replicated form."""
    modules = case.modules()
    if start is not None:
        for name, module in modules.items():
            module.load_state_dict(start[0][name])
    if sharded:
        parts = [shard_part(name, module, ranks) for name, module in modules.items()]
        modules = {name: module for part in parts for name, module in part.items()}
    optimizers, gates = {}, {}
    for name, module in modules.items():
        if list(module.parameters()):
            settings = OptimizerConfig(name=case.optimizer, lr=case.lr, weight_decay=0.1, momentum=0.5)
            clip = case.clip if name in ("metric_model", "graph", "node_classifier") else None
            optimizers[name], gates[name] = build_optimizer(module, settings, clip_value=clip, fused=case.fused)
            if start is not None:
                saved = optimizer_of_saved(name, module, start[1][saved_with(name)])
                load_whole_optimizer_state(module, optimizers[name], saved)
    backend = RanksBackend(modules, optimizers, gates, precision=case.precision, deferred_checks=case.deferred)
    backend.ranks = ranks
    if not case.deferred:
        backend.checks = ImmediateChecks(ranks)
    return backend


def run_steps(case: Case, backend: RanksBackend, first: int, last: int) -> list[dict[str, float]]:
    """Steps first..last-1 on this rank's classes of each batch."""
    ranks, num_samples = backend.ranks, case.size.num_samples
    counts = rank_sizes(case.size.num_classes, ranks.size)
    own = rank_classes(case.size.num_classes, ranks.rank, ranks.size)
    step = TrainingStep(backend, case.step_on(backend).settings, ranks=ranks, class_counts=counts)
    averages, reports = averages_of(), []
    for number in range(first, last):
        images, labels = case.images(number)
        images = images.view(num_samples, -1, *images.shape[1:])[:, own].flatten(0, 1)
        labels = labels.view(num_samples, -1)[:, own].flatten()
        reports.append(step(images, labels, averages, step=number))
    return [{name: float(value) for name, value in report.items()} for report in reports]


def replicated_name(name: str) -> str:
    return f"graph.{name}" if name.startswith("node_classifier.") else name


def states_of(backend: RanksBackend) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """States of modules and optimisers in the replicated form; whole on rank 0."""
    modules = {name: whole_state(module) for name, module in backend.modules.items()}
    found = {name: whole_optimizer_state(backend.modules[name], o) for name, o in backend.optimizers.items()}
    copies = {part: {key: value.clone() for key, value in state.items()} for part, state in joined(modules).items()}
    return copies, joined_optimizers(found)


def trace(name: str, ranks: Ranks, *, sharded: bool, start: tuple[Any, Any] | None = None) -> Found:
    """All steps of a case; or, with the states after `HALFWAY` steps, those behind them."""
    case, steps = CASES[name], STEPS if name in LONG else FEW_STEPS
    backend = backend_of(case, ranks, sharded=sharded, start=start)
    found = Found(run_steps(case, backend, 0 if start is None else HALFWAY, steps))
    for phase in backend.phases:
        found.gradients.append({replicated_name(name): value for name, value in phase.gradients.items()})
        found.parameters.append({replicated_name(name): value for name, value in phase.parameters.items()})
    found.states, found.optimizers = states_of(backend)
    found.entries = {name: _entries(backend, name) for name, m in backend.modules.items() if is_sharded(m)}
    return found


def _entries(backend: RanksBackend, name: str) -> int:
    """Entries of a part's parameters and of its optimiser's state, step counters aside."""
    parameters = list(backend.modules[name].parameters())
    state = [value for p in parameters for value in backend.optimizers[name].state[p].values()]
    return sum(t.numel() for t in [*parameters, *state] if isinstance(t, Tensor) and t.dim())


def halfway(name: str) -> tuple[Any, Any]:
    """States of the replicated run of a case after `HALFWAY` steps."""
    backend = backend_of(CASES[name], ONE, sharded=False)
    run_steps(CASES[name], backend, 0, HALFWAY)
    return states_of(backend)


def batch() -> tuple[Tensor, Tensor]:
    draw = generator(3)
    z = torch.randn(BATCH, DIM, generator=draw, dtype=torch.float64)
    return z, torch.randint(CLASSES, (BATCH,), generator=draw)


def part_of(kind: str) -> nn.Module:
    """A replicated part in float64 by the name of its loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        made = ProxyAnchorLoss(CLASSES, DIM) if kind == "proxies" else nn.Linear(DIM, CLASSES, bias=kind == "linear")
        return made.double()


def alone(part: nn.Module) -> dict[str, Tensor]:
    """Loss and gradients of a replicated part, three times the loss."""
    z, labels = batch()
    z.requires_grad_()
    loss = part(z, labels) if isinstance(part, ProxyAnchorLoss) else F.cross_entropy(part(z), labels)
    (3 * loss).backward()
    found = {name: p.grad for name, p in part.named_parameters()}
    return {"loss": loss.detach(), "z": z.grad} | found  # type: ignore[operator]


def sharded(part: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The same of this rank's shard; as the rule says, the gradient of what all ranks share is to be averaged."""
    (shard,) = shard_part("metric_loss" if isinstance(part, ProxyAnchorLoss) else "classifier", part, ranks).values()
    assert isinstance(shard, ShardedLinear | ShardedProxyAnchorLoss)
    z, labels = batch()
    z.requires_grad_()
    loss = shard(z, labels)
    (3 * loss).backward()
    found = {name: p.grad for name, p in shard.named_parameters()}
    found["loss"] = loss.detach()
    assert z.grad is not None
    found["z"] = ranks.sum(z.grad) / ranks.size
    if isinstance(shard, ShardedLinear):
        constant = shard.constant(None)
        found["constant weight"] = constant.weight
        if constant.bias is not None:
            found["constant bias"] = constant.bias
        found["constant in bfloat16"] = shard.constant(torch.bfloat16).weight
    return found  # type: ignore[return-value]


def with_room(entries: int | None, kind: str, ranks: Ranks) -> dict[str, Tensor]:
    """`sharded`, with room for the logits of some classes only."""
    before = dict(class_shards.LOGIT_BYTES), proxy_anchor.SIMILARITY_BYTES
    if entries is not None:
        class_shards.LOGIT_BYTES["cpu"] = proxy_anchor.SIMILARITY_BYTES = entries * BATCH * 8
    try:
        return sharded(part_of(kind), ranks)
    finally:
        class_shards.LOGIT_BYTES, proxy_anchor.SIMILARITY_BYTES = before


def spoilt(case: Case, ranks: Ranks, name: str) -> tuple[str, bool]:
    """What is raised where the last rank's gradient of `name` has a NaN, and whether anything has moved."""
    backend = backend_of(case, ranks, sharded=True)
    backend.spoilt = name
    before = backend.snapshot()
    try:
        run_steps(case, backend, 0, 1)
    except NotFinite as error:
        part, reach = name.split(".")[0], str(error)
        parts = ("classifier",) if part == "classifier" else tuple(backend.modules)
        now = backend.snapshot()
        return reach, any(not torch.equal(now[key], before[key]) for key in now if key.split(".")[0] in parts)
    return "nothing was raised", True


def all_of(ranks: Ranks, starts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that one rank of a group is asked for."""
    found: dict[str, Any] = {
        f"{kind}, room {room}": with_room(room, kind, ranks) for kind in LOSSES for room in (None, 1, 2)
    }
    found |= {name: trace(name, ranks, sharded=True) for name in CASES}
    for name, start in starts.items():
        # Copies: in one process they are those of the tests, and optimisers write there.
        found[f"resumed {name}"] = trace(name, ranks, sharded=True, start=copy.deepcopy(start))
    for name, case in SPOILT.items():
        found[f"spoilt {name}"] = spoilt(CASES[case], ranks, name)
    return found
