"""Small training steps that tests share: real parts on a real backend that keeps notes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from maths_cases import Size, generator, randomise
from torch import Tensor, nn

from gcahng.graph import GraphNetwork
from gcahng.losses import NPairPlusLoss, ProxyAnchorLoss
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import PlainBackend, Precision
from gcahng.training.config_schema import OptimizerConfig
from gcahng.training.optimizers import build_optimizer
from gcahng.training.step import StepSettings, TrainingStep

SIZE = Size(4, 3, 8, 2, 2, training_classes=6)


@dataclass
class Phase:
    """One optimiser move: which pass, which parts, who had a gradient, and every parameter after it."""

    reach: str
    names: tuple[str, ...]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


class NotingBackend(PlainBackend):
    """The plain backend; notes the gradients before and the parameters after each move."""

    def step(self, names: Sequence[str], reach: str) -> None:
        gradients = {
            name: parameter.grad.clone() for name, parameter in self.parameters().items() if parameter.grad is not None
        }
        super().step(names, reach)
        self.__dict__.setdefault("phases", []).append(Phase(reach, tuple(names), gradients, self.snapshot()))

    @property
    def phases(self) -> list[Phase]:
        return self.__dict__.get("phases", [])

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }

    def snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    def move_counts(self) -> dict[str, int]:
        """How often AdamW has moved each parameter (0: never)."""
        names = {id(parameter): name for name, parameter in self.parameters().items()}
        counts = dict.fromkeys(names.values(), 0)
        for optimizer in self.optimizers.values():
            for parameter, state in optimizer.state.items():
                counts[names[id(parameter)]] = int(state["step"])
        return counts


@dataclass
class Case:
    """What a small run is made of; every switch of the step."""

    size: Size = SIZE
    graph: bool = True
    generate: bool = True
    channel: bool = True
    proxies: bool = False
    clip: float | None = 10.0
    lr: float = 1e-2
    optimizer: str = "adamw"
    precision: Precision = "fp32"
    dtype: torch.dtype = torch.float64
    seed: int = 0
    deferred: bool = False
    fused: bool = False
    graph_options: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)

    def modules(self) -> dict[str, nn.Module]:
        size = self.size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            modules: dict[str, nn.Module] = {
                "metric_model": nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.GELU(), nn.Linear(10, size.dim)),
                "metric_loss": (ProxyAnchorLoss(size.training_classes, size.dim) if self.proxies else NPairPlusLoss()),
            }
            if self.graph:
                modules["graph"] = GraphNetwork(
                    size.dim,
                    size.training_classes,
                    size.layers,
                    size.heads,
                    **self.graph_options,  # type: ignore[arg-type]
                )
            if self.generate:
                modules["classifier"] = nn.Linear(size.dim, size.training_classes)
        for number, module in enumerate(modules.values()):
            randomise(module.to(self.dtype), number)
        return modules

    def backend(self) -> NotingBackend:
        modules = self.modules()
        optimizers, gates = {}, {}
        for name, module in modules.items():
            if not list(module.parameters()):
                continue
            settings = OptimizerConfig(name=self.optimizer, lr=self.lr, weight_decay=0.1)
            clip = self.clip if name in ("metric_model", "graph") else None
            optimizers[name], gates[name] = build_optimizer(module, settings, clip_value=clip, fused=self.fused)
        return NotingBackend(modules, optimizers, gates, precision=self.precision, deferred_checks=self.deferred)

    def step_on(self, backend: NotingBackend) -> TrainingStep:
        values: dict[str, object] = {
            "seed": self.seed,
            "num_samples": self.size.num_samples,
            "generate": self.generate,
            "channel_coefficients": self.channel,
            "alpha": 2.0,
            "beta": 5.0,
        }
        return TrainingStep(backend, StepSettings(**(values | self.settings)))  # type: ignore[arg-type]

    def images(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(B, 3, 2, 2) images that look alike within a class, group-major labels."""
        size = self.size
        draw = generator(seed)
        centres = torch.randn(size.num_classes, 3, 2, 2, generator=draw, dtype=torch.float64)
        noise = torch.randn(size.batch, 3, 2, 2, generator=draw, dtype=torch.float64)
        images = centres.repeat(size.num_samples, 1, 1, 1) + 0.5 * noise
        classes = torch.randperm(size.training_classes, generator=draw)[: size.num_classes]
        return images.to(self.dtype), classes.repeat(size.num_samples)


def averages_of(metric_loss: float = 3.0, generation_loss: float = 10.0) -> EpochAverages:
    averages = EpochAverages()
    averages.metric_loss, averages.generation_loss = metric_loss, generation_loss
    return averages


def run(case: Case, steps: int = 1) -> tuple[NotingBackend, list[dict[str, Tensor]]]:
    """Some steps on new parts: the backend with its notes, and the reports."""
    backend = case.backend()
    step = case.step_on(backend)
    averages = averages_of()
    reports = [step(*case.images(number), averages, step=number) for number in range(steps)]
    return backend, reports
