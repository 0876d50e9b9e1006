"""NMI and AMI by k-means: against scikit-learn on blobs, hand-made partitions, and what cannot be clustered."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.search import clustering
from gcahng.search.clustering import agreement, clustering_scores

pytest.importorskip("sklearn")
LIBRARIES = ("faiss", "sklearn")


def blobs(spread: float, classes: int = 12, each: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(classes).repeat_interleave(each)[torch.randperm(classes * each, generator=generator)]
    centres = torch.eye(16)[:classes]
    noise = spread * torch.randn(len(labels), 16, generator=generator)
    # Lengths differ: only directions count. Class ids beyond 2^24 collide as float32.
    lengths = 0.1 + 10 * torch.rand(len(labels), 1, generator=generator)
    return lengths * (centres[labels] + noise), labels + (1 << 24)


@pytest.mark.parametrize("library", LIBRARIES)
def test_classes_far_apart_are_found(library: str) -> None:
    embeddings, labels = blobs(0.02)
    found = clustering_scores(embeddings, labels, library=library, initial="k-means++")
    assert (found.nmi, found.ami) == (pytest.approx(1), pytest.approx(1))
    assert (found.num_clusters, found.library, found.initial) == (12, library, "k-means++")


@pytest.mark.parametrize("initial", clustering.INITIAL)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_same_as_scikit_learn_from_the_same_centres(library: str, initial: str) -> None:
    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    embeddings, labels = blobs(0.25)
    unit = torch.nn.functional.normalize(embeddings).numpy()
    chosen = torch.randperm(len(unit), generator=torch.Generator().manual_seed(7))[:12].numpy()
    centres = unit[chosen] if initial == "random" else kmeans_plusplus(unit, 12, random_state=7)[0]
    clusters = KMeans(12, init=centres, n_init=1, max_iter=25, tol=0).fit_predict(unit)
    found = clustering_scores(embeddings, labels, 7, library=library, initial=initial)
    assert found.nmi == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-9)
    assert found.ami == pytest.approx(adjusted_mutual_info_score(labels, clusters), abs=1e-9)
    # Neither perfect nor chance, else anything would agree.
    assert 0.3 < found.ami < 0.97


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_seed_decides_all(library: str) -> None:
    embeddings, labels = blobs(0.4)
    first, again, other = (clustering_scores(embeddings, labels, seed, library=library) for seed in (0, 0, 1))
    assert first == again
    assert first.nmi != other.nmi


@pytest.mark.parametrize(
    ("labels", "clusters", "nmi", "ami"),
    [
        ([0, 0, 1, 1], [5, 5, 2, 2], 1.0, 1.0),
        # Two of four classes in each cluster: I = H(cluster) = ln 2, H(class) = ln 4.
        ([0, 1, 2, 3] * 8, [0, 0, 1, 1] * 8, 2 / 3, None),
        # Independent partitions.
        ([0, 0, 1, 1], [0, 1, 0, 1], 0.0, None),
        # All in one cluster say nothing.
        ([0, 0, 1, 1], [0, 0, 0, 0], 0.0, 0.0),
    ],
)
def test_by_hand(labels: list[int], clusters: list[int], nmi: float, ami: float | None) -> None:
    found = agreement(torch.tensor(labels), torch.tensor(clusters))
    assert found[0] == pytest.approx(nmi, abs=1e-12)
    if ami is not None:
        assert found[1] == pytest.approx(ami, abs=1e-12)


def test_chance_does_not_count_in_ami() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, clusters = (torch.randint(60, (240,), generator=generator) for _ in range(2))
    nmi, ami = agreement(labels, clusters)
    assert nmi > 0.6
    assert abs(ami) < 0.05


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("initial", clustering.INITIAL)
def test_equal_embeddings_tell_nothing(library: str, initial: str) -> None:
    labels = torch.arange(6).repeat(5)
    embeddings = torch.ones(30, 4)
    found = clustering_scores(embeddings, labels, library=library, initial=initial)
    assert (found.num_clusters, found.nmi) == (6, pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_item_a_class(library: str) -> None:
    found = clustering_scores(torch.eye(8), torch.arange(8), library=library)
    assert found.nmi == pytest.approx(1)


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in names else real(name, package)

    monkeypatch.setattr(clustering, "find_spec", find)


def test_what_is_installed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = blobs(0.1, classes=3, each=5)
    assert clustering_scores(embeddings, labels).library == "faiss"
    hide(monkeypatch, "faiss")
    assert clustering_scores(embeddings, labels).library == "sklearn"
    with pytest.raises(InputError, match=r"need faiss: pip install 'gcahng\[search\]'"):
        clustering_scores(embeddings, labels, library="faiss")
    hide(monkeypatch, "sklearn")
    with pytest.raises(InputError, match=r"need scikit-learn: pip install 'gcahng\[report\]'"):
        clustering_scores(embeddings, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"library": "scipy"}, "`library` must be one of faiss, sklearn, or None: got 'scipy'"),
        ({"initial": "first"}, r"`initial` must be one of random, k-means\+\+: got 'first'"),
        ({"seed": -1}, "`seed` must be an integer from 0 to 2147483647: got -1"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "`labels` must name at least two classes"),
        ({"labels": torch.arange(6).float()}, "`labels` must be integer class indices"),
        ({"labels": torch.arange(5)}, r"`labels` must have one entry per row of `embeddings`: expected shape \(6,\)"),
        ({"embeddings": torch.full((6, 4), torch.nan)}, "`embeddings` must be finite: row 0"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    arguments = {"embeddings": torch.rand(6, 4), "labels": torch.arange(6) // 2} | changes
    with pytest.raises(InputError, match=message):
        clustering_scores(**arguments)  # type: ignore[arg-type]
