"""W ranks are one process: the same losses, gradients and parameters, for every loss and every pair of switches.

What is compared, and how cases are made: `exact_cases`; what ranks do: `exact_ranks`. Every combination of the
switches, not only every pair: `test_exact_full.py`.
"""

from collections import defaultdict
from dataclasses import replace

import pytest
from exact_cases import ExactCase, large_cases, pair_cases, too_large
from exact_ranks import CONTROLS, Report, check_cases, exactness
from maths_cases import OWN_PATHS
from rank_group import run_ranks

# Seconds, of which a machine with nothing else to do needs a tenth.
TIME_LIMIT_S = 600.0

# Of the cases that hold all pairs of switches, by W; from step 3 on the means of an epoch take part, on two ranks.
STEPS = {1: 2, 2: 4, 3: 2, 4: 2}

# The momentum of SGD and its small steps leave errors as they are; AdamW's first steps are signs of gradients.
LOW_CASES = [
    ExactCase(
        **options,  # type: ignore[arg-type]
        num_classes=7,
        num_samples=3,
        batch_norm=True,
        optimizer="sgd",
        steps=2,
        seed=seed,
    )
    for options in ({"layers": 2, "edge_dropout": "tied"}, {"loss": "proxy_anchor", "edge_aggregation": "mean"})
    for seed in (1, 2)
]

# What each control must get wrong, and by how much at least.
BROKEN = {
    "detached gather": "gradient:metric_model",
    "no average": "gradient:metric_model",
    "dropped block pair": "loss",
    "masks of each rank": "loss",
    "mixing weights of each rank": "loss",
    "statistics of each rank": "loss",
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_equal_one_process(size: int) -> None:
    cases = [replace(case, steps=STEPS[size]) for case in pair_cases()] + (large_cases() if size in (2, 4) else [])
    if size > 1:
        # One class on each rank, and hardly a block pair.
        cases.append(ExactCase(num_classes=size, num_samples=3, layers=2, edge_dropout="independent", batch_norm=True))
    low_cases = LOW_CASES if size in (2, 4) else []
    breaks = size == 2
    reports: list[Report] = run_ranks(size, exactness, cases, low_cases, breaks, time_limit=TIME_LIMIT_S)
    check_cases(reports, len(cases))
    check_float32(reports)
    if breaks:
        check_controls(reports)
        check_faulty_batches(reports)
        check_sums(reports)


def check_float32(reports: list[Report]) -> None:
    """At most twice the error of the plain list of edges, and 2e-6; summed over several batches."""
    for report in reports:
        ours: dict[str, float] = defaultdict(float)
        plain: dict[str, float] = defaultdict(float)
        for found in report.in_float32:
            for kind in found.ours:
                ours[kind] += found.ours[kind][0]
                plain[kind] += found.plain[kind][0]
        for kind, error in ours.items():
            assert error <= 2 * plain[kind] + 2e-6 * len(report.in_float32), kind


def check_controls(reports: list[Report]) -> None:
    """With something broken the comparison fails, and only then."""
    assert BROKEN.keys() | {"nothing"} == CONTROLS.keys()
    for report in reports:
        assert too_large(report.controls["nothing"], OWN_PATHS) == {}
        for name, kind in BROKEN.items():
            assert kind in too_large(report.controls[name], 1e-3), (name, report.controls[name])


def check_sums(reports: list[Report]) -> None:
    """No sum over ranks can be left out, or its gradient left unsummed, without an error."""
    for report in reports:
        assert report.sums is not None
        assert report.sums.unnoticed == []
        assert report.sums.tried == (reports[0].sums or report.sums).tried
        modules = {name.split(".")[0] for name in report.sums.tried}
        assert modules >= {
            "batch_norm", "diversity", "edge_moments", "generation_loss", "hard_triplets", "network", "pair_attention",
            "read_out", "synthetic_loss",
        }  # fmt: skip
        assert sum("gradient not summed" in name for name in report.sums.tried) >= 3


def check_faulty_batches(reports: list[Report]) -> None:
    """One error on all ranks, which names every rank's part; nothing has moved by it."""
    found = [report.faulty for report in reports if report.faulty is not None]
    assert len(found) == len(reports)
    for one in found:
        assert one.messages == found[0].messages
        assert too_large(one.errors, OWN_PATHS) == {}
    assert len(found[0].messages) == 8
    for message in found[0].messages:
        assert all(f"rank {rank}: step " in message for rank in range(len(reports)))
