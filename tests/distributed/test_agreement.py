"""One error for all ranks or none, found before training; and what each rank says when a run ends early."""

from typing import Any

import pytest
from agreement_cases import AGREED, meeting, outcome, raising
from rank_group import run_ranks

from gcahng.distributed import ONE
from gcahng.distributed.agreement import agreed, check_same, raised_by_all, rank_list


@pytest.fixture(scope="module")
def met() -> list[Any]:
    return run_ranks(3, meeting)


@pytest.fixture(scope="module")
def found(met: list[Any]) -> list[dict[str, str]]:
    return [outcomes for outcomes, _ in met]


@pytest.fixture(scope="module")
def ends(met: list[Any]) -> dict[str, list[tuple[int, str | None] | None]]:
    """By case, of each rank."""
    return {name: [of_rank[name] for _, of_rank in met] for name in met[0][1]}


def test_an_action_that_works_everywhere_returns_what_it_returned_here(found) -> None:
    assert [of_rank["nobody"] for of_rank in found] == ["0", "1", "2"]


def test_a_failure_of_one_rank_is_everybodys(found) -> None:
    assert [of_rank["one"] for of_rank in found] == ["DataError: rank 1: shard 3 is damaged"] * 3


def test_the_lowest_rank_is_quoted(found) -> None:
    assert [of_rank["two"] for of_rank in found] == ["ConfigError: rank 1: no such file"] * 3
    assert [of_rank["all, with different words"] for of_rank in found] == ["ConfigError: rank 0: 0 is no folder"] * 3


def test_what_all_ranks_met_names_none(found) -> None:
    assert [of_rank["all alike"] for of_rank in found] == ["ConfigError: no such key"] * 3


def test_a_bug_keeps_its_traceback_where_it_was_met(found) -> None:
    told = "TrainingError: rank 2: KeyError: 'weights'"
    assert [of_rank["a bug"] for of_rank in found] == [told, told, "KeyError: 'weights'"]


def test_every_rank_knows_that_all_of_them_fail(found) -> None:
    assert [of_rank["a bug, known to all"] for of_rank in found] == ["True"] * 3
    assert not raised_by_all(KeyError("weights")) and not raised_by_all(KeyboardInterrupt())


def test_equal_facts_pass(found) -> None:
    assert [of_rank["same"] for of_rank in found] == ["None"] * 3


def test_every_difference_is_listed_with_its_ranks(found) -> None:
    for of_rank in found:
        lines = of_rank["rank 1 differs"].splitlines()
        assert lines[0].startswith("ConfigError: The 3 ranks must be started alike")
        assert lines[1:3] == ["  seed: 1 on ranks 0, 2, 2 on rank 1", "  data: abc on ranks 0, 2, abd on rank 1"]
        assert len(lines) == 4 and lines[3].startswith("Start every rank with one command")
        assert "\n  weights: f00 on ranks 0-1, nothing on rank 2\n" in of_rank["something is missing"]


@pytest.mark.parametrize("name", AGREED)
def test_one_rank_meets_its_own_error(name: str) -> None:
    action = raising(AGREED[name], 0)
    assert outcome(lambda: agreed(ONE, action)) == outcome(action)
    check_same(ONE, {"seed": "1"})


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([0, 2, 3, 4, 9], "ranks 0, 2-4, 9"), ([0, 1], "ranks 0-1")],
)
def test_rank_list(ranks: list[int], text: str) -> None:
    assert rank_list(ranks) == text


TEXT = "error: image 7 is unreadable"


def test_what_all_ranks_met_is_said_once(ends) -> None:
    assert ends["all alike"] == [(2, TEXT), (2, None), (2, None)]


def test_what_one_rank_met_is_said_by_it(ends) -> None:
    assert ends["rank 1 alone"] == [None, (2, f"rank 1: {TEXT}"), None]
    assert ends["rank 0 alone"] == [(2, f"rank 0: {TEXT}"), None, None]


def test_others_say_in_one_line_who_failed(ends) -> None:
    for case in ("rank 1, and its echoes", "an echo of another sort"):
        status, text = ends[case][0]
        assert status == 2 and text == f"rank 0: ended, since rank 1 failed: {TEXT}"
    assert ends["rank 1, and its echoes"][2] == (2, f"rank 2: ended, since rank 1 failed: {TEXT}")
    assert ends["a bug, and its echoes"][0] == (1, "rank 0: ended, since rank 1 failed: KeyError: 'k'")


def test_who_hangs_or_was_killed_is_named(ends) -> None:
    for rank in (0, 2):
        status, text = ends["rank 1 hangs"][rank]
        assert status == 1 and len(text.splitlines()) == 1
        assert text.startswith(f"rank {rank}: error: ranks waited for each other longer than `distributed.timeout_s")
        assert "; no word from rank 1, which hangs or was killed (" in text
    status, text = ends["rank 2 is killed"][0]
    assert (
        status == 1 and "the connection to other ranks broke; no word from rank 2, which hangs or was killed (" in text
    )


def test_an_error_of_torch_is_no_echo(ends) -> None:
    assert ends["an error of torch"][0] == (1, "rank 0: Traceback\nRuntimeError: shape mismatch")
