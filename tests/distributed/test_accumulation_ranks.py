"""Cached accumulation on two ranks in small batches: the numbers of one process with the whole batch.

Under DDP to the last digits; ZeRO keeps weights in float32.
"""

import pytest
import torch
from accumulation_cases import AccumulationCase, Found, Trace, on_ranks, trace
from deepspeed_cases import DDP, STAGES
from maths_cases import Size, assert_close
from rank_group import run_ranks

# 3 and 2 classes: ranks have 9 and 6 images, and with 4 at once 3 and 2 small batches.
UNEVEN = Size(5, 3, 8, 2, 2, training_classes=6)
WHOLE = {
    "uneven parts": AccumulationCase(size=UNEVEN, clip=1e-2),
    "frozen BatchNorm and proxies": AccumulationCase(
        size=Size(4, 2, 8, 1, 2, training_classes=6), backbone="frozen", proxies=True
    ),
    "warm-up": AccumulationCase(size=UNEVEN, warm_up=True),
}
REPLAYED = {
    "dropout": AccumulationCase(size=UNEVEN, backbone="dropout"),
    "live BatchNorm": AccumulationCase(size=UNEVEN, backbone="live"),
}
# ZeRO moves all of a backbone or nothing.
ZERO = AccumulationCase(size=UNEVEN, dtype=torch.float32, unused=False)
AT_ONCE = 4
STEPS = 3


def small(case: AccumulationCase, *, reference: bool = False) -> AccumulationCase:
    # Ranks of four images would not be divided.
    return case.with_micro_batch(AT_ONCE if case.size is UNEVEN else 3, reference=reference)


CASES = {name: small(case) for name, case in (WHOLE | REPLAYED).items()}
CASES |= {f"reference {name}": small(case, reference=True) for name, case in REPLAYED.items()}
CASES |= {f"whole {name}": case for name, case in WHOLE.items()}


@pytest.fixture(scope="module")
def found() -> list[Found]:
    """By rank. One group of processes does all."""
    return run_ranks(2, on_ranks, list(CASES.values()), small(ZERO))


def of_case(found: list[Found], name: str) -> list[tuple[Trace, list[int]]]:
    """By rank: what the case left under DDP."""
    return [of_rank.ddp[list(CASES).index(name)] for of_rank in found]


def assert_same(got: Trace, want: Trace) -> None:
    for mine, others in zip(got.reports, want.reports, strict=True):
        assert_close(mine, others)
    for mine, others in zip(got.gradients, want.gradients, strict=True):
        assert_close(*({f"gradient {name}": value for name, value in side.items()} for side in (mine, others)))
    for mine, others in zip(got.parameters, want.parameters, strict=True):
        assert_close(mine, others)
    assert_close(got.buffers, want.buffers)


@pytest.mark.parametrize("name", WHOLE)
def test_two_ranks_in_small_batches_are_one_process_with_all(name: str, found: list[Found]) -> None:
    want = trace(WHOLE[name], STEPS)
    for got, _ in of_case(found, name):
        assert_same(got, want)


@pytest.mark.parametrize("name", REPLAYED)
def test_the_second_pass_repeats_the_first_on_each_rank(name: str, found: list[Found]) -> None:
    for (got, _), (want, _) in zip(of_case(found, name), of_case(found, f"reference {name}"), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_are_reduced_once_a_step(name: str, found: list[Found]) -> None:
    for (_, sizes), (_, without) in zip(of_case(found, name), of_case(found, f"whole {name}"), strict=True):
        assert len(sizes) == STEPS
        assert sizes == without


@pytest.mark.parametrize("stage", STAGES)
def test_zero_is_ddp(stage: str, found: list[Found]) -> None:
    for of_rank in found:
        want, got = of_rank.zero[DDP], of_rank.zero[stage]
        assert want.reports[0].keys() == got.reports[0].keys()
        largest = max(float((got.parameters[-1][name] - p).abs().max()) for name, p in want.parameters[-1].items())
        assert largest <= 1e-6
