"""DDP over real gloo processes: the numbers of one process, and one decision where numbers go wrong."""

import math
from typing import Any

import pytest
import torch
from ddp_cases import CASES, SCALED, UNEVEN, all_of_it, run_all
from exact_cases import Outcome, errors_by_kind, too_large
from maths_cases import OWN_PATHS
from rank_group import run_ranks
from torch import Tensor

from gcahng.distributed import ONE
from gcahng.training.finite_checks import MOST_AHEAD

# Two are enough for `make test`: the tests of exactness run every loss and switch on this backend, three ranks too.
SIZES = (2, pytest.param(3, marks=pytest.mark.full))
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def one() -> dict[str, Outcome]:
    """The cases on the plain backend, with the whole batch."""
    return run_all(ONE)


@pytest.fixture(scope="module", params=SIZES, ids="{}_ranks".format)
def ranks(request: pytest.FixtureRequest) -> list[Results]:
    """Everything that this file looks at, by rank."""
    return run_ranks(request.param, all_of_it)


def test_losses_gradients_and_parameters_are_those_of_one_process(ranks, one) -> None:
    names = [*(CASES if len(ranks) == 2 else UNEVEN), SCALED]
    for found in ranks:
        assert list(found["cases"]) == names
        apart = {name: too_large(errors_by_kind(found["cases"][name], one[name]), OWN_PATHS) for name in names}
        assert apart == dict.fromkeys(names, {})


def test_gradients_and_parameters_are_the_same_bits_on_all_ranks(ranks) -> None:
    for name in ranks[0]["cases"]:
        first, *others = (found["cases"][name].by_name() for found in ranks)
        compared = [key for key in first if key.startswith(("gradient", "parameter"))]
        assert len(compared) > 10
        for other in others:
            assert [key for key in compared if not torch.equal(first[key], other[key])] == [], name


def test_the_cases_reach_what_they_are_for(one) -> None:
    def gradients(name: str, step: int) -> dict[str, Tensor]:
        mark = f" step {step} "
        return {key: value for key, value in one[name].by_name().items() if key.startswith("gradient") and mark in key}

    for step in range(4):
        of_backbone = [key for key in gradients("warm-up, live BatchNorms", step) if "| backbone." in key]
        assert bool(of_backbone) is (step >= 2)
    # Gradients are noted before they are clipped, by a hook that comes earlier.
    largest = max(float(g.abs().max()) for key, g in gradients("clipping that binds", 2).items() if "graph" in key)
    assert largest > 10 * 0.02
    passes = {key.split(" | ")[0].split()[-1] for key in gradients("warm-up, proxies, dropout", 3) if "graph" in key}
    assert passes == {"metric", "generation"}
    read_out = [key for key in gradients("warm-up, proxies, dropout", 3) if "| edge_out." in key]
    assert read_out and all(" generation |" in key for key in read_out)


def test_weights_and_buffers_start_as_those_of_the_first_rank(ranks) -> None:
    first = ranks[0]["wrong"]["good"]["start"]
    for number, found in enumerate(ranks):
        start = found["wrong"]["good"]["start"]
        own = {key for key in start if ".own." in key}
        assert own == {"metric_loss.own.centre", "metric_loss.own.rank"}
        assert [key for key in start if key not in own and not torch.equal(start[key], first[key])] == []
        assert all(bool((start[key] == number).all()) for key in own)


def test_buffers_are_each_ranks_own_after_the_start(ranks) -> None:
    ends = [found["wrong"]["good"]["end"] for found in ranks]
    assert [int(end["metric_model.mark"]) for end in ends] == list(range(len(ranks)))
    # These BatchNorms see their own rank's images only.
    means = [key for key in ends[0] if key.endswith("running_mean")]
    assert len(means) == 2
    assert all(not torch.equal(ends[0][key], end[key]) for key in means for end in ends[1:])


def test_own_rows_are_not_averaged_and_what_stands_beside_them_is(ranks) -> None:
    ends = [found["wrong"]["good"]["end"] for found in ranks]
    centres = [end["metric_loss.own.centre"] for end in ends]
    for number, found in enumerate(ranks):
        good = found["wrong"]["good"]
        assert good["error"] is None and len(good["got"]) == 5
        for got, expected in zip(good["got"], good["expected"], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        assert not torch.equal(centres[number], good["start"]["metric_loss.own.centre"])
        assert torch.equal(ends[number]["metric_loss.shared"], ends[0]["metric_loss.shared"])
    assert all(float((c - centres[0]).abs().min()) > 0.5 for c in centres[1:])


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_fault_on_one_rank_ends_all_at_the_same_step_and_moves_nothing(ranks, fault: str, deferred: bool) -> None:
    runs = [found["wrong"][f"{fault} {deferred}"] for found in ranks]
    # Immediately in step 1; or when its numbers are read, as late as rank 0's slow copies have it.
    raised_in = 1 + MOST_AHEAD if deferred else 1
    what = "The metric loss is" if fault == "loss" else "Gradients of `metric_loss` are not finite in the metric pass"
    for run in runs:
        number, message = run["error"]
        assert number == raised_in
        assert message.startswith(f"Step 1: {what}")
        parameters = [key for key in run["end"] if "running" not in key and "num_batches" not in key]
        assert not all(torch.equal(run["start"][key], run["states"][0][key]) for key in parameters)
        assert [key for key in parameters if not torch.equal(run["end"][key], run["states"][0][key])] == []


def test_an_overflow_in_one_ranks_rows_skips_the_move_on_all(ranks) -> None:
    for found in ranks:
        run = found["wrong"]["scaler"]
        assert run["error"] is None
        assert run["scale"] == 2.0**11
        before, after = (run["states"][step]["metric_loss.own.centre"] for step in (0, 1))
        assert torch.equal(before, after)
        assert not torch.equal(after, run["states"][2]["metric_loss.own.centre"])
        assert all(math.isfinite(value) for value in run["end"]["metric_loss.own.centre"].tolist())


def test_the_optimiser_state_of_spread_rows_is_whole(ranks) -> None:
    for found in ranks:
        state = found["wrong"]["sharded"]
        assert state["others"] == [{}] * (len(ranks) - 1)
        torch.testing.assert_close(state["whole"], 0.1 * torch.arange(7.0)[:, None].expand(-1, 2))
        assert state["loaded"]


def test_unreached_parameters_are_looked_for_until_a_step_has_reached_all(ranks) -> None:
    for found in ranks:
        first, after_warm_up, full, last = found["wrong"]["search"]["searched"]
        # A loss of the user's own may leave parameters out at any time; the graph's groups say what a pass reaches.
        assert sorted(first) == sorted(after_warm_up) == ["metric_loss", "metric_model"]
        assert full == last == ["metric_loss"]


def test_parameters_that_are_left_out_later_are_one_error_on_all_ranks(ranks) -> None:
    for found in ranks:
        search = found["wrong"]["search"]
        number, message = search["error"]
        assert number == 2
        assert (
            "parameters of `metric_model` have no gradient in this metric pass, the first being `backbone." in message
        )
        assert search["moved"] == 0


def test_a_loss_that_draws_is_the_same_on_all_ranks(ranks) -> None:
    losses, draws = zip(*(found["wrong"]["drawn"] for found in ranks), strict=True)
    assert all(of_rank == losses[0] for of_rank in losses)
    assert losses[0][0] != losses[0][1]
    assert len({draw for of_rank in draws for draw in of_rank}) == 2 * len(ranks)


def test_nothing_is_printed(ranks) -> None:
    assert [found["printed"] for found in ranks] == [""] * len(ranks)


def test_parts_without_trained_parameters_run_as_they_are(ranks) -> None:
    assert all(found["wrong"]["frozen"] for found in ranks)


def test_autocast_reaches_wrapped_parts_and_leaves_the_loss_alone(ranks) -> None:
    for found in ranks:
        assert found["wrong"]["dtypes"] == {"metric_model": torch.bfloat16, "metric_loss": torch.float32}
