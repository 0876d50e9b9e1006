"""Deferred checks: the same errors as immediate ones, later, and nothing has moved in between."""

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from maths_cases import assert_close
from step_cases import Case, NotingBackend, averages_of, run
from torch import Tensor, nn

from gcahng.training import finite_checks, optimizers
from gcahng.training.backend import PlainBackend
from gcahng.training.finite_checks import (
    MOST_AHEAD,
    DeferredChecks,
    FiniteChecks,
    NonFiniteEmbedding,
    NotFinite,
    finite_rows,
)
from gcahng.training.step_batch import whole_rows

BAD = [math.nan, math.inf, -math.inf]


class Slope(nn.Module):
    """A metric loss that is finite, with an infinite slope."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return (embeddings[0] * 0).abs().sqrt().sum() + embeddings.mean()


def bad_image(backend: NotingBackend, images: Tensor) -> None:
    images[7, 1, 0, 1] = math.nan
    images[9] = math.inf


def bad_image_under_a_batch_norm(backend: NotingBackend, images: Tensor) -> None:
    backend.modules["metric_model"].append(nn.BatchNorm1d(8).double())  # type: ignore[operator]
    images[4] = math.nan


def bad_weights(backend: NotingBackend, images: Tensor) -> None:
    with torch.no_grad():
        backend.modules["metric_model"][1].weight.fill_(math.inf)  # type: ignore[index, union-attr]


def bad_graph(backend: NotingBackend, images: Tensor) -> None:
    with torch.no_grad():
        backend.modules["graph"].node_classifier.bias[0] = math.inf  # type: ignore[index, union-attr, operator]


def steep_loss(backend: NotingBackend, images: Tensor) -> None:
    backend.modules["metric_loss"] = Slope()


def bad_classifier(backend: NotingBackend, images: Tensor) -> None:
    with torch.no_grad():
        backend.modules["classifier"].bias[0] = math.nan  # type: ignore[index, union-attr, operator]


def bad_read_out(backend: NotingBackend, images: Tensor) -> None:
    """The graph's read-out of pull coefficients, which the generation pass alone has a gradient of."""

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * math.inf

    backend.modules["graph"].edge_out.weight.register_hook(spoil)  # type: ignore[union-attr]


FAULTS: dict[str, tuple[Case, Callable[[NotingBackend, Tensor], None], str, int]] = {
    # case, fault of step 1, message, phases of the step that moved before it
    "image": (Case(), bad_image, "2 embeddings of the batch are not finite, the first at position 7; no", 0),
    "image in a baseline": (Case(graph=False, generate=False), bad_image, "2 embeddings of the batch are not", 0),
    "image under a norm": (Case(), bad_image_under_a_batch_norm, "1 embeddings .* at position 4; no parameter", 0),
    "weights": (Case(generate=False), bad_weights, "12 embeddings .* the first at position 0", 0),
    "metric loss": (Case(generate=False), bad_graph, "The metric loss is (nan|inf); no parameter was moved in", 0),
    "metric gradient": (Case(), steep_loss, "Gradients of `metric_model` are not finite in the metric pass; no", 0),
    "classifier loss": (Case(), bad_classifier, "The classifier loss is nan; no parameter was moved in this", 1),
    "generation gradient": (Case(), bad_read_out, "Gradients of `graph` are not finite in the generation pass", 2),
}


def run_into(case: Case, spoil: Callable[[NotingBackend, Tensor], None]) -> tuple[NotingBackend, NotFinite]:
    """A good step 0, step 1 with the fault, then good ones until the error."""
    backend = case.backend()
    step, averages = case.step_on(backend), averages_of()
    step(*case.images(0), averages, step=0)
    images, labels = case.images(1)
    spoil(backend, images)

    def go_on() -> None:
        step(images, labels, averages, step=1)
        for number in range(2, 9):
            step(*case.images(number), averages, step=number)

    with pytest.raises(NotFinite) as caught:
        go_on()
    return backend, caught.value


def assert_same(got: NotingBackend, want: NotingBackend) -> None:
    """Parameters and what the optimisers remember, bit for bit; no gradient is left."""
    exactly = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(got.snapshot(), want.snapshot(), **exactly)
    for name, optimizer in got.optimizers.items():
        states = [built.state_dict()["state"] for built in (optimizer, want.optimizers[name])]
        torch.testing.assert_close(*states, **exactly)
        assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", FAULTS)
def test_the_error_and_the_parameters_are_those_of_immediate_checks(
    monkeypatch: pytest.MonkeyPatch, name: str, optimizer: str, late: bool
) -> None:
    case, spoil, message, moved = FAULTS[name]
    case = replace(case, optimizer=optimizer, fused=True, lr=1e-3)
    per_step = 3 if case.generate else 1
    want, error = run_into(case, spoil)
    assert re.search(message, str(error))
    assert len(want.phases) == per_step + moved
    if late:  # as if the device took its time
        monkeypatch.setattr(finite_checks._Arrival, "arrived", False)
    got, later = run_into(replace(case, deferred=True), spoil)
    assert len(got.phases) == per_step * (2 + (MOST_AHEAD - 1) * late)
    assert type(later) is type(error) and str(later) == str(error)
    assert str(later).startswith("Step 1: ") and later.step == error.step == 1
    assert getattr(later, "positions", None) == getattr(error, "positions", None)
    assert_same(got, want)


@pytest.mark.parametrize("name", ["image", "classifier loss", "generation gradient"])
def test_optimisers_that_obey_no_gate_are_waited_for(name: str) -> None:
    case, spoil, _, moved = FAULTS[name]
    want, error = run_into(case, spoil)
    got, same = run_into(replace(case, deferred=True), spoil)
    assert str(same) == str(error)
    assert len(got.phases) == 3 + moved  # none of the phase with the fault, nor any later one
    assert_same(got, want)


def test_one_optimiser_that_obeys_no_gate_is_enough_to_wait() -> None:
    case, spoil, _, _ = FAULTS["metric gradient"]
    case = replace(case, fused=True, deferred=True)
    backend = case.backend()
    plain = replace(case, fused=False).backend()
    graph = torch.optim.AdamW(backend.modules["graph"].parameters(), fused=False)
    assert not optimizers.obeys_gate(graph) and optimizers.obeys_gate(backend.optimizers["graph"])
    backend.optimizers["graph"], backend.gates["graph"] = graph, plain.gates["graph"]
    images, labels = case.images()
    spoil(backend, images)
    before = backend.snapshot()
    with pytest.raises(NotFinite, match="Gradients of `metric_model`"):
        case.step_on(backend)(images, labels, averages_of(), step=0)
    assert backend.phases == []
    assert all(torch.equal(value, before[name]) for name, value in backend.snapshot().items())


@pytest.mark.parametrize(
    "case",
    [Case(), Case(optimizer="sgd", proxies=True), Case(graph=False, channel=False), Case(fused=False)],
    ids=["whole", "sgd and proxies", "single coefficient", "not fused"],
)
def test_a_good_run_is_bit_for_bit_the_same(case: Case) -> None:
    case = replace(case, fused=case != Case(fused=False))
    want, reports = run(case, 4)
    got, again = run(replace(case, deferred=True), 4)
    got.checks.finish()
    for a, b in zip(reports, again, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert_same(got, want)
    assert [phase.reach for phase in got.phases] == [phase.reach for phase in want.phases]


def test_fused_moves_differ_by_rounding_alone() -> None:
    for optimizer in ("adamw", "sgd"):
        plain, _ = run(Case(optimizer=optimizer, lr=1e-3), 3)
        fused, _ = run(Case(optimizer=optimizer, lr=1e-3, fused=True), 3)
        # Key biases of the edge attention have gradients of 0 and rounding noise: AdamW's steps are their signs.
        want = {n: v for n, v in plain.snapshot().items() if not n.endswith("key.bias")}
        got = fused.snapshot()
        assert_close({name: got[name] for name in want}, want, 1e-9)
        assert fused.move_counts() == plain.move_counts() if optimizer == "adamw" else True


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_who_catches_the_error_can_go_on(optimizer: str) -> None:
    """The very first move is skipped: neither counts nor momentum may remember it."""
    case = Case(optimizer=optimizer, fused=True, deferred=True, lr=1e-3)
    backend = case.backend()
    for built in backend.optimizers.values():
        for group in built.param_groups:
            if optimizer == "sgd":
                group["momentum"] = 0.9
    step, averages = case.step_on(backend), averages_of()
    images, labels = case.images()
    images[0] = math.nan
    step(images, labels, averages, step=0)
    with pytest.raises(NonFiniteEmbedding):
        backend.checks.finish()
    backend.checks.finish()  # said once
    for module in backend.modules.values():
        for name, value in module.named_buffers():
            value.fill_(0.0 if name.endswith("mean") else 1.0)  # running statistics have met the image
    for number in (0, 1):
        step(*case.images(number), averages_of(), step=number)
    backend.checks.finish()

    fresh = case.backend()
    for built in fresh.optimizers.values():
        for group in built.param_groups:
            if optimizer == "sgd":
                group["momentum"] = 0.9
    for number in (0, 1):
        case.step_on(fresh)(*case.images(number), averages_of(), step=number)
    assert_same(backend, fresh)


def test_the_last_step_is_known_after_finish() -> None:
    case = Case(fused=True, deferred=True)
    backend = case.backend()
    images, labels = case.images()
    images[2] = math.nan
    case.step_on(backend)(images, labels, averages_of(), step=17)
    assert backend.checks.gate is not None and float(backend.checks.gate) == 1
    with pytest.raises(NonFiniteEmbedding, match="Step 17: 1 embeddings .* position 2") as caught:
        backend.checks.finish()
    assert (caught.value.step, caught.value.positions) == (17, [2])
    assert float(backend.checks.gate) == 0


class FirstGroup(nn.Module):
    """A metric loss that never sees the second half of the batch."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return embeddings[:6].square().mean()


def spoil_output(module: nn.Module, bad_calls: set[int]) -> None:
    """Make embedding 9 infinite in some calls; no gradient passes through it."""
    calls = iter(range(100))

    def spoil(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.index_fill(0, torch.tensor(9), math.inf) if next(calls) in bad_calls else output

    module.register_forward_hook(spoil)


@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_bad_embedding_without_a_bad_loss_moves_nothing_either(
    monkeypatch: pytest.MonkeyPatch, with_scaler: bool
) -> None:
    monkeypatch.setattr(finite_checks._Arrival, "arrived", False)
    case = Case(graph=False, generate=False, fused=True, deferred=True)
    backend = scaled(case, 4.0) if with_scaler else case.backend()
    backend.modules["metric_loss"] = FirstGroup()
    spoil_output(backend.modules["metric_model"], {1, 2})
    step, averages = case.step_on(backend), averages_of()
    for number in range(3):  # the third one is bad as well, and would be told of in its turn
        report = step(*case.images(number), averages, step=number)
        assert torch.isfinite(report["total_loss"])
    first, *later = (phase.parameters for phase in backend.phases)
    assert len(later) == 2
    for parameters in later:
        torch.testing.assert_close(parameters, first, rtol=0, atol=0)
    assert backend.phases[2].gradients.keys() == backend.phases[0].gradients.keys()
    with pytest.raises(NonFiniteEmbedding, match="Step 1: 1 embeddings .* position 9"):
        backend.checks.finish()
    backend.checks.finish()  # said once; step 2 was forgotten with it
    step(*case.images(3), averages, step=3)
    backend.checks.finish()
    assert not torch.equal(backend.phases[3].parameters["metric_model.1.weight"], first["metric_model.1.weight"])


def scaled(case: Case, scale: float) -> NotingBackend:
    backend = case.backend()
    backend.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return backend


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_obeys_the_gate(fused: bool) -> None:
    case = Case(dtype=torch.float32, fused=fused, deferred=True)
    backend = scaled(case, 4.0)
    step, averages = case.step_on(backend), averages_of()
    step(*case.images(0), averages, step=0)
    before = backend.snapshot()
    with torch.no_grad():
        backend.modules["classifier"].bias[0] = math.nan  # type: ignore[index, union-attr, operator]

    def go_on() -> None:
        for number in (1, 2):
            step(*case.images(number), averages, step=number)

    with pytest.raises(NotFinite, match="Step 1: The classifier loss is nan"):
        go_on()
    # Step 1's metric pass was good; with optimisers that obey no gate nothing was noted after it.
    assert len(backend.phases) == (6 if fused else 4)
    between = backend.phases[3].parameters
    assert any(not torch.equal(between[name], before[name]) for name in before if not name.startswith("classifier"))
    torch.testing.assert_close(backend.snapshot(), between, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fused", [False, True])
def test_overflows_under_a_loss_scaler_are_no_faults(fused: bool) -> None:
    case = Case(dtype=torch.float32, fused=fused, graph=False, channel=False)
    backends = [scaled(replace(case, deferred=deferred), 2.0**127) for deferred in (False, True)]
    before = backends[0].snapshot()
    for backend in backends:
        for number in range(20):
            case.step_on(backend)(*case.images(number), averages_of(), step=number)
        backend.checks.finish()
        assert backend.scaler is not None and backend.scaler.get_scale() < 2.0**127
    assert_same(*backends)
    assert not torch.equal(before["classifier.weight"], backends[1].snapshot()["classifier.weight"])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_with_a_bad_entry_anywhere(bad: float, dtype: torch.dtype) -> None:
    for shape in ((5,), (5, 7), (5, 3, 4, 4)):
        x = torch.randn(shape).to(dtype)
        if len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x[1] = torch.finfo(dtype).max
        x[(3, *(-1,) * (x.dim() - 1))] = bad
        assert finite_rows(x).tolist() == [True, True, True, False, True]
    assert finite_rows(torch.arange(6).view(2, 3)).tolist() == [True, True]


def test_inputs_that_are_not_one_to_an_embedding_name_the_embeddings() -> None:
    z = torch.zeros(4, 2)
    z[3] = math.nan
    whole = whole_rows(torch.full((8, 5), math.nan), z)
    for checks in (DeferredChecks("cpu"), finite_checks.ImmediateChecks()):
        checks.begin(5)

        def one_step(checks: FiniteChecks = checks) -> None:
            checks.embeddings(z, whole)
            checks.end()
            checks.finish()

        with pytest.raises(NonFiniteEmbedding) as caught:
            one_step()
        assert caught.value.positions == [3]


def test_large_finite_numbers_are_no_faults() -> None:
    checks = DeferredChecks("cpu")
    checks.begin(0)
    checks.embeddings(torch.full((2, 2), 1e300, dtype=torch.float64), torch.ones(2))
    checks.loss(torch.tensor(1e300, dtype=torch.float64), "metric")
    checks.gradients({"graph": [torch.full((2,), 3e38)], "none": []}, "metric")
    checks.end()
    checks.finish()
    assert float(checks.gate) == 0


def test_a_plain_backend_checks_at_once_unless_told_otherwise() -> None:
    assert PlainBackend({}, {}, {}).checks.gate is None
    assert PlainBackend({}, {}, {}, deferred_checks=True).checks.gate is not None
