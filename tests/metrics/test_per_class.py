"""Values by class against a loop, and by hand where classes have one reference or none; the worst queries."""

import math

import pytest
import torch

from gcahng.errors import InputError
from gcahng.metrics import RetrievalResult, retrieval
from gcahng.metrics.per_class import per_class, worst_queries

BIG = 2**53 + 1  # not a float64


def on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.fixture(scope="module")
def by_hand() -> RetrievalResult:
    """Class 7 has three images, BIG two, 2 one.

    Nearest first: image 0 (7) finds 1, 3, 2, 4, 5: ranks of its class 1 and 3. Image 1 (7) finds 0, 3, 2: 1 and 3.
    Image 2 (7) finds 3, 1, 0: 2 and 3. Image 3 (BIG) finds 2, 1, 0, 4: 4. Image 4 (BIG) finds 5, 2, 3: 3. 5 (2): none.
    """
    labels = torch.tensor([7, 7, 7, BIG, BIG, 2])
    return retrieval(on_circle(0, 10, 31, 24, 95, 110), labels, ks=(1, 2, 4))


def test_each_class_by_hand(by_hand) -> None:
    rows = {row["class_id"]: row for row in per_class(by_hand).rows()}
    assert list(rows) == [2, 7, BIG] and len(per_class(by_hand)) == 3
    none = dict.fromkeys(("recall_at_1", "recall_at_2", "recall_at_4", "r_precision", "map_at_r", "mrr"))
    counts = {"class_id": 2, "num_queries": 1, "num_without_reference": 1, "num_single_reference": 0}
    assert rows[2] == counts | none
    assert rows[7] == pytest.approx(
        {
            "class_id": 7,
            "num_queries": 3,
            "num_without_reference": 0,
            "num_single_reference": 0,
            "recall_at_1": 2 / 3,
            "recall_at_2": 1,
            "recall_at_4": 1,
            "r_precision": (1 / 2 + 1 / 2 + 1 / 2) / 3,
            "map_at_r": (1 / 2 + 1 / 2 + 1 / 4) / 3,
            "mrr": (1 + 1 + 1 / 2) / 3,
        }
    )
    # A single reference each: values, and the count of such queries.
    assert rows[BIG] == pytest.approx(
        {
            "class_id": BIG,
            "num_queries": 2,
            "num_without_reference": 0,
            "num_single_reference": 2,
            "recall_at_1": 0,
            "recall_at_2": 0,
            "recall_at_4": 1,
            "r_precision": 0,
            "map_at_r": 0,
            "mrr": (1 / 4 + 1 / 3) / 2,
        }
    )
    assert rows[BIG]["class_id"] == BIG, "labels went through floating point"


def test_classes_add_up_to_the_means() -> None:
    """A query/gallery search with long-tailed classes, some of them in the gallery only or nowhere."""
    draws = torch.Generator().manual_seed(3)
    labels = (torch.rand(300, generator=draws) ** 3 * 40).long() * 1_000_003
    x = torch.randn(300, 5, generator=draws).round()  # many equal scores
    result = retrieval(x[:120], labels[:120], x[120:], labels[120:], ks=(1, 10))
    table = per_class(result)
    answered = table.num_queries - table.num_without_reference
    assert int(table.num_without_reference.sum()) == result.num_without_reference > 0
    has = answered > 0

    def mean(values: torch.Tensor) -> float:
        return float((values[has] * answered[has]).sum() / answered.sum())

    assert mean(table.map_at_r) == pytest.approx(result.map_at_r, rel=1e-12)
    assert mean(table.r_precision) == pytest.approx(result.r_precision, rel=1e-12)
    assert mean(table.recall_at_k[10]) == pytest.approx(result.recall_at_k[10], rel=1e-12)
    assert mean(table.mrr) == pytest.approx(result.mrr, rel=1e-12)
    for row in table.rows():
        queries = [i for i in range(120) if labels[i] == row["class_id"]]
        single = [i for i in queries if (labels[120:] == labels[i]).sum() == 1]
        assert (row["num_queries"], row["num_single_reference"]) == (len(queries), len(single))


def test_the_worst_come_first(by_hand) -> None:
    # MAP@R 1/2, 1/2, 1/4, 0, 0 and none; of the two with 0 the one whose reference comes fourth.
    assert worst_queries(by_hand, 10).tolist() == [3, 4, 2, 0, 1]
    assert worst_queries(by_hand, 2).tolist() == [3, 4]
    assert worst_queries(by_hand, 0).tolist() == []


def test_equally_bad_queries_come_by_index() -> None:
    x = on_circle(*range(0, 180, 3))
    result = retrieval(x, torch.arange(60) // 2, ks=(1,))
    want = sorted(range(60), key=lambda i: (float(result.query_map_at_r[i]), -int(result.first_hit_rank[i]), i))
    assert worst_queries(result, 60).tolist() == want


def test_a_negative_count_is_refused(by_hand) -> None:
    with pytest.raises(InputError, match="`count` must be at least 0: got -1"):
        worst_queries(by_hand, -1)
