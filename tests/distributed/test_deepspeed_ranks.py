"""ZeRO-0, 1 and 2 do what DDP does, to the bit where sums of two ranks allow it: on two real processes."""

from typing import Any

import pytest
import torch
from deepspeed_cases import CASES, DDP, ENOUGH, OPTIONS, OWN_ROWS, PARTITIONED, RESUMES, STAGES, all_of_it
from rank_group import run_ranks
from torch import Tensor

SIZE = 2
# Fused optimisers round entries by where they lie in memory; otherwise there is nothing to differ.
EXACT, FUSED = 0.0, 2e-6
# One process adds up a batch in another order; AdamW's first steps are nearly signs of gradients.
OTHER_ORDER = 2e-4

Found = dict[str, dict[str, Any]]


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["enough cases", "every case"]
)
def found(request: pytest.FixtureRequest) -> list[Found]:
    """What each rank found, by rank and kind of launch."""
    return run_ranks(SIZE, all_of_it, request.param, time_limit=480)


def farthest(got: Any, want: Any, where: str = "") -> tuple[float, str]:
    """The largest difference of two nests of values, relative to large ones; infinite where they do not match."""
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
            return float("inf"), where
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        difference = float((got.double() - want.double()).abs().max()) / scale if want.numel() else 0.0
        return (difference, where) if difference == difference else (float("inf"), where)
    if isinstance(want, dict):
        if got.keys() != want.keys():
            return float("inf"), f"{where}: {got.keys() ^ want.keys()}"
        pairs = [farthest(got[key], want[key], f"{where}/{key}") for key in want]
    elif isinstance(want, list):
        if len(got) != len(want):
            return float("inf"), where
        pairs = [farthest(g, w, f"{where}/{place}") for place, (g, w) in enumerate(zip(got, want, strict=True))]
    else:
        return (0.0 if got == want else float("inf")), where
    return max(pairs, default=(0.0, where))


def moved(after: dict[str, Any], before: dict[str, Any]) -> set[str]:
    return {name for name, value in before.items() if farthest(after[name], value)[0] > 0}


@pytest.mark.parametrize("kind", STAGES)
def test_every_case_is_as_with_ddp(found: list[Found], kind: str) -> None:
    """Losses, parameters, buffers, and the optimisers' states with their counts of moves."""
    for of_rank in found:
        cases = {name: values for name, values in of_rank[kind]["cases"].items() if name not in OPTIONS}
        assert set(ENOUGH.get(kind, [*CASES, "bf16"])) <= cases.keys()
        for name, values in cases.items():
            error, where = farthest(values, of_rank[DDP]["cases"][name])
            assert error <= (FUSED if "fused" in name else EXACT), (name, where)


@pytest.mark.parametrize(("kind", "name"), [("zero-1", "overlap_comm"), *(("zero-2", name) for name in OPTIONS)])
def test_options_that_are_allowed_change_nothing(found: list[Found], kind: str, name: str) -> None:
    for of_rank in found:
        assert farthest(of_rank[kind]["cases"][name], of_rank[DDP]["cases"]["clipping that binds"])[0] <= EXACT


def test_the_cases_would_notice_clipping_and_precision(found: list[Found]) -> None:
    cases = found[0][DDP]["cases"]
    clipped = cases["clipping that binds"]
    for other in ("no clipping", "bf16"):
        assert farthest(cases[other], clipped)[0] > 1e-4


def test_ranks_agree_on_everything_but_own_rows(found: list[Found]) -> None:
    for kind in STAGES:
        first, second = (of_rank[kind]["cases"] for of_rank in found)
        for name in first:
            if "own rows" in name:
                keys = [key for key in first[name] if key.startswith("parameter") and "own." not in key]
                assert len(keys) > 20
            else:
                keys = list(first[name])
            assert farthest({k: second[name][k] for k in keys}, {k: first[name][k] for k in keys})[0] == 0, (kind, name)


def test_own_rows_stay_each_ranks_own(found: list[Found]) -> None:
    for rank, of_rank in enumerate(found):
        for kind in (DDP, *STAGES):
            for name in OWN_ROWS:
                values = of_rank[kind]["cases"][name]
                assert values["buffer:metric_loss own.rank | own.rank"].item() == rank
                assert values["parameter:metric_loss | own.centres"].numel() == (2 + rank) * 8


def test_what_a_pass_does_not_reach_has_not_moved(found: list[Found]) -> None:
    """In five steps AdamW moves a group of the graph ten times or five, the head five, the backbone three."""
    state = found[0]["zero-2"]["cases"]["warm-up, proxies, dropout"]["states"]
    counts = {
        name: [{int(state[name]["state"][number]["step"]) for number in group["params"]} for group in of_part]
        for name, of_part in ((name, part["param_groups"]) for name, part in state.items())
    }
    assert counts == {"metric_model": [{3}, {5}], "metric_loss": [{5}], "graph": [{10}, {5}, {5}], "classifier": [{5}]}
    warm = found[0]["zero-2"]["cases"]["warm-up to the end, live BatchNorms"]["states"]["metric_model"]
    assert set(warm["state"]) == set(warm["param_groups"][1]["params"])


@pytest.mark.parametrize("kind", STAGES)
def test_nothing_moves_by_a_gradient_that_is_not_finite_on_one_rank(found: list[Found], kind: str) -> None:
    for of_rank in found:
        run = of_rank[kind]["spoilt"]
        assert run["error"] == (
            "Step 1: Gradients of `graph` are not finite in the metric pass; no parameter was moved. Lower the "
            "learning rate, or train with precision fp32."
        )
        assert moved(run["after"], run["before"]) == set()
        assert all(torch.isfinite(value).all() for value in run["later"].values())
        later = moved(run["later"], {n: v for n, v in run["after"].items() if n != "states"})
        assert {name.split(".")[0] for name in later} == {"metric_model", "graph", "classifier"}


@pytest.mark.parametrize("kind", PARTITIONED)
def test_a_layer_that_nothing_uses_is_refused_among_others(found: list[Found], kind: str) -> None:
    for of_rank in found:
        error, moved_parts = of_rank[kind]["unused"][0]
        assert error.startswith(
            "2 of 7 parameters of group 0 of `metric_model` have no gradient in the metric pass, the first being "
            "`unused.weight`: ZeRO would take it for zero"
        )
        assert moved_parts == set()


@pytest.mark.parametrize(("kind", "apart"), [("zero-0", False), *((kind, True) for kind in STAGES)])
def test_a_layer_that_nothing_uses_stays_still(found: list[Found], kind: str, apart: bool) -> None:
    assert [of_rank[kind]["unused"][apart] for of_rank in found] == [("", {"model"})] * SIZE


@pytest.mark.parametrize(
    ("kind", "source"), [(k, s) for k, sources in RESUMES.items() for s in sources if s != "plain"]
)
def test_a_checkpoint_goes_on_under_any_other_stage(found: list[Found], kind: str, source: str) -> None:
    for of_rank in found:
        want = {key: of_rank["saved"][source][key] for key in ("end", "end states")}
        error, where = farthest(of_rank[kind]["resumed"][source], want)
        assert error <= EXACT, where


@pytest.mark.parametrize("source", PARTITIONED)
def test_a_checkpoint_goes_on_in_one_process(found: list[Found], source: str) -> None:
    saved = found[0]["saved"][source]
    got = found[0]["plain"]["resumed"][source]
    error, where = farthest(got["end"], saved["end"])
    assert error <= OTHER_ORDER, where
    # Another start would be much farther away than that.
    assert farthest(saved["weights"], saved["end"])[0] > 10 * OTHER_ORDER


@pytest.mark.parametrize("kind", PARTITIONED)
def test_a_checkpoint_of_one_process_goes_on_over_ranks(found: list[Found], kind: str) -> None:
    for of_rank in found:
        saved, got = of_rank["saved"]["plain"], of_rank[kind]["resumed"]["plain"]
        error, where = farthest(got["end"], saved["end"])
        assert error <= OTHER_ORDER, where


def test_the_saved_state_is_that_of_one_process(found: list[Found]) -> None:
    """The same groups, keys, shapes and counts; the values are those of DDP."""
    for of_rank in found:
        saved = of_rank["saved"]
        for source in PARTITIONED:
            assert farthest(saved[source]["states"], saved[DDP]["states"])[0] <= EXACT
            for name, state in saved["plain"]["states"].items():
                got = saved[source]["states"][name]
                assert got["param_groups"] == state["param_groups"]
                assert {n: {k: v.shape for k, v in s.items()} for n, s in got["state"].items()} == {
                    n: {k: v.shape for k, v in s.items()} for n, s in state["state"].items()
                }


@pytest.mark.parametrize("kind", STAGES)
def test_close_takes_every_engine_down_once(found: list[Found], kind: str) -> None:
    assert [of_rank[kind]["destroyed"] for of_rank in found] == [(4, 0)] * SIZE


@pytest.mark.parametrize("kind", STAGES)
def test_an_engine_that_does_not_average_is_refused(found: list[Found], kind: str) -> None:
    for rank, of_rank in enumerate(found):
        message = of_rank[kind]["no average"]
        assert "engine of `metric_model` does not average gradients as expected: the ranks' numbers 1 to 2" in message
        # Partitions are empty then; in stage 0 gradients are still those of each rank.
        assert f"gave [{0.0 if kind in PARTITIONED else 1.0 + rank}" in message


def test_deepspeed_compiles_nothing_to_start(found: list[Found]) -> None:
    assert not any(of_rank[kind]["compiled"] for of_rank in found for kind in STAGES)
