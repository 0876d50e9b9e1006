"""Approximate cosine search through faiss, for galleries where exact search takes too long.

Every index knows the recall that was measured for it against exact search, and every answer comes with it.

Shapes: Q queries, G gallery items, D embedding channels.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import DataError, InputError
from gcahng.metrics import checks
from gcahng.metrics.unit_vectors import unit_vectors
from gcahng.search.approximate_files import IndexFile, read_index, write_index
from gcahng.search.approximate_recall import ApproximateNeighbours, MeasuredRecall, measure, measured_recall, tune

__all__ = ["KINDS", "ApproximateIndex", "ApproximateNeighbours", "MeasuredRecall", "measured_recall", "tune"]

KINDS = ("flat", "ivf", "ivf_sq8", "hnsw")
MIN_ITEMS_PER_LIST = 39
"""Fewer do not make a centroid worth having, says faiss."""
_TRAINING_ITEMS_PER_LIST = 64
_BUILD_EFFORT = 100
_SEARCH_EFFORT = 64
_MEASURED_K, _MEASURED_QUERIES = 10, 256
_ROWS_AT_ONCE = 1 << 14


class ApproximateIndex:
    """A gallery of unit vectors in a faiss index. Make one by `build` or `load`.

    Attributes:
        kind: One of `KINDS`.
        num_items: G.
        dim: D.
        seed: Of training and levels.
        measured: Recall at the present effort, by the last measurement.
    """

    def __init__(self, index: Any, *, kind: str, seed: int) -> None:
        self._index = index
        self.kind = kind
        self.seed = seed
        self.num_items = int(index.ntotal)
        self.dim = int(index.d)
        self.measured = MeasuredRecall(effort=self.effort)

    @classmethod
    def build(
        cls,
        embeddings: Tensor,
        kind: str = "ivf",
        *,
        seed: int = 0,
        lists: int | None = None,
        links: int = 32,
        effort: int | None = None,
        threads: int = 1,
    ) -> "ApproximateIndex":
        """Index a gallery, and measure recall at 10 on 256 of its own items, each without itself.

        The same embeddings, seed and settings give the same index.

        Args:
            embeddings: (G, D), normalised here, at least two rows.
            kind: `flat` (exact), `ivf` (lists around centroids), `ivf_sq8` (the same in a quarter of the memory, with
                rounded scores) or `hnsw` (a graph: fast and large).
            seed: Of the centroids or the levels.
            lists: Of `ivf`; by default 4 sqrt(G), fewer in small galleries.
            links: Of `hnsw`, per item.
            effort: Lists to visit (by default a sixteenth) or candidates to keep (64); see `tune`.
            threads: To build `hnsw` with: more are faster, and no longer give the same graph each time.

        Raises:
            InputError: An argument is out of range, there are too few items, or faiss is not installed.
        """
        faiss = load_faiss()
        checks.check_embeddings("embeddings", embeddings)
        checks.check_finite("embeddings", embeddings)
        check_choice(kind)
        check_count("seed", seed, 0, 2**31 - 1)
        check_count("links", links, 2, 256)
        check_count("threads", threads, 1, 4096)
        if len(embeddings) < 2:
            raise InputError(f"`embeddings` must have at least 2 rows: got {len(embeddings)}. Add gallery items.")
        index = _empty(faiss, embeddings.shape[1], kind, seed, list_count(len(embeddings), lists, kind), links)
        if kind.startswith("ivf"):
            index.train(_training_rows(embeddings, index.nlist, seed))
        with _threads(faiss, threads if kind == "hnsw" else None):
            for start in range(0, len(embeddings), _ROWS_AT_ONCE):
                index.add(unit_vectors(embeddings[start : start + _ROWS_AT_ONCE].cpu()).numpy())
        found = cls(index, kind=kind, seed=seed)
        if effort is None and kind == "hnsw":
            effort = min(_SEARCH_EFFORT, found.most_effort)
        if effort is not None:
            found.set_effort(effort)
        queries = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))[:_MEASURED_QUERIES]
        k = min(_MEASURED_K, len(embeddings) - 1)
        found.measured = measure(found, embeddings[queries], embeddings, k, exclude=queries)
        return found

    @property
    def effort(self) -> int:
        """Lists visited or candidates kept per query; 0 for flat."""
        if self.kind == "flat":
            return 0
        return int(self._index.hnsw.efSearch if self.kind == "hnsw" else self._index.nprobe)

    @property
    def most_effort(self) -> int:
        """Where the effort ends: all lists, or all items."""
        if self.kind == "flat":
            return 0
        return self.num_items if self.kind == "hnsw" else int(self._index.nlist)

    def set_effort(self, effort: int) -> None:
        """Search more or less thoroughly; what was measured is forgotten. `tune` and `measured_recall` do both.

        Raises:
            InputError: Not between 1 and `most_effort`, or the index is flat.
        """
        if self.kind == "flat":
            raise InputError("`effort` has no meaning for kind 'flat', which compares every item: leave it out.")
        check_count("effort", effort, 1, self.most_effort)
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = effort
        else:
            self._index.nprobe = effort
        self.measured = MeasuredRecall(effort=effort)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, *, exclude: Tensor | None = None) -> ApproximateNeighbours:
        """The nearest items that the index finds.

        Args:
            queries: (Q, D), normalised here.
            k: Neighbours per query.
            exclude: (Q,) int64, the gallery item that a query must not find (itself, usually), -1 for none.

        Raises:
            InputError: Shapes do not fit, values are not finite, or k exceeds the candidates of a query.
        """
        checks.check_embeddings("queries", queries)
        if queries.shape[1] != self.dim:
            raise InputError(
                f"`queries` must have as many channels as the index: expected {self.dim}, got {queries.shape[1]}. "
                "Embed them with the model that made the index."
            )
        checks.check_finite("queries", queries)
        check_count("k", k, 1, self.num_items - (exclude is not None))
        if exclude is not None:
            exclude = self._checked_exclude(exclude, len(queries))
        scores = torch.empty(len(queries), k)
        indices = torch.empty(len(queries), k, dtype=torch.int64)
        for start in range(0, len(queries), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            unit = unit_vectors(queries[part].cpu()).numpy()
            asked = k if exclude is None else k + 1
            found, places = (torch.from_numpy(one) for one in self._index.search(unit, asked))
            scores[part], indices[part] = _ranked(found, places, k, None if exclude is None else exclude[part])
        return ApproximateNeighbours(scores=scores, indices=indices, measured=self.measured)

    def _checked_exclude(self, exclude: Tensor, num_queries: int) -> Tensor:
        if exclude.dtype != torch.int64 or tuple(exclude.shape) != (num_queries,):
            raise InputError(
                f"`exclude` must have one int64 gallery index per query: expected shape ({num_queries},), got "
                f"{exclude.dtype} {tuple(exclude.shape)}."
            )
        if int(exclude.min()) < -1 or int(exclude.max()) >= self.num_items:
            raise InputError(
                f"`exclude` must lie between -1 (none) and {self.num_items - 1}: got {int(exclude.min())} to "
                f"{int(exclude.max())}. Pass rows of the gallery that was indexed."
            )
        return exclude.cpu()

    def save(self, path: Path) -> None:
        """Write the index to `path` and what it is to `path` + ".json"; each file appears whole.

        Raises:
            DataError: It cannot be written.
        """
        about = IndexFile(self.kind, self.dim, self.num_items, self.seed, self.effort)
        write_index(path, load_faiss(), self._index, about, asdict(self.measured))

    @classmethod
    def load(cls, path: Path) -> "ApproximateIndex":
        """Read what `save` wrote.

        Raises:
            DataError: A file is missing, damaged or does not belong to the other.
            InputError: faiss is not installed.
        """
        faiss = load_faiss()
        index, about, measured = read_index(path, faiss, KINDS)
        found = cls(index, kind=about.kind, seed=about.seed)
        if about.effort > found.most_effort:
            raise DataError(
                f"{path}.json: `effort` must be at most {found.most_effort}, got {about.effort}. Build the index again."
            )
        if about.kind != "flat":
            found.set_effort(about.effort)
        found.measured = MeasuredRecall(**measured)
        return found


def load_faiss() -> ModuleType:
    """The module.

    Raises:
        InputError: It is not installed.
    """
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # which instructions it was compiled for
    try:
        import faiss
    except ImportError:
        raise InputError("Approximate search needs faiss: pip install 'gcahng[search]'.") from None
    module: ModuleType = faiss
    return module


def check_choice(kind: str) -> None:
    """Ask for one of `KINDS`.

    Raises:
        InputError: It is none.
    """
    if kind not in KINDS:
        raise InputError(f"`kind` must be one of {', '.join(KINDS)}: got {kind!r}.")


def check_count(name: str, value: int, least: int, most: int) -> None:
    """Ask for an integer in a range.

    Raises:
        InputError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"`{name}` must be an integer from {least} to {most}: got {value!r}.")


def list_count(num_items: int, lists: int | None, kind: str) -> int:
    """Lists of an `ivf` index; 0 for other kinds.

    Raises:
        InputError: There are too few items to train that many.
    """
    if not kind.startswith("ivf"):
        if lists is not None:
            raise InputError(f"`lists` belongs to kind 'ivf': leave it out for {kind!r}.")
        return 0
    wanted = 1 if lists is None else lists
    check_count("lists", wanted, 1, 1 << 20)
    if num_items < MIN_ITEMS_PER_LIST * wanted:
        raise InputError(
            f"`embeddings` are too few to train {wanted} list{'s' * (wanted != 1)} of kind {kind!r}: expected at least "
            f"{MIN_ITEMS_PER_LIST * wanted}, got {num_items}. Use fewer lists, or kind 'flat'."
        )
    if lists is not None:
        return lists
    return min(round(4 * math.sqrt(num_items)), num_items // MIN_ITEMS_PER_LIST)


def _empty(faiss: ModuleType, dim: int, kind: str, seed: int, lists: int, links: int) -> Any:
    metric = faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, links, metric)
        index.hnsw.rng = faiss.RandomGenerator(seed)
        index.hnsw.efConstruction = _BUILD_EFFORT
        return index
    centroids = faiss.IndexFlatIP(dim)
    if kind == "ivf":
        index = faiss.IndexIVFFlat(centroids, dim, lists, metric)
    else:
        index = faiss.IndexIVFScalarQuantizer(centroids, dim, lists, faiss.ScalarQuantizer.QT_8bit, metric)
    index.cp.seed = seed
    index.cp.spherical = True
    index.cp.max_points_per_centroid = _TRAINING_ITEMS_PER_LIST
    index.nprobe = max(1, lists // 16)
    return index


def _training_rows(embeddings: Tensor, lists: int, seed: int) -> Any:
    """A sample of the gallery, unit vectors: (n, D) float32 array."""
    order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))
    chosen = order[: _TRAINING_ITEMS_PER_LIST * lists].sort().values
    return unit_vectors(embeddings[chosen.to(embeddings.device)].cpu()).numpy()


def _ranked(scores: Tensor, indices: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best of (q, k) or, one item to be left out, (q, k + 1) found items; equal scores: lower index first."""
    if exclude is not None:
        scores = scores.masked_fill(indices == exclude.unsqueeze(1), -torch.inf)
        indices = indices.masked_fill(indices == exclude.unsqueeze(1), -1)
    scores = scores.masked_fill(indices < 0, -torch.inf)
    by_index = indices.sort(dim=1)
    order = scores.gather(1, by_index.indices).sort(dim=1, descending=True, stable=True)
    return order.values[:, :k], by_index.values.gather(1, order.indices)[:, :k]


@contextmanager
def _threads(faiss: ModuleType, count: int | None) -> Iterator[None]:
    """Fewer threads inside, where asked for; faiss keeps the number for the whole process."""
    before = faiss.omp_get_max_threads()
    try:
        if count is not None:
            faiss.omp_set_num_threads(count)
        yield
    finally:
        faiss.omp_set_num_threads(before)
