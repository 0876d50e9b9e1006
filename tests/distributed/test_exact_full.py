"""The full product of the switches on W ranks: hours of work, behind `make test-full`.

Each test takes one slice of the cases on one number of ranks: `make test-full PYTEST_ARGS="-k 'ranks2 and slice03'"`.
"""

import pytest
from exact_cases import ExactCase, full_product
from exact_ranks import check_cases, exactness
from rank_group import run_ranks

SLICES = 24
# Seconds for some 260 cases on 4 ranks that share one core.
TIME_LIMIT_S = 3600.0


@pytest.mark.full
@pytest.mark.parametrize("part", range(SLICES), ids=lambda part: f"slice{part:02d}")
@pytest.mark.parametrize("size", [2, 3, 4], ids=lambda size: f"ranks{size}")
def test_every_combination(size: int, part: int) -> None:
    cases = list(full_product())[part::SLICES]
    check_cases(run_ranks(size, exactness, cases, [], False, time_limit=TIME_LIMIT_S), len(cases))


@pytest.mark.full
def test_compiled_functions() -> None:
    """With the compiler itself, which takes a minute or more on a CPU."""
    common = {"backend": "compiled", "layers": 2, "num_classes": 7, "batch_norm": True, "steps": 2}
    cases = [ExactCase(**common, edge_dropout=kind) for kind in (None, "tied", "independent")]  # type: ignore[arg-type]
    check_cases(run_ranks(2, exactness, cases, [], False, time_limit=TIME_LIMIT_S, group_timeout=1800), len(cases))
