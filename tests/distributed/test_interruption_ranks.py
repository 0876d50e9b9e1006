"""One of two ranks is signalled: both end, saved, and what they go on to is the undisturbed run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from interruption_cases import KINDS, interrupted
from rank_group import run_ranks
from run_cases import assert_same_tensors, convert_patterns, draw_patterns, read_metrics, saved_tensors

# The signal that is named, and the step at which the run is saved.
MOMENTS = {
    "first step, warm-up": ("SIGTERM", 1),
    # It comes between two steps: one more is taken.
    "save": ("SIGTERM", 5),
    "evaluation": ("SIGUSR1", 5),
    "last step": ("SIGUSR1", 10),
}
TIME_LIMIT_S = 400.0


@dataclass(frozen=True)
class Ran:
    """What each rank found, and where the runs are."""

    kind: str
    of_rank: list[dict[str, Any]]
    folder: Path


@pytest.fixture(scope="module", params=KINDS)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    kind, folder = str(request.param), tmp_path_factory.mktemp("interrupted")
    shards = convert_patterns(draw_patterns(folder / "images"), folder / "shards")
    return Ran(kind, run_ranks(2, interrupted, kind, shards, folder, time_limit=TIME_LIMIT_S), folder / kind)


def test_all_ranks_end_saved_at_the_same_step(ran: Ran) -> None:
    for found in ran.of_rank:
        for moment in KINDS[ran.kind]:
            name, step = MOMENTS[moment]
            end, restored, progress = found[moment]
            assert end.removeprefix("rank 1: ") == f"The run was asked to end by {name}.", moment
            assert restored and progress["step"] == step, moment


def test_what_goes_on_is_the_undisturbed_run(ran: Ran) -> None:
    for found in ran.of_rank:
        assert found["whole"][0] == found["end"][0] == "finished"
    whole, cut = (ran.folder / name for name in ("whole", "interrupted"))
    assert read_metrics(cut) == read_metrics(whole) and len(read_metrics(cut)) == 12
    assert_same_tensors(saved_tensors(cut), saved_tensors(whole))
    assert not (cut / "PREEMPTED").exists()


def test_a_rank_that_embeds_on_hears_of_it(ran: Ran) -> None:
    """Without a word rank 0 would embed all of its 12 batches first."""
    first, second = (len(found["embedded"]) for found in ran.of_rank)
    assert second == 2 and 1 <= first < 12


def test_a_run_that_has_not_begun_leaves_nothing_but_the_marker(ran: Ran) -> None:
    for found in ran.of_rank:
        end, restored, progress, files, marker = found["before"]
        assert end == "The run was asked to end by SIGTERM." and restored
        assert progress["step"] == 0 and files == ["PREEMPTED"]
        facts = json.loads(marker)
        assert facts["checkpoint"] is None and facts["step"] == 0 and facts["reason"] == end


def test_listening_leaves_the_store_as_it_is(ran: Ran) -> None:
    """Its patience is also that of ranks which connect a group."""
    for found in ran.of_rank:
        before, after = found["store's patience"]
        assert before == after
