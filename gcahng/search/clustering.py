"""NMI and AMI: how well k-means, which knows no labels, finds the classes again.

Shapes: n items, D embedding channels, K clusters.
"""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcahng.errors import InputError
from gcahng.metrics import checks
from gcahng.metrics.unit_vectors import unit_vectors

LIBRARIES = ("faiss", "sklearn")
INITIAL = ("random", "k-means++")
ITERATIONS = 25
_INSTALL = {"faiss": "faiss: pip install 'gcahng[search]'", "sklearn": "scikit-learn: pip install 'gcahng[report]'"}


@dataclass(frozen=True, kw_only=True)
class ClusteringScores:
    """Agreement of clusters with classes.

    Attributes:
        nmi: Normalised mutual information, in [0, 1]: twice the mutual information over the sum of both entropies.
            Grows with the number of clusters, by chance alone.
        ami: Mutual information above chance over the mean entropy above chance: 1 for equal partitions, about 0 for
            unrelated ones.
        num_clusters: K, the number of classes.
        library: Whose k-means it was: `faiss` or `sklearn`. They treat clusters that run empty differently.
        initial: How the first centres were chosen.
        seed: Of the first centres.
    """

    nmi: float
    ami: float
    num_clusters: int
    library: str
    initial: str
    seed: int


def clustering_scores(
    embeddings: Tensor, labels: Tensor, seed: int = 0, *, library: str | None = None, initial: str = "random"
) -> ClusteringScores:
    """Cluster unit vectors by k-means with as many clusters as classes, and compare.

    At most 25 iterations from the same first centres in both libraries. Memory grows by one float32 copy of the
    embeddings and some tables of distances, never n x K; time is that of at most 26 products of n x D with K x D. The
    same embeddings, seed, library and number of threads give the same clusters.

    Args:
        embeddings: (n, D), normalised here.
        labels: (n,) integer classes.
        seed: Of the first centres.
        library: `faiss` or `sklearn`; by default the first that is installed.
        initial: First centres: `random` items, as others' NMI has it (PML, faiss), or greedy `k-means++`, which finds
            far more of the small classes and reads all embeddings K times for it.

    Raises:
        InputError: Shapes, types or values do not fit, fewer than two classes, or a library is not installed.
    """
    library = _chosen(library)
    if initial not in INITIAL:
        raise InputError(f"`initial` must be one of {', '.join(INITIAL)}: got {initial!r}.")
    checks.check_embeddings("embeddings", embeddings)
    checks.check_finite("embeddings", embeddings)
    labels = checks.check_labels("labels", labels, "embeddings", embeddings)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise InputError(f"`seed` must be an integer from 0 to {2**31 - 1}: got {seed!r}.")
    classes, truth = labels.cpu().unique(return_inverse=True)
    if len(classes) < 2:
        raise InputError("`labels` must name at least two classes, else there is nothing to compare: got 1.")
    unit = unit_vectors(embeddings.cpu()).numpy()
    centres = _first_centres(unit, len(classes), seed, initial)
    clusters = (_faiss_clusters if library == "faiss" else _sklearn_clusters)(unit, centres, seed)
    nmi, ami = agreement(truth, torch.from_numpy(clusters))
    return ClusteringScores(nmi=nmi, ami=ami, num_clusters=len(classes), library=library, initial=initial, seed=seed)


def agreement(labels: Tensor, clusters: Tensor) -> tuple[float, float]:
    """NMI and AMI of two partitions of the same items: (n,) and (n,) integers.

    Raises:
        InputError: scikit-learn is not installed.
    """
    _load("sklearn")
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    first, second = labels.numpy(), clusters.numpy()
    return float(normalized_mutual_info_score(first, second)), float(adjusted_mutual_info_score(first, second))


def _chosen(library: str | None) -> str:
    """The library of k-means, which is installed; scikit-learn, which compares, has to be in any case."""
    if library is not None and library not in LIBRARIES:
        raise InputError(f"`library` must be one of {', '.join(LIBRARIES)}, or None: got {library!r}.")
    _load("sklearn")
    if library is None:
        return "faiss" if find_spec("faiss") is not None else "sklearn"
    _load(library)
    return library


def _load(library: str) -> None:
    if find_spec(library) is None:
        raise InputError(f"NMI and AMI need {_INSTALL[library]}.")


def _first_centres(unit: NDArray[np.float32], count: int, seed: int, initial: str) -> NDArray[np.float32]:
    if initial == "random":
        chosen = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:count]
        drawn: NDArray[np.float32] = unit[chosen.numpy()]
        return drawn
    from sklearn.cluster import kmeans_plusplus

    centres: NDArray[np.float32] = kmeans_plusplus(unit, count, random_state=seed)[0]
    return centres


def _faiss_clusters(unit: NDArray[np.float32], centres: NDArray[np.float32], seed: int) -> NDArray[np.int64]:
    import faiss

    # Fewer than 39 items per cluster would only make it warn: classes of a few images are the rule here.
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(unit)}
    kmeans = faiss.Kmeans(unit.shape[1], len(centres), niter=ITERATIONS, seed=seed, **limits)
    kmeans.train(unit, init_centroids=centres)
    found: NDArray[np.int64] = kmeans.index.search(unit, 1)[1][:, 0]
    return found


def _sklearn_clusters(unit: NDArray[np.float32], centres: NDArray[np.float32], seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(len(centres), init=centres, n_init=1, max_iter=ITERATIONS, tol=0.0, random_state=seed)
    with warnings.catch_warnings():
        # Fewer distinct vectors than classes, as an untrained network may give: the clusters are what they are.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found: NDArray[np.int64] = model.fit_predict(unit).astype(np.int64)
    return found
