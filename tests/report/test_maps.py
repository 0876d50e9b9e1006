"""Maps: PCA against a library, t-SNE the same each time, which points are taken, and what the section says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.report import map as maps
from gcahng.report.embedded import EmbeddedRuns
from gcahng.report.section import Figure, Section
from gcahng.report.synthetic import SyntheticNegatives, synthetic_negatives, training_batch


def unit_points(count: int, channels: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, channels, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_pca_is_that_of_the_library() -> None:
    unit = unit_points(40, 6)
    found, reference = maps.pca(unit), PCA(2).fit(unit.double().numpy())
    want = reference.transform(unit.double().numpy())
    for column in (0, 1):  # signs are free
        sign = np.sign(found.points[0, column] * want[0, column])
        np.testing.assert_allclose(found.points[:, column], sign * want[:, column], atol=1e-9)
    first, second = (100 * reference.explained_variance_ratio_).round().astype(int)
    assert found.axes == (f"1st direction, {first} % of the variance", f"2nd direction, {second} %")
    assert found.text == "PCA of 40 points"


def test_t_sne_is_the_same_each_time_and_keeps_groups_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    centres = torch.eye(3).repeat_interleave(8, 0)
    unit = F.normalize(centres + 0.05 * torch.randn(24, 3, generator=generator), dim=1)
    found, again = maps.t_sne(unit), maps.t_sne(unit)
    assert np.array_equal(found.points, again.points)
    assert found.text == "t-SNE of 24 points (perplexity 7.67, seed 0, from their PCA on)"
    groups = found.points.reshape(3, 8, 2)
    middles = groups.mean(1)
    for number in range(3):
        away = np.linalg.norm(groups[number][:, None] - middles, axis=-1)
        assert (away.argmin(1) == number).all()


@pytest.mark.parametrize(
    "unit", [unit_points(2, 5), unit_points(3, 1), torch.ones(5, 4) / 2], ids=["two", "one channel", "all alike"]
)
def test_few_flat_and_equal_points_have_maps(unit: torch.Tensor) -> None:
    for made in (maps.pca, maps.t_sne):
        points = made(unit).points
        assert points.shape == (len(unit), 2)
        assert np.isfinite(points).all()


def test_some_classes_are_the_same_each_time_and_large_enough() -> None:
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate([3, 50, 4, 1, *[7] * 12])])
    chosen = maps.some_classes(labels)
    assert torch.equal(chosen, maps.some_classes(labels))
    ids, counts = labels[chosen].unique(return_counts=True)
    assert len(ids) == 10
    assert not {0, 3} & set(ids.tolist())  # fewer than four images
    for class_id, count in zip(ids.tolist(), counts.tolist(), strict=True):
        assert count == min(20, int((labels == class_id).sum()))
    assert len(chosen.unique()) == len(chosen)
    # Where there are no others, small classes are taken.
    assert maps.some_classes(torch.tensor([5, 9, 9])).tolist() == [0, 1, 2]


def test_the_anchor_is_the_median_one() -> None:
    """Anchors whose synthetic negatives have similarities 0.1, 0.9 and (0.5 + 0.6) / 2; a fourth has none."""

    def turned(similarity: float) -> list[float]:
        return [similarity, (1 - similarity**2) ** 0.5]

    batch = SyntheticNegatives(
        embeddings=torch.tensor([[2.0, 0.0]] * 4),
        labels=torch.tensor([7, 8, 7, 8]),
        rows=np.arange(4),
        synthetic=3 * torch.tensor([turned(0.1), turned(0.9), turned(0.5), turned(0.6)]),
        anchor=torch.tensor([0, 1, 2, 2]),
        negative_class=torch.tensor([8, 7, 8, 8]),
        num_classes=2,
    )
    assert maps.anchor_to_show(batch) == 2


def figures(section: Section) -> list[Figure]:
    return [part for part in section.parts if isinstance(part, Figure)]


@pytest.fixture(scope="module")
def section(report_runs, embedded_runs, undrawn):
    with undrawn():
        return maps.map_section(report_runs, embedded_runs)


def test_the_section_has_a_batch_of_the_run_that_generates_and_classes_of_both(section) -> None:
    assert [part.name if isinstance(part, Figure) else str(part) for part in section.parts] == [
        "<h3>A training batch with synthetic negatives</h3>",
        "map-batch-tsne-1",
        "map-batch-pca-1",
        "<h3>t-SNE of evaluated classes</h3>",
        "map-classes-tsne-0",
        "map-classes-tsne-1",
        "<h3>PCA of evaluated classes</h3>",
        "map-classes-pca-0",
        "map-classes-pca-1",
    ]
    assert "baseline makes no synthetic negatives." in section.intro


def test_captions_say_how_a_map_was_made(section, report_runs) -> None:
    batch = synthetic_negatives(report_runs[1], training_batch(report_runs[1]))
    anchor = maps.anchor_to_show(batch)
    real, made = F.normalize(batch.embeddings, dim=1), F.normalize(batch.synthetic, dim=1)
    before = np.mean([float((real[i] - real[anchor]).norm()) for i in range(8) if i % 4 != anchor % 4])
    after = np.mean([float((m - real[anchor]).norm()) for m, a in zip(made, batch.anchor, strict=True) if a == anchor])
    caption = figures(section)[0].caption
    assert "t-SNE of 11 points (perplexity 3.33, seed 0, from their PCA on)" in caption
    assert "8 training images of 4 classes and the 3 synthetic negatives of one anchor" in caption
    assert f"{before:.2f} to the negatives, {after:.2f} to the synthetic ones" in caption
    assert figures(section)[4].caption == "baseline: PCA of 48 points, images of 8 evaluated classes."


def test_the_synthetic_negatives_are_drawn(report_runs, embedded_runs, monkeypatch) -> None:
    """As many crosses as there are, each with its line."""
    drawn: list[tuple[str, int]] = []
    original = maps._draw_batch

    def watched(title, flat, batch, anchor, classes):
        drawn.append((title, len(flat.points) - len(batch.labels)))
        assert classes.tolist() == [c for c, a in zip(batch.negative_class, batch.anchor, strict=True) if a == anchor]
        return original(title, flat, batch, anchor, classes)

    monkeypatch.setattr(maps, "_draw_batch", watched)
    monkeypatch.setattr(maps, "_class_figures", lambda *_: [])
    maps.map_section(report_runs, embedded_runs)
    assert [count for _, count in drawn] == [3, 3]


def test_another_data_set_in_place_of_the_trained_one_is_said(report_runs, embedded_runs) -> None:
    run = embedded_runs["baseline"]
    generating = replace(run, run=replace(report_runs[1], folder=run.run.folder, name="mixed up"))
    section = maps.map_section([generating.run], EmbeddedRuns({"mixed up": generating}))
    assert "The synthetic negatives of mixed up cannot be made: " in section.intro
    assert [figure.name for figure in figures(section)] == ["map-classes-tsne-0", "map-classes-pca-0"]
    assert "Of a training batch" not in section.intro
    assert maps.map_section([], EmbeddedRuns({})) is None


def test_a_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    with pytest.raises(InputError, match=r"maps need scikit-learn, .*pip install 'gcahng\[report\]'"):
        maps.t_sne(unit_points(4, 3))
