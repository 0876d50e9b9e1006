"""The section of maps: embeddings in two dimensions, with the synthetic negatives of a batch among them.

scikit-learn (extra `report`) is imported on the first call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.report.chart import (
    COLOURS,
    FAINT,
    GAP,
    MARGIN,
    MARKERS,
    Key,
    chart_png,
    chart_style,
    new_chart,
    point_key,
)
from gcahng.report.embedded import EmbeddedRun, EmbeddedRuns
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section
from gcahng.report.synthetic import SyntheticNegatives, synthetic_negatives, training_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

SEED = 0
NUM_CLASSES = 10
MOST_PER_CLASS = 20
FEWEST_PER_CLASS = 4
PERPLEXITY = 30.0
MAP_HEIGHT = 3.4  # inches
SIZES = {"*": 90, "P": 50, "X": 50, "s": 30, "D": 28}  # for marks that look as large as the others
NAMES = {"tsne": "t-SNE", "pca": "PCA"}

Points = NDArray[np.float64]


@dataclass(frozen=True)
class FlatMap:
    """Points in two dimensions.

    Attributes:
        points: (n, 2).
        axes: Names of both axes; empty where they mean nothing.
        text: How it was made.
    """

    points: Points
    axes: tuple[str, str]
    text: str


def map_section(runs: Sequence[RunData], embedded: EmbeddedRuns) -> Section | None:
    """t-SNE and PCA of a batch with its synthetic negatives, and of some evaluated classes.

    Args:
        runs: Of the report.
        embedded: The same runs, embedded. Two of them are shown (`EmbeddedRuns.compared`).
    Returns:
        None where no run could be embedded.
    Raises:
        InputError: scikit-learn or matplotlib is missing.
    """
    pair = embedded.compared()
    if pair is None:
        return None
    models = [model for model in pair if model is not None]
    places = {run.name: place for place, run in enumerate(runs)}
    parts: list[Figure | Markup] = []
    sentences = []
    for model in models:
        if not model.run.config.generation.enabled:
            sentences.append(f"{model.run.name} makes no synthetic negatives.")
            continue
        try:
            batch = synthetic_negatives(model.run, training_batch(model.run))
        except InputError as error:  # another data set in place of the one it was trained on, say
            sentences.append(f"The synthetic negatives of {model.run.name} cannot be made: {error}")
            continue
        parts += _batch_figures(model.run, batch, places[model.run.name])
    if parts:
        parts.insert(0, Markup("<h3>A training batch with synthetic negatives</h3>"))
        sentences.insert(
            0,
            "Of a training batch the synthetic negatives of one anchor are shown: each is drawn towards the anchor "
            "from the images of another class (a line leads from their mean to it).",
        )
    chosen = some_classes(models[0].labels)
    by_run = [_class_figures(model, chosen, places[model.run.name]) for model in models if len(chosen) >= 2]
    for name, same_kind in zip(NAMES.values(), zip(*by_run, strict=True), strict=False):
        parts += [Markup("<h3>{} of evaluated classes</h3>").format(name), *same_kind]
    sentences.append(
        f"The evaluated classes are picked at random (seed {SEED}), at most {MOST_PER_CLASS} images of each."
    )
    intro = (
        "Embeddings on the unit sphere, laid out in two dimensions. t-SNE keeps neighbourhoods, not distances; PCA "
        "keeps the two directions along which the points differ most."
    )
    return Section("map", "Maps of embeddings", " ".join([intro, *sentences]), parts)


def some_classes(labels: Tensor) -> Tensor:
    """(n,) positions of up to 20 images of each of up to 10 classes, class by class; drawn with seed 0.

    Args:
        labels: (n,) class ids. Classes of fewer than 4 images are taken only where there are not enough others.
    """
    draws = np.random.default_rng(SEED)
    ids, counts = np.unique(labels.numpy(), return_counts=True)
    order = draws.permutation(len(ids))
    order = order[np.argsort(counts[order] < FEWEST_PER_CLASS, kind="stable")][:NUM_CLASSES]
    places = [np.flatnonzero(labels.numpy() == class_id) for class_id in ids[np.sort(order)]]
    return torch.from_numpy(np.concatenate([np.sort(draws.permutation(p)[:MOST_PER_CLASS]) for p in places]))


def anchor_to_show(batch: SyntheticNegatives) -> int:
    """The anchor whose synthetic negatives lie as far from it as is usual in the batch: the median of the means."""
    unit = F.normalize(batch.embeddings, dim=1)
    similarity = (unit[batch.anchor] * F.normalize(batch.synthetic, dim=1)).sum(1).double()
    count = torch.bincount(batch.anchor, minlength=len(unit))
    mean = torch.zeros(len(unit), dtype=torch.float64).index_add_(0, batch.anchor, similarity) / count
    ascending = [i for i in mean.argsort(stable=True).tolist() if count[i]]
    return int(ascending[(len(ascending) - 1) // 2])


def pca(unit: Tensor) -> FlatMap:
    """The two directions along which the points differ most.

    Args:
        unit: (n, D), n >= 2.
    """
    values = unit.double().numpy()
    centred = values - values.mean(0)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    directions = np.concatenate([directions, np.zeros((2, values.shape[1]))])[:2]
    # The sign of a direction means nothing; fixed, so that equal points give equal maps.
    directions *= np.sign(np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1) + 1e-300)
    shares = np.append(spread**2 / max(float((spread**2).sum()), 1e-300), [0.0, 0.0])
    names = (f"1st direction, {100 * shares[0]:.0f} % of the variance", f"2nd direction, {100 * shares[1]:.0f} %")
    return FlatMap(centred @ directions.T, names, f"PCA of {len(values)} points")


def t_sne(unit: Tensor) -> FlatMap:
    """t-SNE from the PCA on, with seed 0.

    Args:
        unit: (n, D), n >= 2.
    Raises:
        InputError: scikit-learn is missing.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise InputError(
            "maps need scikit-learn, which is not installed. Install it with: pip install 'gcahng[report]'"
        ) from error
    perplexity = min(PERPLEXITY, max(1.0, (len(unit) - 1) / 3))
    made = TSNE(perplexity=perplexity, init=_start(unit), learning_rate="auto", random_state=SEED)
    points = made.fit_transform(unit.double().numpy())
    text = f"t-SNE of {len(unit)} points (perplexity {perplexity:.3g}, seed {SEED}, from their PCA on)"
    return FlatMap(points.astype(np.float64), ("", ""), text)


def _start(unit: Tensor) -> NDArray[np.float32]:
    """The PCA, small, as t-SNE is started; any number of channels has one."""
    points = pca(unit).points
    return np.asarray(points / max(float(points[:, 0].std()), 1e-12) * 1e-4, dtype=np.float32)


def _maps(unit: Tensor) -> list[tuple[str, FlatMap]]:
    return [("tsne", t_sne(unit)), ("pca", pca(unit))]


def _batch_figures(run: RunData, batch: SyntheticNegatives, place: int) -> list[Figure]:
    """Both maps of a batch with the synthetic negatives of one anchor."""
    anchor = anchor_to_show(batch)
    mine = batch.anchor == anchor
    real, made = F.normalize(batch.embeddings, dim=1), F.normalize(batch.synthetic[mine], dim=1)
    unit = torch.cat([real, made])
    away = batch.labels != batch.labels[anchor]
    before = float((real[away] - real[anchor]).norm(dim=1).mean())
    after = float((made - real[anchor]).norm(dim=1).mean())
    num_classes = len(batch.labels.unique())
    facts = (
        f"{len(real)} training images of {num_classes} classes and the {len(made)} synthetic negatives of one anchor. "
        f"Mean distance from the anchor on the unit sphere: {before:.2f} to the negatives, {after:.2f} to the "
        "synthetic ones."
    )
    if num_classes < batch.num_classes:
        facts += f" The run's own batches have {batch.num_classes} classes."
    figures = []
    for name, flat in _maps(unit):
        with chart_style():
            png = _draw_batch(f"{NAMES[name]}: {run.name}", flat, batch, anchor, batch.negative_class[mine])
        figures.append(
            Figure(
                name=f"map-batch-{name}-{place}",
                png=png,
                alt=f"{NAMES[name]} of a batch of {run.name}: an anchor, its positives, its negatives, synthetic ones.",
                caption=f"{run.name}: {flat.text}. {facts}",
            )
        )
    return figures


def _draw_batch(title: str, flat: FlatMap, batch: SyntheticNegatives, anchor: int, classes: Tensor) -> bytes:
    labels = batch.labels.numpy()
    real, made = flat.points[: len(labels)], flat.points[len(labels) :]
    own = labels == labels[anchor]
    own[anchor] = False
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.6}
    kinds: list[tuple[str, Points, str, str, float, dict[str, Any]]] = [
        ("negatives", real[labels != labels[anchor]], COLOURS[0], "o", 24, edge),
        ("synthetic negatives", made, COLOURS[1], "x", 26, {"markeredgewidth": 1.4}),
        ("its positives", real[own], COLOURS[2], "^", 65, edge),
        ("anchor", real[[anchor]], "black", "*", 210, edge),
    ]
    keys = [point_key(name, colour, marker, area, **look) for name, _, colour, marker, area, look in kinds[::-1]]
    figure, axes = _new_map(title, flat, keys)
    for point, class_id in zip(made, classes.tolist(), strict=True):
        middle = real[labels == class_id].mean(0)
        axes.plot((middle[0], point[0]), (middle[1], point[1]), color=COLOURS[1], linewidth=0.5, alpha=0.5, zorder=1)
    for zorder, (_, points, colour, marker, area, look) in enumerate(kinds, 2):
        _draw_points(axes, points, colour, marker, area, zorder, look)
    return chart_png(figure)


def _class_figures(model: EmbeddedRun, chosen: Tensor, place: int) -> list[Figure]:
    """Both maps of some classes."""
    labels = model.labels[chosen]
    ids = labels.unique().tolist()
    names = [model.class_name(i) for i in ids]
    figures = []
    for name, flat in _maps(model.query.unit[chosen]):
        with chart_style():
            png = _draw_classes(f"{NAMES[name]}: {model.run.name}", flat, labels, names)
        figures.append(
            Figure(
                name=f"map-classes-{name}-{place}",
                png=png,
                alt=f"{NAMES[name]} of images of {len(ids)} evaluated classes, embedded by {model.run.name}.",
                caption=f"{model.run.name}: {flat.text}, images of {len(ids)} evaluated classes.",
            )
        )
    return figures


def _draw_classes(title: str, flat: FlatMap, labels: Tensor, names: Sequence[str]) -> bytes:
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.5}
    looks = [(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(names))]
    areas = [float(SIZES.get(marker, 34)) for _, marker in looks]
    keys = [point_key(name, *look, area, **edge) for name, look, area in zip(names, looks, areas, strict=True)]
    figure, axes = _new_map(title, flat, keys)
    for class_id, look, area in zip(labels.unique().tolist(), looks, areas, strict=True):
        _draw_points(axes, flat.points[(labels == class_id).numpy()], *look, area, 2, edge)
    return chart_png(figure)


def _draw_points(
    axes: "Axes", points: Points, colour: str, marker: str, area: float, zorder: int, look: dict[str, Any]
) -> None:
    """Points as their key shows them."""
    point = point_key("", colour, marker, area, **look).mark
    axes.plot(points[:, 0], points[:, 1], zorder=zorder, **point)


def _new_map(title: str, flat: FlatMap, keys: Sequence[Key]) -> "tuple[Canvas, Axes]":
    """A chart without ticks, since only neighbourhoods count; equal scales."""
    named = any(flat.axes)
    around = 0.3 if named else MARGIN
    figure, axes = new_chart(title, MAP_HEIGHT + GAP, keys, left=around, right=MARGIN, bottom=around)
    axes.grid(False)
    axes.set(xticks=[], yticks=[], aspect="equal", xlabel=flat.axes[0], ylabel=flat.axes[1], adjustable="datalim")
    axes.spines[:].set(visible=True, color=FAINT)
    axes.margins(0.06)
    return figure, axes
