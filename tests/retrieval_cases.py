"""Sets of embeddings for retrieval over ranks, and what a rank does with its part of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.data.ranks import rank_part
from gcahng.distributed import Ranks
from gcahng.distributed.retrieval import retrieval_over_ranks
from gcahng.errors import InputError
from gcahng.metrics import RetrievalResult, retrieval


@dataclass(frozen=True)
class RetrievalCase:
    """Embeddings on a small grid tie often; a gallery that begins at `split` makes the items before it queries."""

    num_items: int
    num_classes: int
    on_grid: bool = False
    split: int | None = None
    memory_mb: int = 512
    precision: str = "auto"


CASES = {
    "self": RetrievalCase(3300, 600),
    "self_ties": RetrievalCase(1700, 300, on_grid=True),
    "self_fp32": RetrievalCase(1700, 300, precision="fp32"),
    "self_chunks": RetrievalCase(1700, 20, memory_mb=1),
    "fewer_items_than_ranks": RetrievalCase(2, 1),
    "gallery": RetrievalCase(3500, 600, split=1600),
    "gallery_ties": RetrievalCase(2000, 300, on_grid=True, split=400),
    "one_query": RetrievalCase(1700, 30, split=1),
}


def embeddings(case: RetrievalCase) -> tuple[Tensor, Tensor]:
    """(n, 12) float32 and (n,) int64."""
    generator = torch.Generator().manual_seed(case.num_items)
    labels = torch.randint(case.num_classes, (case.num_items,), generator=generator)
    centres = torch.randn(case.num_classes, 12, generator=generator)
    found = torch.randn(case.num_items, 12, generator=generator) + 1.5 * centres[labels]
    return (found.round() if case.on_grid else found), labels


def search(case: RetrievalCase, ranks: Ranks | None) -> RetrievalResult:
    """The whole in one process, or this rank's part of it over ranks."""
    found, labels = embeddings(case)
    sets = [(found, labels)] if case.split is None else [(t[0], t[1]) for t in _parted(found, labels, case.split)]
    options = {
        "ks": (1,),
        "precision_ks": (1,),
        "num_neighbours": 1 if case.num_items < 10 else 7,
        "memory_mb": case.memory_mb,
        "precision": case.precision,
    }
    if ranks is None:
        return retrieval(*(values for pair in sets for values in pair), **options)
    parts = []
    for values, ids in sets:
        own = rank_part(len(ids), ranks.rank, ranks.size)
        parts += [values[own.start : own.stop], ids[own.start : own.stop]]
    return retrieval_over_ranks(*parts, ranks=ranks, **options)


def _parted(found: Tensor, labels: Tensor, split: int) -> list[tuple[Tensor, Tensor]]:
    return [(found[:split], labels[:split]), (found[split:], labels[split:])]


def all_cases(ranks: Ranks) -> dict[str, RetrievalResult]:
    """Every case over ranks."""
    torch.set_num_threads(1)
    return {name: search(case, ranks) for name, case in CASES.items()}


def faults(ranks: Ranks) -> dict[str, str]:
    """What each rank says where one of them has a fault."""
    found, labels = embeddings(CASES["self_ties"])
    broken = found.clone()
    broken[3] = torch.nan

    def nan_on_the_last() -> RetrievalResult:
        return retrieval_over_ranks(broken if ranks.rank == ranks.size - 1 else found, labels, ranks=ranks)

    def k_beyond_all_parts() -> RetrievalResult:
        return retrieval_over_ranks(found, labels, ks=(len(found) * ranks.size,), ranks=ranks)

    def nothing_anywhere() -> RetrievalResult:
        return retrieval_over_ranks(found[:0], labels[:0], ranks=ranks)

    return {action.__name__: _message(action) for action in (nan_on_the_last, k_beyond_all_parts, nothing_anywhere)}


def _message(action: Callable[[], RetrievalResult]) -> str:
    try:
        action()
    except InputError as error:
        return str(error)
    return "no error"
