"""Random searches with small blocks, in one and in several parts, against a table of all exact scores.

Sizes at the edges of blocks, parts that are empty, ties, equal and nearly equal embeddings, one class or many; and
every limit from which on work is done another way is passed by a few items.
"""

import math
from importlib import import_module
from random import Random

import pytest
import torch
from torch import Tensor

from gcahng.metrics import RetrievalResult, counting, references, retrieval, search, tiles, unit_vectors
from gcahng.metrics.threads import on_threads

nearest = import_module("gcahng.metrics.nearest")
Sets = list[tuple[Tensor, Tensor]]
KINDS = ("plain", "ties", "equal", "nearly equal", "far from the origin", "zeros", "duplicates", "opposite", "huge")


def embeddings(kind: str, count: int, draw: Random, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels are long-tailed, and may be beyond float64."""
    classes = max(1, int(count * draw.choice([0.02, 0.3, 0.8])))
    labels = (torch.rand(count, generator=generator) ** draw.choice([1, 3]) * classes).long()
    channels = draw.choice([1, 3, 40])
    centres = torch.randn(classes, channels, generator=generator)
    x = draw.choice([0, 0.3, 2]) * centres[labels] + torch.randn(count, channels, generator=generator)
    if kind == "zeros":
        x[torch.rand(count, generator=generator) < 0.5] = 0
    if kind == "opposite":
        x[::2] = -x[0]
    changed = {
        "ties": x.sign(),
        "equal": torch.ones_like(x),
        "nearly equal": 1 + 1e-7 * x.double(),
        "far from the origin": 1 + 1e-3 * x,
        "duplicates": x[torch.randint(max(1, count // 5), (count,), generator=generator)],
        "huge": 1e300 * x.double(),
    }
    return changed.get(kind, x), labels + draw.choice([0, -3, 2**60])


def shrink(draw: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    block = draw.choice([64, 128, 192])
    for module in (tiles, counting, nearest, search):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(counting, "FIRST_SLICES", draw.choice([(0, 64, 128), (0, 128)]))
    crowded = draw.choice([0, 0, 50, 10**6])
    for module in (counting, nearest):
        monkeypatch.setattr(module, "CROWDED", crowded)
        monkeypatch.setattr(module, "_MOST_PENDING", draw.choice([0, 100, 10**6]))
    monkeypatch.setattr(references, "_FIRST_DEPTH", draw.choice([1, 1, 512]))
    monkeypatch.setattr(references, "_LARGE_CLASS", draw.choice([1, 3, 64]))
    monkeypatch.setattr(references, "_ENTRIES_AT_ONCE", draw.choice([1, 50, 10**6]))
    monkeypatch.setattr(unit_vectors, "_MANY_PAIRS", draw.choice([0, 50, 10**6]))
    monkeypatch.setattr(search, "_BYTES_PER_REFERENCE", draw.choice([256, 256, 2**13]))


def check(got: RetrievalResult, sets: Sets, precision_ks: tuple[int, ...], num_neighbours: int) -> None:
    (query, labels), (gallery, gallery_labels) = sets[0], sets[-1]
    scores = unit_vectors.all_scores(*(unit_vectors.unit_vectors(x) for x in (query, gallery)))
    if len(sets) == 1:
        scores.fill_diagonal_(-torch.inf)
    found = scores.sort(dim=1, descending=True, stable=True)
    last = len(gallery) - (len(sets) == 1)
    order, hits = found.indices[:, :last], gallery_labels[found.indices[:, :last]] == labels.unsqueeze(1)
    count, place = hits.sum(1), torch.arange(1, last + 1)
    within = hits & (place <= count.unsqueeze(1))
    assert torch.equal(got.num_references, count)
    assert torch.equal(got.first_hit_rank, torch.where(count > 0, hits.int().argmax(1) + 1, 0))
    equal = torch.testing.assert_close
    equal(got.query_r_precision, within.sum(1).double() / count, rtol=0, atol=0, equal_nan=True)
    precision = (hits.cumsum(1).double() / place * within).sum(1) / count
    equal(got.query_map_at_r, precision, rtol=1e-12, atol=0, equal_nan=True)
    for column, k in enumerate(precision_ks):
        want = torch.where(count > 0, hits[:, :k].sum(1).double() / k, math.nan)
        equal(got.query_precision_at_k[:, column], want, rtol=0, atol=0, equal_nan=True)
    if num_neighbours:
        assert torch.equal(got.neighbours, order[:, :num_neighbours])
        assert torch.equal(got.neighbour_scores, found.values[:, :num_neighbours].float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_trial(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, generator = Random(f"{kind} {seed}"), torch.Generator().manual_seed(seed)
    shrink(draw, monkeypatch)
    count = draw.choice([3, 65, 128, 193, 257])
    x, labels = embeddings(kind, count, draw, generator)
    labels[-1] = labels[0]
    split = draw.choice([0, 0, draw.randrange(1, count)])
    sets = [(x[:split], labels[:split]), (x[split:], labels[split:])] if split else [(x, labels)]
    candidates = count - max(split, 1)
    precision_ks = draw.choice([(), (), (1, min(5, candidates)), (candidates,)])
    num_neighbours = draw.choice([0, 1, min(9, candidates), candidates])
    options = {"ks": (1,), "precision_ks": precision_ks, "num_neighbours": num_neighbours, "memory_mb": 1}

    found = retrieval(*(t for pair in sets for t in pair), precision=draw.choice(["bf16", "fp32"]), **options)
    check(found, sets, precision_ks, num_neighbours)

    parts, precision = draw.choice([2, 3]), draw.choice(["bf16", "fp32"])
    cuts = [[0, *sorted(draw.choice([0, 64, draw.randrange(count)]) for _ in range(parts - 1)), count] for _ in sets]

    def of_part(exchange) -> RetrievalResult:
        own = [
            values[cut[exchange.part] : cut[exchange.part + 1]]
            for pair, cut in zip(sets, cuts, strict=True)
            for values in pair
        ]
        return retrieval(*own, precision=precision, exchange=exchange, **options)

    with unit_vectors.full_precision():  # each part sets it too, and puts back what it finds
        again = on_threads(parts, of_part)
    for name, value in vars(found).items():
        other = getattr(again, name)
        same = torch.equal(value.nan_to_num(-1), other.nan_to_num(-1)) if isinstance(value, Tensor) else value == other
        assert same, name
