"""Synthesis and losses block by block: the same as from the full table, values and gradients."""

import pytest
import torch
from generation_loops import classification, diversity, similarity, synthetic_loss
from maths_cases import OWN_PATHS, Size, assert_close, batch_of, generator
from torch import Tensor

from gcahng import losses
from gcahng.generation import Interpolation, generate_negatives
from gcahng.generation.block_losses import (
    coefficient_row_sums,
    coefficient_spread,
    generation_sums,
    synthetic_scores,
)
from gcahng.generation.block_synthesis import BatchSynthesis, class_major_plan, single_coefficients
from gcahng.generation.interpolation import positives
from gcahng.graph import Coefficients, PairCoefficients, PairPlan, TableCoefficients

# Padded plans (7, 9, 13 classes) and full ones; the last two are small enough for loops.
SIZES = [
    Size(7, 2, 6, 1, 1), Size(9, 3, 8, 1, 1), Size(13, 2, 5, 1, 1), Size(6, 4, 8, 1, 1),
    Size(3, 3, 4, 1, 1), Size(2, 2, 4, 1, 1),
]  # fmt: skip
RULES = {
    "released": Interpolation(3.0, 2.0),
    "first epoch": Interpolation(3.0),
    "paper": Interpolation(3.0, 2.0, normalised_distance=True),
}
SIZE_IDS = pytest.mark.parametrize("size", SIZES, ids=str)
NUM_TRAINING = 30


def inputs(size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, labels, symmetric coefficients (leaf), mixing weights."""
    z, labels = batch_of(size)
    draw = generator(31)
    table = torch.rand(size.batch, size.batch, size.dim, generator=draw, dtype=torch.float64)
    table = (table + table.transpose(0, 1)) / 2
    weights = torch.rand(size.num_samples, size.num_samples - 1, generator=draw).double()
    return z.requires_grad_(), labels, table.requires_grad_(), weights


def as_pairs(table: Tensor, plan: PairPlan) -> PairCoefficients:
    """A symmetric table as the pairs backend delivers it."""
    samples = plan.order.view(plan.num_blocks, plan.block_size)
    return PairCoefficients(
        plan,
        [table[samples[c.first][:, :, None], samples[c.second][:, None, :]] for c in plan.chunks],
    )


def coefficients_of(kind: str, table: Tensor, plan: PairPlan) -> Coefficients:
    return as_pairs(table, plan) if kind == "pairs" else TableCoefficients(plan, table)


def full_table(batch: BatchSynthesis, coefficients: Coefficients) -> Tensor:
    """(B, P, D) from the blocks; every entry must come exactly once."""
    plan, classes = batch.plan, batch.plan.block_size // batch.num_samples
    size = (plan.num_blocks, plan.num_blocks, plan.block_size, classes, batch.z.shape[-1])
    table = batch.z.new_full(size, float("nan"))
    for block in batch.blocks(coefficients):
        assert torch.isnan(table[block.anchors, block.classes]).all()
        table = table.index_put((block.anchors, block.classes), block.values)
    assert not torch.isnan(table).any()
    return plan.samples(table.transpose(1, 2).flatten(2, 3)[:, :, : batch.num_classes])


@pytest.mark.parametrize("kind", ["pairs", "table"])
@pytest.mark.parametrize("rule", RULES)
@SIZE_IDS
def test_blocks_equal_the_full_table(size: Size, rule: str, kind: str) -> None:
    z, labels, table, weights = inputs(size)
    plan = class_major_plan(size.num_classes, size.num_samples)
    batch = BatchSynthesis.of(z, plan, size.num_samples, RULES[rule], weights)
    got = full_table(batch, coefficients_of(kind, table, plan))
    want = generate_negatives(
        z, labels, table,
        alpha=3.0, mean_metric_loss=RULES[rule].mean_metric_loss, weights=weights,
        normalised_distance=RULES[rule].normalised_distance,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@SIZE_IDS
def test_single_coefficients_equal_none(size: Size) -> None:
    z, labels, _, weights = inputs(size)
    plan = class_major_plan(size.num_classes, size.num_samples)
    batch = BatchSynthesis.of(z, plan, size.num_samples, RULES["released"], weights)
    got = full_table(batch, single_coefficients(plan, z))
    want = generate_negatives(z, labels, None, alpha=3.0, mean_metric_loss=2.0, weights=weights)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def classifier(size: Size) -> tuple[Tensor, Tensor]:
    draw = generator(4)
    weight = torch.randn(NUM_TRAINING, size.dim, generator=draw, dtype=torch.float64)
    return weight, torch.randn(NUM_TRAINING, generator=draw, dtype=torch.float64)


def by_blocks(size: Size, z: Tensor, labels: Tensor, coefficients: Coefficients, weights: Tensor) -> dict[str, Tensor]:
    plan = coefficients.plan
    batch = BatchSynthesis.of(z, plan, size.num_samples, RULES["released"], weights)
    partial = synthetic_scores(batch, coefficients)
    weight, bias = classifier(size)
    sums = generation_sums(batch, coefficients, labels[: size.num_classes], lambda x: x @ weight.T + bias)
    entries = size.batch * size.num_classes
    row_mean = coefficient_row_sums(coefficients, plan) / size.batch
    return {
        "synthetic": losses.synthetic_loss_from_scores(z, partial.scores, partial.square_sum, size.num_samples),
        "classification": sums.classification / entries,
        "similarity": sums.similarity / entries,
        "diversity": losses.diversity_from_spread(coefficient_spread(coefficients, row_mean, plan), size.batch),
    }


def by_table(size: Size, z: Tensor, labels: Tensor, table: Tensor, weights: Tensor) -> dict[str, Tensor]:
    synthetic = generate_negatives(z, labels, table, alpha=3.0, mean_metric_loss=2.0, weights=weights)
    weight, bias = classifier(size)
    logits = synthetic @ weight.T + bias
    return {
        "synthetic": losses.synthetic_n_pair_loss(z, synthetic),
        "classification": losses.classification_loss(logits, labels[: size.num_classes]),
        "similarity": losses.similarity_loss(z, synthetic),
        "diversity": losses.diversity_loss(table),
    }


def with_gradients(found: dict[str, Tensor], z: Tensor, table: Tensor) -> dict[str, Tensor]:
    result = {name: value.detach() for name, value in found.items()}
    for name, value in found.items():
        gradients = torch.autograd.grad(value, [z, table], retain_graph=True, allow_unused=True)
        for leaf, gradient in zip(("z", "table"), gradients, strict=True):
            if gradient is not None:
                result[f"{name} by {leaf}"] = gradient
    return result


@pytest.mark.parametrize("kind", ["pairs", "table"])
@SIZE_IDS
def test_block_losses_equal_the_losses_of_the_table(size: Size, kind: str) -> None:
    z, labels, table, weights = inputs(size)
    plan = class_major_plan(size.num_classes, size.num_samples)
    got = with_gradients(by_blocks(size, z, labels, coefficients_of(kind, table, plan), weights), z, table)
    want = with_gradients(by_table(size, z, labels, table, weights), z, table)
    assert "diversity by z" not in want
    if kind == "pairs":
        # A pair's coefficient stands for both of its directions; where the gradient lands differs.
        for found in (got, want):
            for name in [n for n in found if n.endswith("by table")]:
                found[name] = found[name] + found[name].transpose(0, 1)
    assert_close(got, want, OWN_PATHS)


@pytest.mark.parametrize("size", SIZES[-2:], ids=str)
def test_losses_of_the_table_equal_loops(size: Size) -> None:
    z, labels, table, weights = inputs(size)
    synthetic = generate_negatives(z, labels, table, alpha=3.0, mean_metric_loss=2.0, weights=weights)
    want = {
        "synthetic": synthetic_loss(z, synthetic, size.num_samples),
        "classification": classification(synthetic, labels[: size.num_classes].tolist(), *classifier(size)),
        "similarity": similarity(z, synthetic, size.num_classes),
        "diversity": diversity(table),
    }
    got = by_table(size, z, labels, table, weights)
    assert_close(with_gradients(got, z, table), with_gradients(want, z, table), OWN_PATHS)


def test_duplicate_images_are_finite() -> None:
    size = Size(7, 2, 6, 1, 1)
    z, labels, table, weights = inputs(size)
    with torch.no_grad():
        z[1] = z[0]
        z[9] = z[2]
    plan = class_major_plan(size.num_classes, size.num_samples)
    found = with_gradients(by_blocks(size, z, labels, as_pairs(table, plan), weights), z, table)
    for name, value in found.items():
        assert torch.isfinite(value).all(), name
    assert_close(
        {n: v for n, v in found.items() if " by " not in n},
        {n: v.detach() for n, v in by_table(size, z, labels, table, weights).items()},
    )


def test_detached_coefficients_keep_values_and_pass_no_gradient() -> None:
    size = Size(4, 2, 6, 1, 1)
    z, _, table, weights = inputs(size)
    plan = class_major_plan(4, 2)
    for kind in ("pairs", "table"):
        batch = BatchSynthesis.of(z, plan, 2, RULES["released"], weights)
        attached = coefficients_of(kind, table, plan)
        loose = attached.detach()
        assert torch.equal(loose.table(), table)
        scores = synthetic_scores(batch, loose).scores
        assert torch.equal(scores, synthetic_scores(batch, attached).scores)
        gradients = torch.autograd.grad(scores.sum(), [z, table], allow_unused=True)
        assert gradients[0] is not None
        assert gradients[1] is None


def test_the_positive_of_the_last_group_is_in_the_first() -> None:
    z = torch.arange(6.0)[:, None]
    assert positives(z, 3)[:, 0].tolist() == [2, 3, 4, 5, 0, 1]
