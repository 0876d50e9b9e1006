"""BatchNorm over ranks is BatchNorm of the global batch: values, gradients, running statistics, messages."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from batch_norm_cases import (
    CHANNELS,
    EXACT,
    ROUNDED,
    ROWS,
    WITH_TIMM,
    Case,
    all_cases,
    network,
    run_layer,
    run_network,
    timm_cases,
)
from maths_cases import OWN_PATHS
from rank_group import run_ranks
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn

from gcahng.distributed import ONE, Ranks
from gcahng.distributed.batch_norm import share_buffers, use_statistics_of_all
from gcahng.errors import ConfigError, InputError

Found = list[dict[str, dict[str, Tensor]]]


@cache
def results(size: int) -> Found:
    return run_ranks(size, all_cases)


@pytest.fixture(
    scope="module",
    params=[pytest.param(w, marks=pytest.mark.full) if w == 4 else w for w in sorted(ROWS)],
    ids="W={}".format,
)
def found(request: pytest.FixtureRequest) -> Found:
    """What each rank found, by rank."""
    return results(request.param)


@pytest.fixture(scope="module")
def found_with_timm() -> Found:
    """The same of the ranks that know timm."""
    return results(WITH_TIMM)


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows put together, sums over ranks added up, and buffers, which must be equal on all ranks."""
    got: dict[str, Tensor] = {}
    for name in parts[0].keys() | parts[-1].keys():
        values = [part[name] for part in parts if name in part]
        if name.startswith("row"):
            got[name] = torch.cat(values)
        elif name.startswith("sum"):
            got[name] = torch.stack(values).sum(0)
        else:
            assert all(torch.equal(value, values[0]) for value in values), name
            got[name] = values[0]
    return got


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-3))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = OWN_PATHS) -> None:
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("name", EXACT)
def test_as_one_process_with_the_global_batch(found: Found, name: str) -> None:
    case, total = EXACT[name], sum(ROWS[len(found)])
    assert_same(together([part[name] for part in found]), run_layer(case.layer(), case, ONE, total))


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_is_no_worse_than_of_one_process(found: Found, name: str) -> None:
    case, total = ROUNDED[name], sum(ROWS[len(found)])
    plain = run_layer(case.layer(), case, ONE, total)
    got = together([part[name] for part in found])
    assert {key: value.dtype for key, value in got.items()} == {key: value.dtype for key, value in plain.items()}
    want = run_exactly(case, total)
    for key, value in want.items():
        assert error(got[key], value) <= 2 * error(plain[key], value) + 2e-6, key


def run_exactly(case: Case, total: int) -> dict[str, Tensor]:
    """The case in float64, on the values that the layer gets."""

    class Given(Case):
        def rows(self, total: int, step: int) -> tuple[Tensor, Tensor]:
            x, weights = case.rows(total, step)
            low = x.bfloat16() if case.autocast and step < 2 else x
            return low.double(), weights.double()

    exact = Given(case.kind, case.shape, case.options)
    return run_layer(case.layer().double(), exact, ONE, total)


def test_layers_with_an_activation_and_a_whole_network(found_with_timm: Found) -> None:
    total = sum(ROWS[WITH_TIMM])
    for name, case in timm_cases().items():
        assert_same(together([part[name] for part in found_with_timm]), run_layer(case.layer(), case, ONE, total))
    want = run_network(network(), ONE, total)
    assert_same(together([part["network"] for part in found_with_timm]), want)
    # What the comparison is worth: each rank's own statistics give something else.
    alone = torch.cat([part["network alone"]["row result"] for part in found_with_timm])
    assert error(alone, want["row result"]) > 1e-2


def test_one_message_each_way_and_none_where_frozen(found: Found) -> None:
    for part in found:
        assert part["messages 2d"]["sizes"].tolist() == [1 + 2 * CHANNELS, 2 * CHANNELS] * 2
        assert part["messages frozen"]["sizes"].tolist() == []


def test_shared_buffers_are_those_of_the_first(found: Found) -> None:
    want = {
        "wide": torch.full((3,), 0.1, dtype=torch.float64),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "number": torch.tensor(5),
        "flags": torch.tensor([True, True]),
        "unsaved": torch.zeros(2, dtype=torch.bfloat16),
    }
    for part in found:
        assert part["shared"].keys() == want.keys()
        for name, value in want.items():
            assert part["shared"][name].dtype == value.dtype
            assert torch.equal(part["shared"][name], value), name


def test_one_rank_changes_nothing() -> None:
    layer = nn.BatchNorm1d(3)
    assert type(use_statistics_of_all(layer, ONE)) is nn.BatchNorm1d
    share_buffers(layer, ONE)
    assert layer.num_batches_tracked == 0


def test_what_it_makes_of_a_network() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3)))
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    hooked: list[Any] = []
    model[1].register_forward_hook(lambda *_: hooked.append(1))
    use_statistics_of_all(model, Ranks(0, 2))
    assert isinstance(model[1], nn.BatchNorm2d)
    assert type(model[1]) is not nn.BatchNorm2d
    assert type(model[1]) is type(model[2][0])
    assert type(model[2][1]) is nn.SyncBatchNorm
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    model.load_state_dict(state)
    # Nobody is asked in evaluation mode: there is no process group here.
    model.eval()(torch.randn(1, 1, 2, 2))
    assert hooked == [1]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(SplitBatchNorm2d(4, num_splits=2), "a forward pass of its own"), (nn.LazyBatchNorm1d(), "no size before")],
)
def test_unknown_layers_are_refused(layer: nn.Module, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"`1` cannot .* {reason}.*distributed.batch_norm to local"):
        use_statistics_of_all(nn.Sequential(nn.Identity(), layer), Ranks(0, 2))


def test_one_value_on_all_ranks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = use_statistics_of_all(nn.BatchNorm1d(3), Ranks(0, 2))
    monkeypatch.setattr(Ranks, "sum", lambda self, partial: partial.clone())
    with pytest.raises(InputError, match=r"at least 2 values per channel in training: got 1 on all ranks together"):
        layer(torch.randn(1, 3))
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layer(torch.randn(4, 3, 1, 1))
