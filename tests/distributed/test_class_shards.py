"""Class rows over ranks give the numbers of the replicated parts, and each rank holds 1/W of them."""

from typing import Any

import pytest
import torch
from class_shard_cases import CASES, LOSSES, SPOILT, Found, all_of, alone, halfway, part_of, trace
from maths_cases import OWN_PATHS, assert_close
from rank_group import run_ranks
from torch import Tensor

from gcahng.data.ranks import rank_part
from gcahng.distributed import ONE

RESUMED = ("all", "no generation")
ROWS = ("metric_loss.proxies", "classifier.weight", "classifier.bias", "node_classifier.weight", "node_classifier.bias")


@pytest.fixture(scope="module")
def replicated() -> dict[str, Found]:
    """One process that holds all rows."""
    return {name: trace(name, ONE, sharded=False) for name in CASES}


@pytest.fixture(
    scope="module", params=[1, 2, *(pytest.param(w, marks=pytest.mark.full) for w in (3, 4))], ids="W={}".format
)
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank found, by rank."""
    starts = {name: halfway(name) for name in RESUMED}
    return [all_of(ONE, starts)] if request.param == 1 else run_ranks(request.param, all_of, starts)


def together(parts: list[dict[str, Tensor]], want: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own rows put together; everything else must be the same on all ranks, bit for bit."""
    got = {}
    for name, whole in want.items():
        values = [part[name] for part in parts]
        is_rows = name in ("weight", "bias", "proxies") or name.removeprefix("graph.") in ROWS
        if is_rows:
            sizes = [value.shape[0] for value in values]
            assert max(sizes) - min(sizes) <= 1
            assert sizes == [_size(whole.shape[0], rank, len(parts)) for rank in range(len(parts))]
            got[name] = torch.cat(values)
        else:
            assert all(torch.equal(value, values[0]) for value in values), name
            got[name] = values[0]
    return got


def _size(count: int, rank: int, size: int) -> int:
    rows = rank_part(count, rank, size)
    return rows.stop - rows.start


@pytest.mark.parametrize("room", [None, 1, 2])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_and_its_gradients(found: list[dict[str, Any]], kind: str, room: int | None) -> None:
    part = part_of(kind)
    want = alone(part)
    parts = [dict(rank[f"{kind}, room {room}"]) for rank in found]
    for values in parts:
        for name, tensor in part.named_parameters():
            if kind != "proxies":
                assert torch.equal(values.pop(f"constant {name}"), tensor)
        if kind != "proxies":
            assert torch.equal(values.pop("constant in bfloat16"), part.weight.bfloat16())
        assert values.keys() == want.keys()
    assert_close(_gradients(together(parts, want)), _gradients(want))


def _gradients(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """As one family for the error measure: what is rounding beside the others counts as such."""
    return {f"gradient {name}": value for name, value in values.items()}


def compare(ranks: list[Found], want: Found, moves: slice = slice(None)) -> None:
    for found in ranks:
        for got, expected in zip(found.reports, want.reports[-len(found.reports) :], strict=True):
            assert got == pytest.approx(expected, rel=1e-10, abs=1e-12)
    for number, (by_name, after) in enumerate(zip(want.gradients[moves], want.parameters[moves], strict=True)):
        parts = [rank.gradients[number] for rank in ranks]
        assert all(part.keys() == by_name.keys() for part in parts)
        # Rounding grows from step to step, in gradients more than in parameters.
        tolerance = OWN_PATHS if number < 3 else 100 * OWN_PATHS
        assert_close(_gradients(together(parts, by_name)), _gradients(by_name), tolerance)
        parts = [rank.parameters[number] for rank in ranks]
        assert all(part.keys() == after.keys() for part in parts)
        assert_close(_gradients(together(parts, after)), _gradients(after))


def assert_same_states(got: Found, want: Found) -> None:
    assert got.states.keys() == want.states.keys()
    for part, state in want.states.items():
        assert got.states[part].keys() == state.keys()
        for key, value in state.items():
            assert_close({key: got.states[part][key]}, {key: value})
    assert got.optimizers.keys() == want.optimizers.keys()
    for part, state in want.optimizers.items():
        mine = got.optimizers[part]
        assert mine["param_groups"] == state["param_groups"]
        assert mine["state"].keys() == state["state"].keys()
        for number, entries in state["state"].items():
            assert mine["state"][number].keys() == entries.keys()
            # Moments of one parameter, of which some are rounding alone.
            assert_close(*(_gradients(of) for of in (mine["state"][number], entries)), 10 * OWN_PATHS)


@pytest.mark.parametrize("name", CASES)
def test_five_steps(found: list[dict[str, Any]], replicated: dict[str, Found], name: str) -> None:
    ranks: list[Found] = [rank[name] for rank in found]
    want = replicated[name]
    compare(ranks, want)
    assert_same_states(ranks[0], want)


@pytest.mark.parametrize("name", RESUMED)
def test_going_on_from_the_replicated_run(found: list[dict[str, Any]], replicated: dict[str, Found], name: str) -> None:
    ranks: list[Found] = [rank[f"resumed {name}"] for rank in found]
    want = replicated[name]
    compare(ranks, want, slice(len(want.gradients) - len(ranks[0].gradients), None))
    assert len(ranks[0].reports) == 2
    assert_same_states(ranks[0], want)


def test_a_rank_holds_its_part(found: list[dict[str, Any]]) -> None:
    size = CASES["all"].size
    dim, classes = size.dim, size.training_classes
    per_row = {"metric_loss": dim, "classifier": dim + 1, "node_classifier": dim + 1}
    for rank, of_rank in enumerate(found):
        rows = _size(classes, rank, len(found))
        # The parameter and AdamW's two moments.
        assert of_rank["all"].entries == {name: 3 * rows * width for name, width in per_row.items()}


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_gradient_of_one_rank_stops_all(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        message, moved = rank[f"spoilt {name}"]
        assert f"Gradients of `{name.split('.')[0]}` are not finite" in message
        assert not moved
