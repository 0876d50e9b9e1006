"""The backend of one process: precision, loss scaling, what it holds."""

import pytest
import torch
from maths_cases import assert_close
from step_cases import Case, NotingBackend, averages_of, run
from torch import Tensor, nn

from gcahng.errors import ConfigError
from gcahng.training.backend import PlainBackend


def test_half_precision_needs_cuda() -> None:
    with pytest.raises(ConfigError, match=r"`train.precision` fp16 needs CUDA: the device is cpu"):
        PlainBackend({}, {}, {}, precision="fp16")


def test_parts_by_name() -> None:
    backend = Case(graph=False, generate=False).backend()
    assert backend.has("metric_model")
    assert not backend.has("graph")
    assert backend.module("metric_model") is backend.modules["metric_model"]
    assert backend.state_dict() == {}
    backend.load_state_dict({})


class DtypeOf(nn.Module):
    """Multiplies, and remembers in which dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_bf16_lowers_every_part_but_the_metric_loss() -> None:
    parts = {name: DtypeOf() for name in ("metric_model", "graph", "classifier", "metric_loss")}
    x = torch.zeros(2, 4)
    low = PlainBackend(parts, {}, {}, precision="bf16")
    full = PlainBackend(parts, {}, {})
    for name in parts:
        expected = torch.float32 if name == "metric_loss" else torch.bfloat16
        assert low.forward(name, x).dtype == expected
        assert full.forward(name, x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):  # an outer autocast does not leak in
            assert full.forward(name, x).dtype == torch.float32
    assert low.matmul_dtype == torch.bfloat16
    assert full.matmul_dtype is None


@pytest.mark.parametrize("graph_backend", ["eager", "scatter"])
def test_a_bf16_step_stays_near_fp32(graph_backend: str) -> None:
    options: dict[str, object] = {"backend": graph_backend}
    single = Case(dtype=torch.float32, graph_options=options)
    low = Case(dtype=torch.float32, precision="bf16", graph_options=options)
    _, (want,) = run(single)
    backend, (got,) = run(low)
    for name, value in want.items():
        # 4 % of the value, or of 1 for losses that are nearly 0.
        assert abs(float(got[name] - value)) <= 4e-2 * max(abs(float(value)), 1.0), name
        assert got[name].dtype == torch.float32
    assert any(not torch.equal(got[name], want[name]) for name in want)
    assert all(p.dtype == torch.float32 for p in backend.parameters().values())


def scaled(case: Case, scale: float) -> NotingBackend:
    """A backend with a loss scaler put in by hand, as fp16 has it on CUDA."""
    backend = case.backend()
    backend.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return backend


@pytest.mark.parametrize("clip", [10.0, 1e-3])
def test_gradients_are_unscaled_before_they_are_clipped(clip: float) -> None:
    # The scale is a power of two, so float64 gradients come back bit by bit; with a clip of 1e-3
    # nearly every gradient is cut, which would show a clip of scaled ones. SGD, for AdamW's first
    # steps hardly see the size of a gradient.
    case = Case(clip=clip, optimizer="sgd")
    plain, reports = run(case, 2)
    backend = scaled(case, 2.0**12)
    step, averages = case.step_on(backend), averages_of()
    for number in range(2):
        got = step(*case.images(number), averages, step=number)
        assert all(torch.equal(got[name], reports[number][name]) for name in got)
    assert_close(backend.snapshot(), plain.snapshot(), 1e-13)
    largest = max(float(g.abs().max()) for g in backend.phases[0].gradients.values())
    assert largest > 2**8  # gradients noted before the move are scaled ones


def test_an_overflow_skips_the_move_and_lowers_the_scale() -> None:
    case = Case(dtype=torch.float32)
    backend = scaled(case, 2.0**127)
    before = backend.snapshot()
    case.step_on(backend)(*case.images(), averages_of(), step=0)
    assert backend.scaler is not None
    assert backend.scaler.get_scale() < 2.0**127
    assert all(torch.isfinite(v).all() for v in backend.snapshot().values())
    moved = [n for n, v in backend.phases[0].parameters.items() if not torch.equal(v, before[n])]
    assert moved == []
    assert all(p.grad is None for p in backend.parameters().values())


def test_training_goes_on_after_overflows() -> None:
    case = Case(dtype=torch.float32, lr=1e-3)
    backend = scaled(case, 2.0**127)
    before = backend.snapshot()
    step, averages = case.step_on(backend), averages_of()
    for number in range(45):
        step(*case.images(number), averages, step=number)
    after = backend.snapshot()
    trained = [n for n, p in backend.parameters().items() if p.requires_grad]
    still = [n for n in trained if torch.equal(before[n], after[n])]
    assert still == []


def test_the_scale_is_saved() -> None:
    case = Case(dtype=torch.float32)
    backend = scaled(case, 2.0**127)
    case.step_on(backend)(*case.images(), averages_of(), step=0)
    other = scaled(case, 4.0)
    other.load_state_dict(backend.state_dict())
    assert other.scaler is not None
    assert backend.scaler is not None
    assert other.scaler.get_scale() == backend.scaler.get_scale() != 4.0


def test_gradients_are_dropped_after_each_move() -> None:
    backend, _ = run(Case(proxies=True), 2)
    assert all(p.grad is None for p in backend.parameters().values())
    # Each phase starts from none: the classifier's gradient never meets the generation pass.
    for phase in backend.phases:
        if phase.reach == "generation":
            assert all(name.startswith("graph.") for name in phase.gradients)
        if phase.reach == "classifier":
            assert all(name.startswith("classifier.") for name in phase.gradients)
