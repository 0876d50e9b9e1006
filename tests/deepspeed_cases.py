"""Runs under ZeRO-0, 1 and 2 and, to compare with, DDP; all in one start of the processes."""

import copy
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ddp_cases import WarmUpCase
from exact_cases import ExactCase, run_case
from generator_cases import GeneratorCase
from launched_here import launched_here, small_config
from own_row_losses import MixedLoss, OnlyOwn
from pml_cases import arc_face
from step_cases import averages_of
from torch import Tensor, nn
from torch.optim import Optimizer

from gcahng.data.ranks import rank_sizes
from gcahng.distributed import ONE, Ranks
from gcahng.errors import ConfigError
from gcahng.training.backend import PlainBackend
from gcahng.training.config_schema import OptimizerConfig
from gcahng.training.ddp_backend import DistributedBackend
from gcahng.training.deepspeed_backend import DeepSpeedBackend, PartEngine
from gcahng.training.finite_checks import NotFinite
from gcahng.training.launched import Launched
from gcahng.training.optimizers import PassGate, build_optimizer
from gcahng.training.step import TrainingStep

DDP = "ddp"
PARTITIONED = ("zero-1", "zero-2")
STAGES = ("zero-0", *PARTITIONED)
# Gradients go in several buckets, the largest parameters alone.
SMALL_BUCKETS: dict[str, Any] = {"gradient_clipping": 0.0, "zero_optimization": {"reduce_bucket_size": 300}}

# With its first engine DeepSpeed marks its optimiser Muon, which nothing here uses, for `torch.compile`: importing the
# compiler for that takes each process 4 seconds.
NO_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}


@contextmanager
def launched_as(kind: str, ranks: Ranks, **zero: Any) -> Iterator[Launched]:
    """As `accelerate launch` starts a process for "ddp" or "zero-STAGE", over the group that is there."""
    from accelerate.state import AcceleratorState

    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        if kind != DDP:
            stage = {"stage": int(kind.removeprefix("zero-"))}
            settings = SMALL_BUCKETS | {"zero_optimization": SMALL_BUCKETS["zero_optimization"] | stage | zero}
            file = Path(folder) / "deepspeed.json"
            file.write_text(json.dumps(settings))
            os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
            os.environ |= NO_COMPILER
        try:
            yield launched_here(ranks, small_config())
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ.clear()
            os.environ |= before


def backend_of(
    launched: Launched,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    gates: Mapping[str, PassGate],
    **options: Any,
) -> PlainBackend:
    make: Any = DeepSpeedBackend if launched.kind == "deepspeed" else DistributedBackend
    backend: PlainBackend = make(modules, optimizers, gates, launched=launched, **options)
    return backend


class Backends:
    """Makes backends for `run_case` of how it was launched, and keeps the optimisers' states at the end."""

    def __init__(self, launched: Launched, precision: str = "fp32") -> None:
        self.launched = launched
        self.precision = precision
        self.states: dict[str, Any] = {}

    def __call__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        gates: Mapping[str, PassGate],
        ranks: Ranks,
        deferred: bool,
    ) -> PlainBackend:
        parts = (modules, optimizers, gates)
        backend = backend_of(self.launched, *parts, precision=self.precision, deferred_checks=deferred)
        close = backend.close

        def close_with_states() -> None:
            self.states = {name: backend.optimizer_state(name) for name in optimizers}
            close()

        backend.close = close_with_states  # type: ignore[method-assign]
        return backend


@dataclass(frozen=True, kw_only=True)
class OtherParts(WarmUpCase):
    """With parts changed.

    Attributes:
        ranks: Of the run.
        metric_loss: What takes the place of the metric loss.
        frozen: How many parameters of the metric model are frozen, its first ones.
    """

    ranks: Ranks = ONE
    metric_loss: Callable[[int, Ranks], nn.Module] | None = None
    frozen: int = 0

    def modules(self) -> dict[str, nn.Module]:
        modules = super().modules()
        if self.metric_loss is not None:
            modules["metric_loss"] = self.metric_loss(self.dim, self.ranks)
        for parameter in list(modules["metric_model"].parameters())[: self.frozen]:
            parameter.requires_grad_(False)
        return modules


TO_CLIP = WarmUpCase(clip=0.02, num_classes=7, warm_up_steps=1, steps=2)
CASES: dict[str, ExactCase] = {
    "warm-up, proxies, dropout": WarmUpCase(
        num_classes=7, layers=2, loss="proxy_anchor", edge_dropout="tied", clip=10.0
    ),
    "warm-up to the end, live BatchNorms": WarmUpCase(batch_norm=True, num_classes=5, warm_up_steps=9, steps=2),
    "clipping that binds": TO_CLIP,
    "SGD, frozen layer": OtherParts(clip=0.02, optimizer="sgd", num_classes=5, warm_up_steps=1, frozen=1, steps=3),
    "no generation, own loss": ExactCase(generate=False, loss="own", num_classes=5, layers=2, steps=2),
    "fused, no wait": ExactCase(edge_dropout="independent", deferred=True, steps=2),
    "single coefficients, fused SGD": ExactCase(channel=False, deferred=True, optimizer="sgd", steps=2),
    "proxies of pytorch-metric-learning": OtherParts(metric_loss=arc_face, num_classes=5, steps=2),
    "own rows within a part": OtherParts(metric_loss=MixedLoss, num_classes=5, steps=2),
    "own rows alone, frozen group": OtherParts(metric_loss=OnlyOwn, frozen=99, num_classes=5, steps=2),
    "generator": GeneratorCase(num_classes=5, warm_up=True, steps=2),
}
# What stages 0 and 1 do otherwise than stage 2 and DDP shows in these; `make test-full` has all in each.
OWN_ROWS = ("own rows within a part", "own rows alone, frozen group")
ENOUGH = {
    "zero-0": ("warm-up, proxies, dropout", "SGD, frozen layer", *OWN_ROWS),
    "zero-1": ("warm-up, proxies, dropout", "fused, no wait", *OWN_ROWS),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "overlap_comm": {"overlap_comm": True},
    "separate gradients": {"contiguous_gradients": False},
    "reduction to all": {"reduce_scatter": False},
    "one bucket": {"reduce_bucket_size": 10**6},
}


def numbers(case: ExactCase, ranks: Ranks, launched: Launched, precision: str = "fp32") -> dict[str, Any]:
    """All values of a run but its gradients, which are in pieces under ZeRO; the states of the optimisers."""
    case = replace(case, dtype=torch.float32)
    if isinstance(case, OtherParts):
        case = replace(case, ranks=ranks)
    backends = Backends(launched, precision)
    values = run_case(case, ranks, backends).by_name()
    return {name: value for name, value in values.items() if not name.startswith("gradient")} | {
        "states": backends.states
    }


def run_cases(ranks: Ranks, launched: Launched, names: Collection[str]) -> dict[str, Any]:
    found: dict[str, Any] = {name: numbers(CASES[name], ranks, launched) for name in names if name != "bf16"}
    if "bf16" in names:
        found["bf16"] = numbers(TO_CLIP, ranks, launched, "bf16")
    if launched.kind == DDP:
        found["no clipping"] = numbers(replace(TO_CLIP, clip=None), ranks, launched)
    return found


@dataclass
class Run:
    """Parts and what trains them, here or over ranks."""

    case: ExactCase
    ranks: Ranks
    modules: dict[str, nn.Module]
    backend: PlainBackend

    @staticmethod
    def of(case: ExactCase, ranks: Ranks, launched: Launched | None, **changed: nn.Module) -> "Run":
        """A run of a case, over ranks if `launched` is given; `changed`: other parts."""
        case = replace(case, dtype=torch.float32)
        modules = case.modules() | changed
        optimizers, gates = {}, {}
        for name, module in modules.items():
            if any(True for _ in module.parameters()):
                chosen = OptimizerConfig(name=case.optimizer, lr=1e-2, weight_decay=0.1)
                optimizers[name], gates[name] = build_optimizer(
                    module, chosen, fused=case.deferred, clip_value=case.clip
                )
            if isinstance(module, Unused) and module.apart:
                optimizers[name].param_groups[0]["params"] = list(module.model.parameters())
                optimizers[name].add_param_group({"params": list(module.unused.parameters())})
        parts = (modules, optimizers, gates)
        if launched is None:
            return Run(case, ONE, modules, PlainBackend(*parts))
        return Run(case, ranks, modules, backend_of(launched, *parts, deferred_checks=case.deferred))

    def train(self, *steps: int) -> None:
        counts = rank_sizes(self.case.num_classes, self.ranks.size)
        train = TrainingStep(self.backend, self.case.settings(), ranks=self.ranks, class_counts=counts)
        for number in steps:
            train(*self.case.batch(number, self.ranks), averages_of(), step=number)

    def weights(self) -> dict[str, Tensor]:
        return {f"{part}.{n}": t.clone() for part, m in self.modules.items() for n, t in m.state_dict().items()}

    def parameters(self) -> dict[str, Tensor]:
        """Without buffers: running statistics take in what is not finite too."""
        return {f"{part}.{n}": p.detach().clone() for part, m in self.modules.items() for n, p in m.named_parameters()}

    def states(self) -> dict[str, Any]:
        return {name: copy.deepcopy(self.backend.optimizer_state(name)) for name in self.backend.optimizers}

    def load(self, weights: Mapping[str, Tensor], states: Mapping[str, Any]) -> None:
        for part, module in self.modules.items():
            own = {n.removeprefix(f"{part}."): t for n, t in weights.items() if n.startswith(f"{part}.")}
            module.load_state_dict(own)
        for name, state in states.items():
            self.backend.load_optimizer_state(name, copy.deepcopy(state))


RESUMED = ExactCase(num_classes=5, layers=2, loss="proxy_anchor", clip=0.5)


def begin(ranks: Ranks, launched: Launched | None) -> dict[str, Any]:
    """Two steps, what a checkpoint keeps of them, and two more."""
    run = Run.of(RESUMED, ranks, launched)
    run.train(0, 1)
    found = {"weights": run.weights(), "states": run.states()}
    run.train(2, 3)
    found |= {"end": run.weights(), "end states": run.states()}
    run.backend.close()
    return found


def go_on(ranks: Ranks, launched: Launched | None, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Two more steps of what another run has saved; the weights are loaded after the engines were made."""
    run = Run.of(replace(RESUMED, seed=1), ranks, launched)
    run.case = replace(run.case, seed=RESUMED.seed)
    run.train(7)
    run.load(saved["weights"], saved["states"])
    run.train(2, 3)
    found = {"end": run.weights(), "end states": run.states()}
    run.backend.close()
    return found


def spoilt(ranks: Ranks, launched: Launched, deferred: bool) -> dict[str, Any]:
    """A gradient of the graph is NaN on the last rank in step 1; what moved by it, and whether training can go on."""
    run = Run.of(ExactCase(num_classes=5, deferred=deferred), ranks, launched)
    bad = False
    weight = next(run.modules["graph"].parameters())
    weight.register_hook(lambda g: g * float("nan") if bad and ranks.rank == ranks.size - 1 else None)
    run.train(0)
    run.backend.checks.finish()
    found: dict[str, Any] = {"before": run.parameters() | {"states": run.states()}, "error": ""}
    try:
        bad = True
        run.train(1)
        bad = False
        run.train(2)
        run.backend.checks.finish()
    except NotFinite as error:
        found["error"] = str(error)
    found["after"] = run.parameters() | {"states": run.states()}
    bad = False
    run.train(3)
    run.backend.checks.finish()
    found["later"] = run.parameters()
    run.backend.close()
    return found


class Unused(nn.Module):
    """A model with a layer that nothing uses; `apart`: in a parameter group of its own."""

    def __init__(self, model: nn.Module, apart: bool) -> None:
        super().__init__()
        self.model = model
        self.apart = apart
        self.unused = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # type: ignore[no-any-return]


def with_unused_layer(ranks: Ranks, launched: Launched, apart: bool) -> tuple[str, set[str]]:
    """The error, and what moved of the metric model, "model" or "unused"."""
    case = replace(RESUMED, dtype=torch.float32)
    run = Run.of(case, ranks, launched, metric_model=Unused(case.modules()["metric_model"], apart))
    before = run.parameters()
    error = ""
    try:
        run.train(0)
    except ConfigError as refused:
        error = str(refused)
    moved = {name for name, value in run.parameters().items() if not torch.equal(value, before[name])}
    run.backend.close()
    return error, {name.split(".")[1] for name in moved if name.startswith("metric_model")}


def destroyed(ranks: Ranks, launched: Launched) -> tuple[int, int]:
    """How many engines `close` takes down, and a second one."""
    from deepspeed import DeepSpeedEngine

    run = Run.of(RESUMED, ranks, launched)
    with patch.object(DeepSpeedEngine, "destroy", autospec=True, side_effect=DeepSpeedEngine.destroy) as destroy:
        run.backend.close()
        first = destroy.call_count
        run.backend.close()
    return first, destroy.call_count - first


def _without_average(ranks: Ranks, launched: Launched) -> str:
    with patch.object(PartEngine, "_reduce"), pytest.raises(ConfigError) as refused:
        Run.of(RESUMED, ranks, launched)
    return str(refused.value)


# Who goes on from whose checkpoint.
RESUMES = {
    DDP: ("zero-1",),
    "zero-0": ("zero-2",),
    "zero-1": ("zero-2", "plain"),
    "zero-2": ("zero-1", "plain"),
}


def all_of_it(ranks: Ranks, every: bool) -> dict[str, dict[str, Any]]:
    """What the tests look at, by kind of launch, in one start of the processes; `every`: all cases in each stage."""
    warnings.simplefilter("ignore")  # of DeepSpeed's own
    found: dict[str, dict[str, Any]] = {kind: {} for kind in (DDP, *STAGES)}
    saved: dict[str, Any] = {"plain": begin(ONE, None)}
    for kind, of_kind in found.items():
        with launched_as(kind, ranks) as launched:
            names = [*CASES, "bf16"]
            of_kind["cases"] = run_cases(ranks, launched, names if every else ENOUGH.get(kind, names))
            saved[kind] = begin(ranks, launched)
            if kind != DDP:
                of_kind["spoilt"] = spoilt(ranks, launched, deferred=kind == "zero-1")
                of_kind["unused"] = [with_unused_layer(ranks, launched, apart) for apart in (False, True)]
                of_kind["destroyed"] = destroyed(ranks, launched)
                of_kind["no average"] = _without_average(ranks, launched)
                of_kind["compiled"] = _has_compiled_operator()
    for kind, sources in RESUMES.items():
        with launched_as(kind, ranks) as launched:
            found[kind]["resumed"] = {source: go_on(ranks, launched, saved[source]) for source in sources}
    for kind, name in [("zero-1", "overlap_comm"), *itertools.product(["zero-2"], OPTIONS)]:
        with launched_as(kind, ranks, **OPTIONS[name]) as launched:
            found[kind]["cases"][name] = numbers(TO_CLIP, ranks, launched)
    found["plain"] = {"resumed": {source: go_on(ONE, None, saved[source]) for source in PARTITIONED}}
    found["saved"] = saved
    return found


def _has_compiled_operator() -> bool:
    from deepspeed.comm import comm

    return comm.cdb.shm_comm_op is not None
