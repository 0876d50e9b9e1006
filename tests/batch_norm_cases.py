"""BatchNorm layers over ranks: cases, and what each rank computes of them; one process computes the same."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from maths_cases import generator, randomise
from torch import Tensor, nn

from gcahng.distributed import Ranks
from gcahng.distributed.batch_norm import share_buffers, use_statistics_of_all

CHANNELS = 5
# Rows of each rank, by W: uneven, one row, none at all.
ROWS = {2: (5, 2), 3: (4, 0, 3), 4: (1, 3, 2, 5)}


@dataclass
class Case:
    """A layer between things that train, two steps, then evaluation.

    Attributes:
        kind: Class of the layer.
        shape: Of a row behind the channels.
        options: Of the layer.
        channels_last: Memory format of the input.
        frozen: The layer stays in evaluation mode.
        dtype: Of input and layer.
        autocast: Whether the layer gets bfloat16 from a product before it.
        offset: Mean of the values, whose deviation is 1.
    """

    kind: type[nn.Module]
    shape: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    frozen: bool = False
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    offset: float = 0.5

    def layer(self) -> nn.Module:
        layer = self.kind(CHANNELS, **self.options).to(self.dtype)
        randomise(layer, 3)
        draw = generator(7)
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draw, dtype=torch.float64))
        layer.train()
        return layer.eval() if self.frozen else layer

    def rows(self, total: int, step: int) -> tuple[Tensor, Tensor]:
        """Values and the weights of a loss that is linear in the result, the same on every rank."""
        draw = generator(step)
        values, weights = torch.randn(2, total, CHANNELS, *self.shape, generator=draw, dtype=torch.float64)
        scale = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64).view(-1, *[1] * len(self.shape))
        return ((values + self.offset) * scale).to(self.dtype), weights.to(self.dtype)


EXACT = {
    "1d": Case(nn.BatchNorm1d),
    "1d with length": Case(nn.BatchNorm1d, (4,)),
    "2d": Case(nn.BatchNorm2d, (3, 2)),
    "3d": Case(nn.BatchNorm3d, (2, 1, 2)),
    "channels last": Case(nn.BatchNorm2d, (3, 2), channels_last=True),
    "cumulative average": Case(nn.BatchNorm2d, (3, 2), {"momentum": None}),
    "not affine": Case(nn.BatchNorm1d, (), {"affine": False}),
    "no bias": Case(nn.BatchNorm1d, (), {"bias": False}),
    "no running statistics": Case(nn.BatchNorm2d, (3, 2), {"track_running_stats": False}),
    "frozen": Case(nn.BatchNorm2d, (3, 2), frozen=True),
    "far from zero": Case(nn.BatchNorm2d, (3, 2), offset=100.0),
}
# Ranks that import timm, which takes seconds, and where each has rows enough to go without the others.
WITH_TIMM = 2
ROUNDED = {
    "float32": Case(nn.BatchNorm2d, (3, 2), dtype=torch.float32),
    "float32 far from zero": Case(nn.BatchNorm2d, (3, 2), dtype=torch.float32, offset=100.0),
    "float32 1d far from zero": Case(nn.BatchNorm1d, dtype=torch.float32, offset=100.0),
    "autocast": Case(nn.BatchNorm2d, (3, 2), dtype=torch.float32, autocast=True),
    "autocast channels last": Case(nn.BatchNorm2d, (3, 2), dtype=torch.float32, autocast=True, channels_last=True),
}


def timm_cases() -> dict[str, Case]:
    """BatchNorms of timm that hold an activation."""
    from timm.layers import BatchNormAct2d

    options = {"act_layer": nn.GELU, "inplace": False}
    return {
        "timm": Case(BatchNormAct2d, (3, 2), options),
        "timm, frozen": Case(BatchNormAct2d, (3, 2), options, frozen=True),
    }


def own_rows(values: Tensor, ranks: Ranks) -> Tensor:
    if ranks.size == 1:
        return values
    return values.split(ROWS[ranks.size])[ranks.rank]


def run_layer(layer: nn.Module, case: Case, ranks: Ranks, total: int) -> dict[str, Tensor]:
    """Two training steps and an evaluation on this rank's rows: results, gradients and buffers."""
    found: dict[str, Tensor] = {}
    for step in range(2):
        x, weights = (own_rows(t, ranks) for t in case.rows(total, step))
        x = x.clone().requires_grad_()
        given = x.to(memory_format=torch.channels_last) if case.channels_last else x
        if case.autocast:
            given = given.to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast):
            y = layer(given)
        assert y.dtype == given.dtype
        if x.numel():
            assert not case.channels_last or y.is_contiguous(memory_format=torch.channels_last)
        layer.zero_grad()
        (y * weights).sum().backward()
        assert x.grad is not None
        found |= {f"row result {step}": y.detach(), f"row gradient {step}": x.grad}
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            found[f"sum gradient {step} {name}"] = parameter.grad.clone()
    found |= {f"buffer {name}": buffer.clone() for name, buffer in layer.named_buffers()}
    layer.eval()
    if case.options.get("track_running_stats", True):
        x = own_rows(case.rows(total, 2)[0], ranks)
        if x.numel():
            found["row evaluated"] = layer(x).detach()
    return found


def converted(layer: nn.Module, ranks: Ranks) -> nn.Module:
    """The layer over ranks, after a check that it is the same object with the same state."""
    before = list(layer.state_dict())
    assert use_statistics_of_all(layer, ranks) is layer
    use_statistics_of_all(layer, ranks)  # twice is once
    assert list(layer.state_dict()) == before
    return copy.deepcopy(layer)


class Messages:
    """Counts the numbers of every all-reduce."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._original: Callable[..., Any] = dist.all_reduce

    def __enter__(self) -> "Messages":
        def noted(tensor: Tensor, *args: Any, **options: Any) -> Any:
            self.sizes.append(tensor.numel())
            return self._original(tensor, *args, **options)

        dist.all_reduce = noted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original


def network() -> nn.Module:
    """A small EfficientNet of timm, whose BatchNorms hold their activation, and a head with a BatchNorm1d."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        body = timm.create_model("test_efficientnet", num_classes=0)
        model = nn.Sequential(body, nn.BatchNorm1d(body.num_features), nn.Linear(body.num_features, 3)).double()
    randomise(model, 1)
    return model.train()


def run_network(model: nn.Module, ranks: Ranks, total: int) -> dict[str, Tensor]:
    images = torch.randn(total, 3, 32, 32, generator=generator(0), dtype=torch.float64)
    weights = torch.randn(total, 3, generator=generator(1), dtype=torch.float64)
    y = model(own_rows(images, ranks))
    (y * own_rows(weights, ranks)).sum().backward()
    found = {"row result": y.detach()}
    found |= {f"sum {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}


def shared_buffers(ranks: Ranks) -> dict[str, Tensor]:
    """Buffers of several kinds that differ between ranks, after they were shared."""
    module = nn.Module()
    module.register_buffer("wide", torch.full((3,), 0.1 + ranks.rank, dtype=torch.float64))
    module.register_buffer("transposed", torch.arange(6.0).view(2, 3).T * (1 + ranks.rank))
    module.register_buffer("number", torch.tensor(5 + ranks.rank))
    module.register_buffer("flags", torch.tensor([ranks.rank == 0, True]))
    module.register_buffer("unsaved", torch.full((2,), ranks.rank, dtype=torch.bfloat16), persistent=False)
    module.register_buffer("nothing", None)
    share_buffers(module, ranks)
    return dict(module.named_buffers())


def all_cases(ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """Everything that the tests of one number of ranks look at."""
    torch.use_deterministic_algorithms(True)
    total = sum(ROWS[ranks.size])
    with_timm = ranks.size == WITH_TIMM
    cases = EXACT | ROUNDED | (timm_cases() if with_timm else {})
    found = {name: run_layer(converted(case.layer(), ranks), case, ranks, total) for name, case in cases.items()}
    for name in ("2d", "frozen"):
        with Messages() as messages:
            run_layer(converted(EXACT[name].layer(), ranks), EXACT[name], ranks, total)
        found[f"messages {name}"] = {"sizes": torch.tensor(messages.sizes)}
    if with_timm:
        found["network"] = run_network(converted(network(), ranks), ranks, total)
        found["network alone"] = run_network(network(), ranks, total)
    found["shared"] = shared_buffers(ranks)
    return found
