"""Without torch_scatter the reference uses torch's own scatter: same numbers, said once."""

import logging
import sys
from collections.abc import Iterator

import pytest
import torch
from maths_cases import Size, assert_close, batch_of, graph_of, results

from gcahng.graph import reference


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch_scatter cannot be imported, and nobody has asked for it yet."""
    reference.scatter_library.cache_clear()
    monkeypatch.setitem(sys.modules, "torch_scatter", None)
    yield
    reference.scatter_library.cache_clear()


@pytest.fixture
def library() -> None:
    reference.scatter_library.cache_clear()
    if reference.scatter_library() is None:
        pytest.skip("torch_scatter is not installed (make test builds it)")


SIZE = Size(5, 2, 12, 2, 3)


def run() -> dict[str, torch.Tensor]:
    z, labels = batch_of(SIZE)
    return results(graph_of(SIZE, backend="scatter"), z, labels, dropout_key=2)


def test_own_scatter_equals_the_pairs(without_library: None) -> None:
    assert reference.scatter_library() is None
    z, labels = batch_of(SIZE)
    assert_close(run(), results(graph_of(SIZE, backend="eager"), z, labels, dropout_key=2))


def test_own_scatter_equals_torch_scatter(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    want = run()
    monkeypatch.setattr(reference, "scatter_library", lambda: None)
    assert_close(run(), want, 1e-13)


def test_own_operations_equal_the_library(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(20, 3, generator=draw, dtype=torch.float64) - 1
    index = torch.randint(0, 5, (20,), generator=draw) * 2  # odd rows stay empty
    sums, peaks = reference.scatter_sum(values, index, 10), reference.scatter_max(values, index, 10)
    monkeypatch.setattr(reference, "scatter_library", lambda: None)
    torch.testing.assert_close(reference.scatter_sum(values, index, 10), sums, rtol=0, atol=1e-14)
    assert torch.equal(reference.scatter_max(values, index, 10), peaks)
    assert float(peaks[1].abs().max()) == 0
    assert float(peaks.min()) < 0  # a row of negative scores keeps its negative maximum


def test_the_fallback_is_said_once(without_library: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gcahng.graph.reference"):
        run()
        run()
    assert len(caplog.records) == 1
    message = caplog.messages[0]
    assert "torch_scatter cannot be imported" in message
    assert "backend 'scatter' uses torch's own scatter" in message
    assert "pip install" in message


def test_the_fast_path_never_asks_for_the_library(without_library: None, caplog: pytest.LogCaptureFixture) -> None:
    z, labels = batch_of(SIZE)
    results(graph_of(SIZE, backend="eager"), z, labels, dropout_key=2)
    assert not caplog.records
