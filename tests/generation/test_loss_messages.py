"""What the two losses of a loop of one's own say to wrong input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcahng.errors import InputError
from gcahng.generation import (
    ConstantClassifier,
    Interpolation,
    LossFactors,
    Synthesis,
    generation_loss,
    synthetic_loss,
)
from gcahng.graph import GraphNetwork, GraphOutput, class_major_plan, neighbour_plan

P, K, D, N = 4, 2, 8, 6
FACTORS = LossFactors(1.0, 10.0, 0.3)
SYNTHESIS = Synthesis(K, Interpolation(alpha=5.0, mean_metric_loss=3.0), torch.full((K, K - 1), 0.4))
LABELS = torch.arange(P).repeat(K)


def relate(**options: Any) -> tuple[Tensor, GraphOutput]:
    torch.manual_seed(0)
    z = torch.randn(P * K, D)
    return z, GraphNetwork(D, N)(z, LABELS, **({"plan": class_major_plan(P, K)} | options))


def judged(z: Tensor, coefficients: Any, classifier: Any = None, class_labels: Tensor | None = None) -> object:
    layer = nn.Linear(D, N)
    classifier = ConstantClassifier(layer.weight, layer.bias) if classifier is None else classifier
    class_labels = LABELS[: len(z) // K] if class_labels is None else class_labels
    return generation_loss(z, coefficients, SYNTHESIS, classifier, class_labels, FACTORS)


def synthetic(z: Tensor, coefficients: Any) -> object:
    return synthetic_loss(z, coefficients, SYNTHESIS)


@pytest.mark.parametrize("loss", [synthetic, judged])
def test_what_is_no_coefficients_is_named(loss: Callable[..., object]) -> None:
    z, output = relate()
    for wrong in (output, output.pull_coefficients, None):
        with pytest.raises(
            InputError, match=rf"got {type(wrong).__name__}\. Pass `coefficients` of the graph's output"
        ):
            loss(z, wrong)


@pytest.mark.parametrize("loss", [synthetic, judged])
def test_embeddings_must_be_those_of_the_coefficients(loss: Callable[..., object]) -> None:
    z, output = relate(coefficient_gradient=False)
    with pytest.raises(InputError, match=r"`z` must have shape \(B, D\) with D = 8 .* got \(8, 4\)"):
        loss(z[:, :4], output.coefficients)
    with pytest.raises(InputError, match="of the 6 samples in each block"):
        loss(z[:6], output.coefficients)


@pytest.mark.parametrize("loss", [synthetic, judged])
def test_a_graph_without_a_plan_names_the_plan_to_take(loss: Callable[..., object]) -> None:
    torch.manual_seed(0)
    z, labels = torch.randn(9, D), torch.arange(3).repeat(3)
    output = GraphNetwork(D, N)(z, labels, plan=None, coefficient_gradient=False)
    with pytest.raises(InputError, match=r"`gcahng\.graph\.class_major_plan`"):
        loss(z, output.coefficients)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (nn.Linear(D, N), r"got Linear\. For a linear layer write `ConstantClassifier\(layer\.weight, layer\.bias\)`"),
        (ConstantClassifier(torch.zeros(N, 3), None), r"shape \(N, D\) with D = 8: got \(6, 3\)"),
    ],
)
def test_the_classifier_must_fit(classifier: object, message: str) -> None:
    z, output = relate()
    with pytest.raises(InputError, match=message):
        judged(z, output.coefficients, classifier)


@pytest.mark.parametrize(
    ("class_labels", "message"),
    [
        (LABELS, r"expected shape \(4,\), got \(8,\)\. Pass `class_labels` of `gcahng\.layout\.group_major"),
        (LABELS[: P - 1], r"expected shape \(4,\), got \(3,\)"),
        (LABELS[:P].float(), "integer class numbers"),
        (LABELS[:P] + 3, r"must lie in 0 \.\.\. 5, .* got 3 to 6"),
        (LABELS[:P] - 1, r"must lie in 0 \.\.\. 5, .* got -1 to 2"),
    ],
)
def test_class_labels_must_fit(class_labels: Tensor, message: str) -> None:
    z, output = relate()
    with pytest.raises(InputError, match=message):
        judged(z, output.coefficients, None, class_labels)


def test_a_sparse_graph_has_no_table() -> None:
    z, _ = relate()
    plan = neighbour_plan(z, K, 1)
    for gradient in (True, False):
        _, output = relate(plan=plan, coefficient_gradient=gradient)
        with pytest.raises(InputError, match="needs every pair of the batch: got the plan of a sparse graph"):
            _ = output.pull_coefficients


def test_one_process_among_several_has_no_table() -> None:
    _, output = relate(plan=class_major_plan(P, K, share=(1, 2)))
    with pytest.raises(InputError, match="of one process of several"):
        _ = output.pull_coefficients


def test_the_plan_must_be_for_the_batch() -> None:
    with pytest.raises(InputError, match="`plan` is for 12 samples: got 8 embeddings"):
        relate(plan=class_major_plan(6, 2))
