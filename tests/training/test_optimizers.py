"""Optimisers from settings, the pass gate, clipping by value, schedules over epochs."""

import math
import sys

import pytest
import torch
from step_cases import Case, averages_of, run
from torch import nn

from gcahng.errors import ConfigError
from gcahng.models import build_embedder
from gcahng.training.config_schema import OptimizerConfig, ScheduleConfig
from gcahng.training.optimizers import (
    PassGate,
    build_optimizer,
    build_schedule,
    clip_by_value,
    obeys_gate,
    parameter_groups,
)


def module() -> nn.Linear:
    layer = nn.Linear(3, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3))
        layer.bias.fill_(1.0)
    return layer


def test_settings_reach_the_optimiser() -> None:
    adam, _ = build_optimizer(module(), OptimizerConfig(lr=0.3, weight_decay=0.2))
    assert isinstance(adam, torch.optim.AdamW)
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (0.3, 0.2)
    settings = OptimizerConfig(name="sgd", lr=0.3, weight_decay=0.2, momentum=0.9)
    sgd, _ = build_optimizer(module(), settings)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (0.3, 0.9)
    assert sgd.defaults["weight_decay"] == 0.2
    own, _ = build_optimizer(module(), OptimizerConfig(name="torch.optim:RMSprop", lr=0.3, weight_decay=0.2))
    assert isinstance(own, torch.optim.RMSprop)
    assert (own.defaults["lr"], own.defaults["weight_decay"]) == (0.3, 0.2)

    assert own.defaults["momentum"] == 0
    settings = OptimizerConfig(name="torch.optim:RMSprop", lr=0.3, momentum=0.7)
    assert build_optimizer(module(), settings)[0].defaults["momentum"] == 0.7


def takes_no_decay(params: object, lr: float) -> None:
    """Not the signature that is asked for."""


def makes_none(params: object, lr: float, weight_decay: float) -> None:
    """No optimiser."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "torch.optim:Adam", "momentum": 0.9},
            r"`optim.\*.momentum` is 0.9, but the constructor of torch.optim:Adam has no `momentum`. Set it to 0",
        ),
        (
            {"name": "own_optimizers:takes_no_decay"},
            r"own_optimizers:takes_no_decay cannot be made from parameter groups and lr, weight_decay: .*unexpected",
        ),
        ({"name": "own_optimizers:makes_none"}, r"must make a torch.optim.Optimizer: .*makes_none made NoneType"),
        ({"name": "math:pi"}, r"math:pi cannot be made .* is not a callable object"),
    ],
)
def test_an_optimiser_that_does_not_fit_is_refused(monkeypatch, settings: dict[str, object], message: str) -> None:
    monkeypatch.setitem(sys.modules, "own_optimizers", sys.modules[__name__])
    with pytest.raises(ConfigError, match=message):
        build_optimizer(module(), OptimizerConfig(lr=0.1, **settings))
    build_optimizer(module(), OptimizerConfig(name="torch.optim:Adam", lr=0.1))


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch.optim:NoSuch"):
        build_optimizer(module(), OptimizerConfig(name="torch.optim:NoSuch", lr=0.1))


def test_clipping_bounds_every_entry() -> None:
    layer = module()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    clip_by_value(optimizer, 0.5)
    before = layer.weight.detach().clone()
    gradient = torch.tensor([[-3.0, -0.5, -0.2], [0.0, 0.4, 7.0]], dtype=torch.float64)
    layer.weight.grad = gradient.clone()  # the bias has none
    optimizer.step()
    want = [[-0.5, -0.5, -0.2], [0.0, 0.4, 0.5]]
    assert (before - layer.weight).detach().flatten().tolist() == pytest.approx(sum(want, []))
    assert layer.bias.grad is None


def test_clipping_acts_on_metric_model_and_graph_only() -> None:
    # With SGD the move is the clipped gradient itself: bounded by lr * (bound + decay * weight).
    bound, lr = 1e-4, 1.0
    case = Case(clip=bound, lr=lr, optimizer="sgd", proxies=True)
    backend = case.backend()
    start = backend.snapshot()
    case.step_on(backend)(*case.images(), averages_of(), step=0)
    states = [start, *[phase.parameters for phase in backend.phases]]
    for phase, before in zip(backend.phases, states[:-1], strict=True):
        for name, gradient in phase.gradients.items():
            raw = gradient
            clipped = raw.clamp(-bound, bound)
            part = name.split(".")[0]
            want = clipped if part in ("metric_model", "graph") else raw
            move = before[name] - phase.parameters[name] - lr * 0.1 * before[name]
            torch.testing.assert_close(move, lr * want, rtol=1e-9, atol=1e-12)
        parts = {name.split(".")[0] for name in phase.gradients}
        beyond = {
            part: any(float(g.abs().max()) > bound for n, g in phase.gradients.items() if n.startswith(part))
            for part in parts
        }
        assert all(beyond.values()), "the bound must bind for the test to say anything"


def test_without_a_bound_nothing_is_clipped() -> None:
    free, _ = run(Case(clip=None, optimizer="sgd", lr=1e-3))
    loose, _ = run(Case(clip=1e9, optimizer="sgd", lr=1e-3))
    assert all(torch.equal(v, loose.snapshot()[n]) for n, v in free.snapshot().items())


@pytest.mark.parametrize("active", ["metric", "generation"])
def test_the_gate_keeps_other_groups_still(active: str) -> None:
    parts = {name: nn.Parameter(torch.ones(2)) for name in ("both", "metric", "generation")}
    groups = [{"params": [p], "reach": name} for name, p in parts.items()]
    optimizer = torch.optim.AdamW([*groups, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.1)
    gate = PassGate(optimizer)
    gate.active = active
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in parts.items() if bool((parameter != 1).all())}
    assert moved == {"both", active}
    assert bool((optimizer.param_groups[3]["params"][0] != 1).all())  # a group without a mark
    closed = ({"metric", "generation"} - {active}).pop()
    assert parts[closed].grad is None
    assert parts[closed] not in optimizer.state


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_warm_up_keeps_the_backbone_still_where_gradients_are_zeros(name: str, fused: bool) -> None:
    # As a backend has them that fills in what is missing: decay and momentum would still move the backbone.
    model = build_embedder("small_conv", backbone_args={"widths": (4, 8)}, embedding_dim=6)
    momentum = 0.9 if name == "sgd" else 0.0
    settings = OptimizerConfig(name=name, lr=0.1, weight_decay=0.1, momentum=momentum)
    optimizer, gate = build_optimizer(model, settings, clip_value=1.0, fused=fused)
    assert [group["reach"] for group in optimizer.param_groups] == ["after_warm_up", "both"]
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(mine is theirs for mine, theirs in zip(held, model.parameters(), strict=True))
    gate.active = "metric"
    backbone = {name: p for name, p in model.named_parameters() if name.startswith("backbone.")}
    for warm_up in (True, True, False):
        model.set_warm_up(warm_up)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        # What starts at zero stays there.
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        decays = {name for name, value in before.items() if bool(value.any())}
        assert moved == {name for name in decays if not (warm_up and name in backbone)}
        assert any(p in optimizer.state for p in backbone.values()) is not warm_up


def test_a_backbone_without_parameters_has_no_group() -> None:
    model = build_embedder("small_conv", backbone_args={"widths": (4, 8)}, embedding_dim=6)
    model.backbone.network = nn.Identity()
    assert [group["reach"] for group in parameter_groups(model)] == ["both"]


def test_without_a_pass_the_gate_lets_only_shared_groups_through() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "reach": "metric"}], lr=1.0)
    PassGate(optimizer)
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert float(parameter.detach()) == 1


def rates(settings: ScheduleConfig, epochs: int) -> list[float]:
    optimizer, _ = build_optimizer(module(), OptimizerConfig(lr=1.0, schedule=settings))
    schedule = build_schedule(optimizer, settings, epochs)
    found = []
    for _ in range(epochs):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def test_constant_rate() -> None:
    assert rates(ScheduleConfig(), 5) == [1.0] * 5


def test_stepped_rate() -> None:
    settings = ScheduleConfig(name="step", step_size=2, gamma=0.5)
    assert rates(settings, 7) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_rate_at_milestones() -> None:
    settings = ScheduleConfig(name="milestones", milestones=(1, 4), gamma=0.1)
    assert rates(settings, 6) == pytest.approx([1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_rate() -> None:
    want = [(1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)]
    assert rates(ScheduleConfig(name="cosine"), 8) == pytest.approx(want)


def test_a_schedule_acts_on_every_group_of_the_graph() -> None:
    case = Case()
    backend = case.backend()
    optimizer = backend.optimizers["graph"]
    assert len(optimizer.param_groups) == 3
    schedule = build_schedule(optimizer, ScheduleConfig(name="step", step_size=1, gamma=0.5), 3)
    case.step_on(backend)(*case.images(), averages_of(), step=0)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [case.lr / 2] * 3


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_optimisers_obey_a_gate_and_others_do_not(name: str) -> None:
    layer = module()
    settings = OptimizerConfig(name=name, lr=0.3, weight_decay=0.2, momentum=0.0 if name == "adamw" else 0.9)
    optimizer, _ = build_optimizer(layer, settings, fused=True)
    assert obeys_gate(optimizer) and not obeys_gate(build_optimizer(module(), settings)[0])
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.3, 0.2)
    assert not obeys_gate(build_optimizer(module(), OptimizerConfig(name="torch.optim:RMSprop", lr=0.1), fused=True)[0])
    before = layer.weight.detach().clone()
    for closed, gradient in ((1.0, math.nan), (1.0, 1.0), (0.0, 1.0)):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        optimizer.found_inf = torch.tensor(closed)
        optimizer.step()
        assert torch.equal(layer.weight, before) == bool(closed)
    del optimizer.found_inf
    want = module()
    plain, _ = build_optimizer(want, settings)
    want.weight.grad = torch.ones_like(want.weight)
    plain.step()
    torch.testing.assert_close(layer.weight, want.weight)
    (state,) = (optimizer.state[layer.weight],)
    for key, value in plain.state[want.weight].items():
        torch.testing.assert_close(state[key], value, check_dtype=False)


def test_fused_momentum_starts_with_a_parameter_that_joins_later() -> None:
    """As after a warm-up."""
    layers = [module(), module()]
    settings = OptimizerConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.0)
    optimizers = [build_optimizer(layer, settings, fused=layer is layers[0])[0] for layer in layers]
    for joined in (False, True, True):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer.weight.grad = torch.ones_like(layer.weight)
            layer.bias.grad = torch.ones_like(layer.bias) if joined else None
            optimizer.step()
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())
    assert float(layers[0].bias.detach()[0]) == pytest.approx(1 - 0.1 - 0.19)


@pytest.mark.parametrize("active", ["metric", "generation"])
def test_gate_clipping_and_rates_hold_for_fused_moves(active: str) -> None:
    parts = {name: nn.Parameter(torch.zeros(2)) for name in ("both", "metric", "generation")}
    optimizer = torch.optim.SGD([{"params": [p], "reach": name} for name, p in parts.items()], lr=1.0, fused=True)
    gate = PassGate(optimizer)
    clip_by_value(optimizer, 0.5)
    schedule = build_schedule(optimizer, ScheduleConfig(name="step", step_size=1, gamma=0.5), 3)
    gate.active = active
    for _ in range(2):
        for parameter in parts.values():
            parameter.grad = torch.tensor([7.0, -0.25])
        optimizer.step()
        schedule.step()
    moved = torch.tensor([-0.75, 0.375])  # by rates 1 and 1/2
    for name, parameter in parts.items():
        assert torch.equal(parameter.detach(), moved if name in ("both", active) else torch.zeros(2))
