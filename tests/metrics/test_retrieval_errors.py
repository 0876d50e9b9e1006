"""Each fault of the arguments of `retrieval` gives one message that names it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from gcahng.errors import InputError
from gcahng.metrics import nearest, retrieval

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 0, 1, 1, 2, 2])


def with_value(row: int, value: float) -> torch.Tensor:
    x = X.clone()
    x[row, 1] = value
    return x


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "array": (
        lambda: retrieval(np.zeros((6, 3)), Y),
        r"`query` must be a torch\.Tensor: got ndarray",
    ),
    "one dimension": (
        lambda: retrieval(X[0], Y),
        r"`query` must have shape \(items, channels\).*got \(3,\)",
    ),
    "empty": (lambda: retrieval(X[:0], Y[:0]), r"both at least 1: got \(0, 3\)"),
    "empty gallery": (
        lambda: retrieval(X, Y, X[:0], Y[:0]),
        r"`gallery` must have shape .*got \(0, 3\)",
    ),
    "integer embeddings": (
        lambda: retrieval(X.to(torch.int64), Y),
        r"`query` must be floating point: got torch\.int64",
    ),
    "nan": (
        lambda: retrieval(with_value(4, float("nan")), Y),
        r"`query` must be finite: row 4 holds NaN or infinity \(1 of 6 rows do\)",
    ),
    "infinity": (
        lambda: retrieval(X, Y, with_value(2, float("inf")), Y),
        r"`gallery` must be finite: row 2 holds",
    ),
    "label array": (
        lambda: retrieval(X, Y.tolist()),
        r"`query_labels` must be a torch\.Tensor: got list",
    ),
    "float labels": (
        lambda: retrieval(X, Y.float()),
        r"`query_labels` must be integer class indices: expected torch\.int64, got torch\.float32",
    ),
    "label count": (
        lambda: retrieval(X, Y[:5]),
        r"`query_labels` must have one entry per row of `query`: expected shape \(6,\), got \(5,\)",
    ),
    "gallery label count": (
        lambda: retrieval(X, Y, X[:4], Y),
        r"`gallery_labels` must have one entry per row of `gallery`: expected shape \(4,\)",
    ),
    "gallery alone": (
        lambda: retrieval(X, Y, X),
        r"go together: got `gallery` without `gallery_labels`",
    ),
    "gallery labels alone": (
        lambda: retrieval(X, Y, None, Y),
        r"go together: got `gallery_labels` without `gallery`",
    ),
    "channels": (
        lambda: retrieval(X, Y, X[:, :2], Y),
        r"`gallery` must have as many channels as `query`: expected 3, got 2",
    ),
    "device": (
        lambda: retrieval(X, Y, X.to("meta"), Y),
        r"`gallery` must be on the device of `query`: expected cpu, got meta",
    ),
    "k beyond the other items": (
        lambda: retrieval(X, Y, ks=(1, 6)),
        r"`ks` must lie between 1 and the number of candidates of a query \(5; .*got 6",
    ),
    "k beyond the gallery": (
        lambda: retrieval(X, Y, X, Y, ks=(7,)),
        r"`ks` must lie between 1 and .*\(6; .*got 7",
    ),
    "k zero": (lambda: retrieval(X, Y, ks=(0,)), r"`ks` must lie between 1 and .*got 0"),
    "k not an integer": (
        lambda: retrieval(X, Y, ks=(1.0,)),
        r"`ks` must be integers: got 1\.0 \(float\)",
    ),
    "neighbours": (
        lambda: retrieval(X, Y, ks=(1,), num_neighbours=6),
        r"`num_neighbours` must lie between 1 and .*got 6",
    ),
    "memory": (
        lambda: retrieval(X, Y, ks=(1,), memory_mb=0),
        r"`memory_mb` must be a positive integer: got 0",
    ),
    "precision": (
        lambda: retrieval(X, Y, ks=(1,), precision="int8"),
        r"`precision` must be one of auto, bf16, fp32: got 'int8'",
    ),
    "k of precision": (
        lambda: retrieval(X, Y, ks=(1,), precision_ks=(6,)),
        r"`precision_ks` must lie between 1 and .*got 6",
    ),
    "too many nearest": (
        lambda: nearest(X, X, 6, exclude=torch.arange(6)),
        r"`k` must lie between 1 and .*got 6",
    ),
    "exclude of another length": (
        lambda: nearest(X, X, 1, exclude=torch.arange(5)),
        r"`exclude` must have one entry per row of `query`",
    ),
    "no reference": (
        lambda: retrieval(X, torch.arange(6), ks=(1,)),
        r"no query has a same-class item to find: got 6 queries and 6 gallery items",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_message(name: str) -> None:
    call, message = FAULTS[name]
    with pytest.raises(InputError, match=message):
        call()


def test_k_equal_to_the_candidates_is_allowed() -> None:
    assert retrieval(X, Y, ks=(5,)).recall_at_k == {5: 1.0}
    assert retrieval(X, Y, X, Y, ks=(6,)).recall_at_k == {6: 1.0}
