"""The arms of `retrieval.py`: ours, the released code's way, pytorch-metric-learning, the bare product.

Each takes a `Problem` and returns what it found, so that a benchmark compares equal results.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import machine
import numpy as np
import torch
from retrieval_data import make_problem
from torch import Tensor
from torch.nn import functional as F

from gcahng.distributed import Ranks
from gcahng.distributed.retrieval import retrieval_over_ranks
from gcahng.metrics import RetrievalResult, retrieval

KS = (1, 10, 100, 1000)
PRECISION_KS = (1, 10)
# What the released code looks at, and how many queries it scores at a time.
DEPTH, RELEASED_ROWS = 1000, 10_000
# The fastest of what was tried: the product stays near the cache (docs/experiments.md).
FLOOR_TILE = 4096
OURS = {"default": "auto", "fp32": "fp32"}
PEER, RELEASED, FLOOR = "pytorch-metric-learning", "released", "floor"
YARDSTICKS = (PEER, RELEASED, FLOOR)


@dataclass(frozen=True)
class Spec:
    """What is searched by whom.

    Attributes:
        items: n, all of them in self-retrieval.
        dim: D.
        queries: Rows that the yardsticks search for, which stand for all; ours searches for every row.
        structure: As `retrieval_data.make_problem` takes it.
        tail: Class sizes that fall like a power of their rank.
        device: Where the embeddings lie.
        threads: CPU threads.
        seed: Of the data.
        split: Queries of a search with a gallery, which then has `items`; 0 for self-retrieval. `queries` of them,
            the first, are searched for and stand for all.
    """

    items: int
    dim: int
    queries: int
    structure: str = "trained"
    tail: bool = False
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    split: int = 0

    @property
    def size(self) -> str:
        """For names of rows."""
        size = f"{self.split}x{self.items}x{self.dim}" if self.split else f"{self.items}x{self.dim}"
        return size + " tail" * self.tail + " untrained" * (self.structure == "none")

    def name(self, what: str) -> str:
        """A row's name: what, device, size."""
        return f"{what}, {self.device} {self.size}"

    def share(self, arm: str) -> float:
        """By what the time of an arm is multiplied to stand for all queries."""
        if self.split:
            return self.split / self.queries
        return self.items / self.queries if arm in (PEER, RELEASED) else 1.0


@dataclass(frozen=True)
class Problem:
    """The data of a specification, self-retrieval: (n, D) float32 and (n,) int64."""

    spec: Spec
    embeddings: Tensor
    labels: Tensor

    @classmethod
    def of(cls, spec: Spec) -> "Problem":
        torch.set_num_threads(spec.threads)
        embeddings, labels = make_problem(
            spec.items + spec.split, spec.dim, structure=spec.structure, tail=spec.tail, seed=spec.seed
        )
        return cls(spec, embeddings.to(spec.device), labels.to(spec.device))

    @property
    def ks(self) -> tuple[int, ...]:
        """Those of 1, 10, 100, 1000 that the candidates allow."""
        return tuple(k for k in KS if k < self.spec.items)

    @property
    def depth(self) -> int:
        """Neighbours that the yardsticks look at."""
        return min(DEPTH, self.spec.items - 1)


@dataclass(frozen=True)
class Values:
    """What an arm found for the queries of the yardsticks, shares in [0, 1]."""

    recall: dict[int, float]
    r_precision: float
    map_at_r: float


def values_of(result: RetrievalResult, queries: int, ks: tuple[int, ...]) -> Values:
    """Ours, of the first rows."""
    first = result.first_hit_rank[:queries]
    return Values(
        {k: float((first <= k).double().mean()) for k in ks},
        float(result.query_r_precision[:queries].mean()),
        float(result.query_map_at_r[:queries].mean()),
    )


def run_ours(problem: Problem, precision: str) -> Values:
    """The project's self-retrieval of all rows."""
    ks = problem.ks
    precision_ks = tuple(k for k in PRECISION_KS if k in ks)
    result = retrieval(problem.embeddings, problem.labels, ks=ks, precision_ks=precision_ks, precision=precision)
    return values_of(result, problem.spec.queries, ks)


def run_ours_over_ranks(problem: Problem, precision: str, ranks: Ranks) -> Values:
    """The same, each rank with its part of the rows."""
    ks = problem.ks
    precision_ks = tuple(k for k in PRECISION_KS if k in ks)
    parts = (problem.embeddings.tensor_split(ranks.size), problem.labels.tensor_split(ranks.size))
    embeddings, labels = (part[ranks.rank] for part in parts)
    result = retrieval_over_ranks(
        embeddings, labels, ranks=ranks, ks=ks, precision_ks=precision_ks, precision=precision
    )
    return values_of(result, problem.spec.queries, ks)


def run_split(problem: Problem, precision: str) -> RetrievalResult:
    """The project's search of a gallery, the rows from `split` on, for the first `queries` rows."""
    queries, split = problem.spec.queries, problem.spec.split
    return retrieval(
        problem.embeddings[:queries],
        problem.labels[:queries],
        problem.embeddings[split:],
        problem.labels[split:],
        ks=problem.ks,
        precision_ks=PRECISION_KS,
        precision=precision,
    )


def run_released(problem: Problem) -> Values:
    """The steps of the released code: scores of 10,000 queries at a time, their full top 1000, loops over queries.

    Written anew after `evaluate_retrieval` of github.com/PWenJay/GCA-HNG. What it finds itself is the first of the
    list, whichever that is; labels become float32.
    """
    labels = problem.labels
    unit = F.normalize(problem.embeddings)
    found = []
    for rows in unit[: problem.spec.queries].split(RELEASED_ROWS):
        nearest = (rows @ unit.t()).topk(1 + problem.depth, dim=1).indices
        found.append(labels[nearest[:, 1:]].float().cpu())
    listed = torch.cat(found)
    host_labels = labels.cpu()
    wanted = host_labels[: problem.spec.queries]
    recall = {k: _released_recall(wanted, listed, k) for k in problem.ks}
    counts = host_labels.bincount()[wanted] - 1
    precisions, averages = [], []
    for neighbours, own, count in zip(listed.numpy(), wanted.numpy(), counts, strict=True):
        hits = torch.tensor(np.isin(neighbours, own), dtype=torch.uint8)
        precisions.append(hits[:count].sum() / count)
        at_rank = hits.cumsum(0) * hits / torch.arange(1, len(hits) + 1)
        averages.append(float(at_rank[:count].sum() / count))
    return Values(recall, float(np.mean([float(one) for one in precisions])), float(np.mean(averages)))


def _released_recall(wanted: Tensor, listed: Tensor, k: int) -> float:
    hits = 0
    for own, neighbours in zip(wanted, listed, strict=True):
        # The whole list is converted before it is cut, as there.
        if own in neighbours.long()[:k]:
            hits += 1
    return hits / len(wanted)


def run_peer(problem: Problem) -> Values:
    """`AccuracyCalculator` of pytorch-metric-learning with its faiss search, on unit vectors: it ranks by distance."""
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import FaissKNN

    faiss.omp_set_num_threads(problem.spec.threads)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k=problem.depth,
        device=torch.device(problem.spec.device),
        knn_func=FaissKNN(),
    )
    unit, queries = F.normalize(problem.embeddings), problem.spec.queries
    found = calculator.get_accuracy(unit[:queries], problem.labels[:queries], unit, problem.labels, True)
    return Values({1: found["precision_at_1"]}, found["r_precision"], found["mean_average_precision_at_r"])


def run_floor(problem: Problem) -> None:
    """All scores in float32, in tiles that overwrite each other; nobody ranks them."""
    unit = problem.embeddings[problem.spec.split :]
    queries = problem.embeddings[: problem.spec.queries] if problem.spec.split else unit
    buffer = unit.new_empty(FLOOR_TILE * FLOOR_TILE)
    for rows in queries.split(FLOOR_TILE):
        for columns in unit.split(FLOOR_TILE):
            tile = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.t(), out=tile)


def arm_named(name: str) -> Callable[[Problem], Values | None]:
    """What runs an arm."""
    if name in OURS:
        return lambda problem: run_ours(problem, OURS[name])
    return {RELEASED: run_released, PEER: run_peer, FLOOR: run_floor}[name]


def check_agreement(found: dict[str, Values], tolerance: float) -> None:
    """Stop unless all arms found the same.

    Raises:
        RuntimeError: They did not.
    """
    want = found["fp32"]
    for arm, values in found.items():
        pairs = [(f"R@{k}", value, want.recall[k]) for k, value in values.recall.items()]
        pairs += [("R-Precision", values.r_precision, want.r_precision), ("MAP@R", values.map_at_r, want.map_at_r)]
        for metric, value, wanted in pairs:
            if not math.isclose(value, wanted, rel_tol=0, abs_tol=tolerance):
                raise RuntimeError(f"{metric} of {arm} is {value:.6f}, that of fp32 {wanted:.6f}.")


def ranks_timed(ranks: Ranks, values: dict[str, object], repeats: int) -> list[dict[str, list[float]]]:
    """Seconds of each precision on all ranks together and on this one alone, in turns: rank 0 tells.

    Args:
        ranks: One thread each.
        values: A `Spec` as a dictionary.
        repeats: Rounds, after one that warms up and compares.

    Returns:
        One dictionary of seconds for each round: precision -> [alone, together].

    Raises:
        RuntimeError: Ranks together find something else than one alone.
    """
    problem = Problem.of(Spec(**values))  # type: ignore[arg-type]
    rounds = []
    for number in range(repeats + 1):
        times: dict[str, list[float]] = {}
        for name, precision in OURS.items():
            alone, before = timed(partial(run_ours, problem, precision)) if ranks.first else (None, 0.0)
            ranks.wait()
            together, own = timed(partial(run_ours_over_ranks, problem, precision, ranks))
            times[name] = [before, ranks.host_max([own])[0]]
            if alone is not None and alone != together:
                raise RuntimeError(f"{ranks.size} ranks find {together}, one finds {alone}.")
        if number:
            rounds.append(times)
    return rounds


def timed(run: Callable[[], Values]) -> tuple[Values, float]:
    """What a run returns, and its seconds on the CPU."""
    found: list[Values] = []
    seconds, _ = machine.elapsed(lambda: found.append(run()), "cpu")
    return found[0], seconds
