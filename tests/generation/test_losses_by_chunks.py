"""The losses chunk by chunk with their written-out gradients: equal to the plain formulas on the edge-list graph."""

from collections.abc import Callable

import pytest
import torch
from generation_cases import FACTORS, Case, both_losses
from maths_cases import OWN_PATHS, SIZES, Size, assert_close, errors, plan_of
from torch import Tensor

from gcahng.errors import InputError
from gcahng.generation import ConstantClassifier, Synthesis, generation_loss, synthetic_loss
from gcahng.generation.pair_synthesis import CoefficientRows
from gcahng.graph import (
    ConstantCoefficients,
    PairCoefficients,
    PairPlan,
    TableCoefficients,
    UnitCoefficients,
    pair_plan,
)
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.pairs import class_major_plan
from gcahng.losses import classification_loss, similarity_loss, synthetic_n_pair_loss

EVERY_SIZE = pytest.mark.parametrize("size", SIZES, ids=str)


def same_everywhere(case: Case, tolerance: float = OWN_PATHS) -> None:
    got, want = both_losses(case, case.graph("eager")), both_losses(case, case.graph("scatter"))
    # Zero here; rounding noise or None in the oracle.
    names = [name for name in want if not name.endswith("key.bias")]
    assert any(name.startswith("gradient edge_out") for name in names)
    assert_close({name: got[name] for name in names}, {name: want[name] for name in names}, tolerance)


@pytest.mark.parametrize("dropout", ["tied", "independent"])
@pytest.mark.parametrize("normalised", [False, True])
@EVERY_SIZE
def test_every_gradient_is_that_of_the_plain_formulas(size: Size, normalised: bool, dropout: str) -> None:
    same_everywhere(Case(size, {"edge_dropout": dropout, "dropout": 0.3}, normalised))


@pytest.mark.parametrize("dropout", ["tied", "independent"])
@pytest.mark.parametrize(("size", "per_block"), [(SIZES[1], 2), (SIZES[2], 4), (SIZES[4], 3), (SIZES[5], 4)], ids=str)
def test_blocks_of_several_classes(size: Size, per_block: int, dropout: str) -> None:
    """All but the third with padding."""
    case = Case(size, {"edge_dropout": dropout, "dropout": 0.3}, per_block=per_block)
    assert (case.plan().valid is None) == (size is SIZES[4])
    assert len(case.plan().chunks) >= 2
    same_everywhere(case)


@pytest.mark.parametrize("normalised", [False, True])
@EVERY_SIZE
def test_duplicate_images(size: Size, normalised: bool) -> None:
    """Distances of 0 and equal distances d+ = d-, where the plain formulas pick a side."""
    same_everywhere(Case(size, {"norm": "layer_norm"}, normalised, duplicates=True))


def test_in_evaluation_mode() -> None:
    case = Case(SIZES[1])
    found = [both_losses(case, case.graph(backend).eval()) for backend in ("eager", "scatter")]
    names = [name for name in found[1] if not name.endswith("key.bias")]
    assert_close(*({name: one[name] for name in names} for one in found))


@pytest.mark.parametrize("size", [SIZES[1], SIZES[2]], ids=str)
def test_float32_is_as_near_as_the_plain_formulas(size: Size) -> None:
    """At most twice their error and 2e-6."""
    exact = both_losses(Case(size), Case(size).graph("scatter"))
    case = Case(size, dtype=torch.float32)
    names = [name for name in exact if not name.endswith("key.bias")]
    exact = {name: exact[name] for name in names}
    ours, plain = (
        errors({name: value[name].double() for name in names}, exact)
        for value in (both_losses(case, case.graph("eager")), both_losses(case, case.graph("scatter")))
    )
    assert max(ours.values()) <= 2 * max(plain.values()) + 2e-6, (ours, plain)


def test_a_bfloat16_classifier_has_bfloat16_errors_only() -> None:
    case = Case(SIZES[2], dtype=torch.float32)
    low = Case(SIZES[2], dtype=torch.float32, low=torch.bfloat16)
    want, got, plain = (both_losses(c, c.graph(b)) for c, b in ((case, "eager"), (low, "eager"), (low, "scatter")))
    assert got["classification"] != want["classification"]
    assert torch.equal(got["gradient z"], want["gradient z"])
    for name in ("similarity", "diversity"):
        assert torch.equal(got[name], want[name])
    assert max(errors(got, want).values()) <= 4e-2
    torch.testing.assert_close(got["classification"], plain["classification"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("per_block", [None, 4])
@EVERY_SIZE
def test_one_coefficient_for_all(size: Size, per_block: int | None) -> None:
    case = Case(size, per_block=per_block)
    z, labels = case.batch()
    plan = case.plan()
    found = []
    for coefficients in (UnitCoefficients(edge_layout(plan, None, 0)), None):
        leaf = z.clone().requires_grad_()
        if coefficients is not None:
            loss = synthetic_loss(leaf, coefficients, case.synthesis())
            losses = case.judge(leaf, coefficients)
            assert losses.diversity is None
            assert not losses.total.requires_grad
            parts = losses.classification, losses.similarity, losses.total
        else:
            synthetic = case.synthesis().all_at_once(leaf, None)
            loss = synthetic_n_pair_loss(leaf, synthetic)
            classified = classification_loss(case.classifier().logits(synthetic), labels[: size.num_classes])
            alike = similarity_loss(leaf, synthetic)
            parts = classified, alike, 0.5 * (FACTORS.classification * classified + FACTORS.similarity * alike)
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        names = ("synthetic", "gradient z", "classification", "similarity", "total")
        found.append({n: v.detach() for n, v in zip(names, (loss, grad, *parts), strict=True)})
    assert_close(*found)


def graph_coefficients(case: Case, *, gradient: bool) -> tuple[Tensor, PairCoefficients | ConstantCoefficients]:
    z, labels = case.batch()
    output = case.graph("eager")(z, labels, dropout_key=5, plan=plan_of(case.size), coefficient_gradient=gradient)
    assert isinstance(output.coefficients, PairCoefficients if gradient else ConstantCoefficients)
    return z, output.coefficients


def test_without_a_gradient_the_losses_are_the_same() -> None:
    case = Case(SIZES[2], {"edge_dropout": "independent"})
    z, with_gradient = graph_coefficients(case, gradient=True)
    _, constant = graph_coefficients(case, gradient=False)
    want = case.judge(z, with_gradient)
    with torch.no_grad():
        silent = case.judge(z, with_gradient)
    kept = constant.logits().clone()
    for found in (silent, case.judge(z, constant)):
        assert not found.total.requires_grad
        for name in ("total", "classification", "similarity", "diversity"):
            torch.testing.assert_close(getattr(found, name), getattr(want, name).detach(), rtol=1e-12, atol=0)
    assert torch.equal(constant.logits(), kept)
    assert want.total.requires_grad
    for part in (want.classification, want.similarity, want.diversity):
        assert part is not None
        assert not part.requires_grad


def test_coefficients_with_gradient_pass_theirs_to_j_syn() -> None:
    case = Case(Size(4, 3, 8, 1, 2))
    found = []
    for backend in ("eager", "scatter"):
        graph = case.graph(backend)
        z, labels = case.batch()
        z.requires_grad_()
        output = graph(z, labels, dropout_key=5, plan=plan_of(case.size))
        synthetic_loss(z, output.coefficients, case.synthesis()).backward()
        gradients = {f"gradient {n}": p.grad for n, p in graph.named_parameters() if p.grad is not None}
        assert "gradient edge_out.weight" in gradients
        found.append({"gradient z": z.grad} | {n: g for n, g in gradients.items() if not n.endswith("key.bias")})
    assert_close(*found)


def test_coefficients_with_gradient_must_be_all_here() -> None:
    case = Case(Size(6, 2, 8, 1, 2))
    z, labels = case.batch()
    plan = class_major_plan(6, 2, share=(0, 2))
    output = case.graph("eager")(z, labels, dropout_key=5, plan=plan)
    with pytest.raises(InputError, match="must cover all pairs of the batch in this process"):
        synthetic_loss(z, output.coefficients, case.synthesis())


@pytest.mark.parametrize(
    "plan",
    [plan_of(Size(5, 2, 8, 1, 2)), pair_plan(torch.arange(12), 5), pair_plan(torch.arange(12), 4)],
    ids=["fewer samples", "classes cut apart", "not class-major"],
)
def test_a_plan_that_does_not_hold_whole_classes_is_refused(plan: PairPlan) -> None:
    case = Case(Size(6, 2, 8, 1, 2))
    z, _ = case.batch()
    coefficients = UnitCoefficients(edge_layout(plan, None, 0))
    with pytest.raises(InputError, match="must hold whole classes of K = 2 of the 12 samples"):
        synthetic_loss(z, coefficients, case.synthesis())


def test_a_synthesis_that_cannot_be_is_refused() -> None:
    rule = Case(SIZES[0]).synthesis().rule
    with pytest.raises(InputError, match="`num_samples` must be at least 2: an anchor needs a positive, got 1"):
        Synthesis(1, rule, torch.zeros(1, 0))
    with pytest.raises(InputError, match=r"shape \(K, K-1\) = \(3, 2\): got \(2, 1\)"):
        Synthesis(3, rule, torch.zeros(2, 1))


def test_embeddings_and_classifier_are_constants_of_j_gen() -> None:
    case = Case(SIZES[1])
    z, pairs = graph_coefficients(case, gradient=True)
    table = TableCoefficients(pairs.plan, pairs.table().detach().requires_grad_())
    for coefficients in (pairs, table):
        weight = case.classifier().weight.clone().requires_grad_()
        leaf = z.clone().requires_grad_()
        classifier = ConstantClassifier(weight, case.classifier().bias)
        labels = case.batch()[1][: case.size.num_classes]
        generation_loss(leaf, coefficients, case.synthesis(), classifier, labels, FACTORS).total.backward()
        assert leaf.grad is None
        assert weight.grad is None
    assert table.values.grad is not None


def test_the_gradient_of_j_gen_is_passed_back_once() -> None:
    case = Case(SIZES[1])
    z, coefficients = graph_coefficients(case, gradient=True)
    total = case.judge(z, coefficients).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="passes its gradient back once"):
        total.backward()


def test_j_syn_passes_its_gradient_back_twice_if_asked_to() -> None:
    case = Case(SIZES[1])
    z, coefficients = graph_coefficients(case, gradient=False)
    z.requires_grad_()
    loss = synthetic_loss(z, coefficients, case.synthesis())
    first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def spreadless(shift: float) -> Callable[[Case], PairCoefficients]:
    def make(case: Case) -> PairCoefficients:
        graph = case.graph("eager")
        with torch.no_grad():
            graph.edge_out.weight.zero_()
            graph.edge_out.bias.fill_(shift)
        z, labels = case.batch()
        coefficients = graph(z, labels, dropout_key=5, plan=plan_of(case.size)).coefficients
        assert isinstance(coefficients, PairCoefficients)
        return coefficients

    return make


@pytest.mark.parametrize("shift", [0.0, 0.7, 40.0])
def test_coefficients_that_are_all_alike_have_a_finite_gradient(shift: float) -> None:
    case = Case(SIZES[1], dtype=torch.float32)
    coefficients = spreadless(shift)(case)
    found = case.judge(case.batch()[0], coefficients)
    assert float(found.diversity) == pytest.approx(1, abs=1e-6)  # type: ignore[arg-type]
    tensors = [t for t in coefficients.read_out.tensors if t.requires_grad]
    for gradient in torch.autograd.grad(found.total, tensors):
        assert torch.isfinite(gradient).all()


def test_float32_measures_a_small_spread() -> None:
    """Coefficients near 0.95 that differ by 1e-4: a sum of squares without their means would lose it."""
    case = Case(Size(9, 3, 16, 1, 2))
    graph = case.graph("eager")
    with torch.no_grad():
        graph.edge_out.weight.mul_(1e-3)
        graph.edge_out.bias.fill_(3.0)
    z, labels = case.batch()
    spreads = []
    for dtype in (torch.float64, torch.float32):
        case.dtype = dtype
        coefficients = graph.to(dtype)(z.to(dtype), labels, dropout_key=5, plan=plan_of(case.size)).coefficients
        diversity = case.judge(z.to(dtype), coefficients).diversity
        assert diversity is not None
        spreads.append(1 - float(diversity))
    assert spreads[0] < 1e-3
    assert spreads[1] == pytest.approx(spreads[0], rel=1e-3)


def test_all_images_alike_are_finite() -> None:
    size = Size(4, 2, 6, 1, 1)
    for value in (0.0, -1e-6, 0.5):
        z = torch.full((8, 6), value, requires_grad=True)
        synthesis = Synthesis(2, Case(size).synthesis().rule, torch.full((2, 1), 0.5))
        loss = synthetic_loss(z, UnitCoefficients(edge_layout(plan_of(size), None, 0)), synthesis)
        (gradient,) = torch.autograd.grad(loss, z)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_the_coefficients_serve_several_losses() -> None:
    """A loss overwrites logits of its own, not the coefficients: the next one finds what the first found."""
    z, coefficients = graph_coefficients(case := Case(SIZES[2], {"edge_dropout": "independent"}), gradient=True)
    assert isinstance(coefficients, PairCoefficients)
    before = coefficients.logits()
    first, second = case.judge(z, coefficients), case.judge(z, coefficients)
    assert torch.equal(coefficients.logits(), before)
    assert torch.equal(first.total, second.total)
    found = [
        torch.autograd.grad(loss.total, coefficients.read_out.weight, retain_graph=True)[0] for loss in (first, second)
    ]
    assert torch.equal(*found)


def test_logits_of_lower_precision_are_kept_for_their_digits() -> None:
    """lambda written over bfloat16 logits would be rounded to 1 where the loss still has a slope."""
    _, coefficients = graph_coefficients(Case(SIZES[2]), gradient=True)
    assert isinstance(coefficients, PairCoefficients)
    logits = torch.full_like(coefficients.logits(), 7.0)
    rows = CoefficientRows.written_over(coefficients, coarse := logits.bfloat16())
    assert torch.equal(coarse, logits.bfloat16())
    part = coefficients.layout.parts[0]
    fine = CoefficientRows.written_over(coefficients, logits)
    torch.testing.assert_close(rows.chunk(part)[0], fine.chunk(part)[0], rtol=1e-12, atol=0)
