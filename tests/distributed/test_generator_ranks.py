"""Steps with a generator on two real ranks: the numbers of one process."""

import pytest
from exact_cases import Outcome, errors_by_kind, too_large
from generator_cases import CASES, run_all
from maths_cases import OWN_PATHS
from rank_group import run_ranks

from gcahng.distributed import ONE


@pytest.fixture(scope="module")
def one() -> dict[str, Outcome]:
    return run_all(ONE)


def test_two_ranks_give_the_numbers_of_one(one: dict[str, Outcome]) -> None:
    for found in run_ranks(2, run_all):
        assert found.keys() == CASES.keys()
        apart = {name: too_large(errors_by_kind(found[name], one[name]), OWN_PATHS) for name in CASES}
        assert apart == dict.fromkeys(CASES, {})


def test_the_cases_move_the_generator_in_its_pass_alone(one: dict[str, Outcome]) -> None:
    for name, outcome in one.items():
        for part, reach in (("generator", "generation"), ("metric_model", "metric")):
            families = [key.split(" | ")[0] for key in outcome.names if key.startswith(f"gradient:{part}")]
            assert {family.split()[-1] for family in families} == {reach}, name
