"""The cases of the exactness tests hold what they should, their measure sees errors, masks know nothing of ranks."""

import itertools
from dataclasses import replace

import pytest
import torch
from exact_cases import (
    FACTORS,
    MATHS,
    OF_THE_GRAPH,
    ExactCase,
    Outcome,
    errors_by_kind,
    full_product,
    pair_cases,
    possible,
)
from pairwise import Pair, all_pairs, complete, pairs_of, possible_pairs

from gcahng.distributed import Ranks
from gcahng.graph.dropout import EdgeDropout
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.pairs import class_major_plan, ends


def test_pairs_of_a_small_product() -> None:
    factors = {"a": (1, 2, 3), "b": ("x", "y"), "c": (False, True), "d": (1, 2, 3, 4)}

    def allowed(values: object) -> bool:
        assert isinstance(values, dict)
        return not (values.get("a") == 1 and values.get("b") == "y") and not (
            values.get("b") == "x" and values.get("c") and values.get("d") == 4
        )

    products = (dict(zip(factors, v, strict=True)) for v in itertools.product(*factors.values()))
    whole = [case for case in products if allowed(case)]
    wanted: set[Pair] = set().union(*map(pairs_of, whole))
    assert set(possible_pairs(factors, allowed)) == wanted
    cases = all_pairs(factors, allowed)
    assert set().union(*map(pairs_of, cases)) == wanted
    assert all(case in whole for case in cases)
    # Three times four pairs of `a` and `d` alone.
    assert 12 <= len(cases) <= 16
    assert all_pairs(factors, allowed) == cases


def test_a_case_is_completed_or_there_is_none() -> None:
    factors = {"a": (1, 2), "b": (1, 2), "c": (1, 2)}
    sums = lambda values: sum(values.values()) + 3 - len(values) <= 5  # noqa: E731
    assert complete(factors, {"c": 2}, sums) == {"a": 1, "b": 1, "c": 2}
    assert complete(factors, {"a": 2, "b": 2, "c": 2}, sums) is None
    assert complete(factors, {"c": 2}, lambda values: "b" not in values) is None


# Pairs of values that cannot stand together; where a switch has no say it stands at its first value.
IMPOSSIBLE = {
    ("loss", "n_pair", "num_samples", 3),
    ("backend", "scatter", "neighbours", 2),
    ("generate", False, "channel", False),
    ("generate", False, "normalised_distance", True),
    ("generate", False, "fusion", "pick"),
    ("node_propagation", False, "edge_to_node", False),
    ("node_propagation", False, "edge_aggregation", "mean"),
    ("node_propagation", False, "edge_aggregation", "scaled"),
    ("edge_to_node", False, "edge_aggregation", "mean"),
    ("edge_to_node", False, "edge_aggregation", "scaled"),
    *(("graph", False, name, value) for name in OF_THE_GRAPH for value in FACTORS[name][1:]),
}


def test_every_pair_of_switches_is_in_a_case() -> None:
    cases = pair_cases()
    held = {
        ((a, getattr(case, a)), (b, getattr(case, b)))
        for case in cases
        for a, b in itertools.permutations(FACTORS, 2)
    }  # fmt: skip
    impossible = {((a, x), (b, y)) for a, x, b, y in IMPOSSIBLE} | {((b, y), (a, x)) for a, x, b, y in IMPOSSIBLE}
    for a, b in itertools.permutations(FACTORS, 2):
        for pair in itertools.product(((a, x) for x in FACTORS[a]), ((b, y) for y in FACTORS[b])):
            assert (pair in held) != (pair in impossible), pair
    assert len(cases) < 40


def test_the_full_product_holds_every_combination() -> None:
    cases = list(full_product())
    maths = {tuple(getattr(case, name) for name in MATHS) for case in cases}
    assert len(maths) == len(cases)
    values = (dict(zip(MATHS, v, strict=True)) for v in itertools.product(*MATHS.values()))
    assert sum(map(possible, values)) == len(cases)
    # What surrounds the maths is spread over all of it.
    for name in ("num_classes", "batch_norm", "clip", "optimizer", "deferred"):
        for value in FACTORS[name]:
            for samples in (2, 3):
                share = sum(getattr(c, name) == value for c in cases if c.num_samples == samples)
                assert share > len(cases) / 10, (name, value)


def outcome(**values: list[float]) -> Outcome:
    names = tuple(f"gradient:{name} step 0 | {name}" for name in values)
    sizes = tuple(map(len, values.values()))
    return Outcome(names, sizes, torch.tensor([x for v in values.values() for x in v], dtype=torch.float64))


def test_the_measure_sees_every_error() -> None:
    want = outcome(a=[1.0, 2.0], b=[4.0])
    assert errors_by_kind(want, want) == {"gradient:a": (0.0, ""), "gradient:b": (0.0, "")}
    found = errors_by_kind(outcome(a=[1.0, 2.5], b=[4.0]), want)
    assert found["gradient:a"] == (0.25, "gradient:a step 0 | a")
    assert found["gradient:b"][0] == 0
    assert errors_by_kind(outcome(a=[float("nan"), 2.0], b=[4.0]), want)["gradient:a"][0] == float("inf")
    assert errors_by_kind(outcome(a=[1.0, 2.0]), want)["gradient:b"][0] == float("inf")
    assert errors_by_kind(outcome(a=[1.0, 2.0], b=[4.0], c=[0.0]), want)["gradient:c"][0] == float("inf")
    assert want.digest() != outcome(a=[1.0, 2.0], b=[4.0 + 1e-15]).digest()


def test_parts_of_all_ranks_are_the_batch() -> None:
    case = ExactCase(num_classes=7, num_samples=3)
    images, labels = case.batch(2)
    for size in (2, 3, 4):
        parts = [case.batch(2, Ranks(rank, size)) for rank in range(size)]
        for whole, number in ((images, 0), (labels, 1)):
            groups = [part[number].view(3, -1, *whole.shape[1:]) for part in parts]
            assert torch.equal(torch.cat(groups, 1).flatten(0, 1), whole)
    assert not torch.equal(case.batch(1)[0], images)
    assert not torch.equal(replace(case, seed=1).batch(2)[0], images)


@pytest.mark.parametrize("tied", [True, False])
def test_dropout_masks_do_not_depend_on_the_number_of_ranks(tied: bool) -> None:
    """Every rank's masks are those that one process has for the same edges, and together all of them."""
    num_classes, num_samples, layers = 7, 2, 2
    batch = num_classes * num_samples
    dropout = EdgeDropout(0.3, 12345, tied)
    both = torch.arange(batch)[:, None], torch.arange(batch)[None, :]
    for size in (1, 2, 3, 4):
        count = torch.zeros(batch, batch, dtype=torch.int64)
        for rank in range(size):
            layout = edge_layout(class_major_plan(num_classes, num_samples, "cpu", (rank, size)), dropout, layers)
            for number, part in enumerate(layout.all_rows()):
                i, j = ends(layout.plan.order, part.chunk)
                i, j = torch.broadcast_tensors(i[:, :, None], j[:, None, :])
                for layer in range(layers):
                    found = layout.keep_scales(part.chunk, layer, torch.float64)
                    assert found is not None
                    for got, want in zip(found, dropout.scales(*both, layer, torch.float64), strict=True):
                        assert torch.equal(got, want[i, j])
                if number < len(layout.parts):
                    # The rest are reverse edges that have a row of their own.
                    count[i, j] += 1
                    count[j, i] += part.chunk.mirrored
        assert torch.equal(count, torch.ones_like(count))
