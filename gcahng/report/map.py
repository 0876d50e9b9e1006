"""The section of maps: embeddings in two dimensions, with the synthetic negatives of a batch among them.

scikit-learn (extra `report`) is imported on the first call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.report.chart import COLOURS, FAINT, INK, MARKERS, chart_png, chart_style, legend_below, new_chart
from gcahng.report.embedded import EmbeddedRun, EmbeddedRuns
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section
from gcahng.report.synthetic import SyntheticNegatives, synthetic_negatives, training_batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEED = 0
NUM_CLASSES = 10
MOST_PER_CLASS = 20
FEWEST_PER_CLASS = 4
PERPLEXITY = 30.0
MAP_HEIGHT = 400
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
    figures: list[Figure] = []
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
        figures += _batch_figures(model.run, batch)
    chosen = some_classes(models[0].labels)
    by_run = [_class_figures(model, chosen) for model in models if len(chosen) >= 2]
    figures += [figure for same_kind in zip(*by_run, strict=True) for figure in same_kind]
    class_names = [models[0].class_name(i) for i in models[0].labels[chosen].unique().tolist()]
    sentences.append(
        f"The evaluated classes are drawn with seed {SEED}, at most {MOST_PER_CLASS} images of each: "
        f"{'; '.join(class_names)}."
    )
    intro = (
        "Embeddings on the unit sphere, laid out in two dimensions. First a training batch with the synthetic "
        "negatives of one anchor: each is drawn towards the anchor from the images of another class (a line leads "
        "from their mean to it). Then images of some evaluated classes, the same for each run. t-SNE keeps "
        "neighbourhoods, not distances; PCA keeps the two directions along which the points differ most."
    )
    return Section("map", "Maps of embeddings", " ".join([intro, *sentences]), figures)


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


def _batch_figures(run: RunData, batch: SyntheticNegatives) -> list[Figure]:
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
                name=f"map-batch-{name}-{_slug(run.name)}",
                png=png,
                alt=f"{NAMES[name]} of a batch of {run.name}: an anchor, its positives, its negatives, synthetic ones.",
                caption=f"{run.name}: {flat.text}. {facts}",
            )
        )
    return figures


def _draw_batch(title: str, flat: FlatMap, batch: SyntheticNegatives, anchor: int, classes: Tensor) -> bytes:
    figure, axes = new_chart(title, MAP_HEIGHT)
    _bare(axes, flat)
    labels = batch.labels.numpy()
    real, made = flat.points[: len(labels)], flat.points[len(labels) :]
    own = labels == labels[anchor]
    own[anchor] = False
    for point, class_id in zip(made, classes.tolist(), strict=True):
        middle = real[labels == class_id].mean(0)
        axes.plot((middle[0], point[0]), (middle[1], point[1]), color=COLOURS[1], linewidth=0.5, alpha=0.5, zorder=1)

    def draw(points: Points, marker: str, size: float, colour: str, zorder: int, **style: Any) -> Any:
        return axes.scatter(points[:, 0], points[:, 1], size, color=colour, marker=marker, zorder=zorder, **style)

    edge = {"edgecolors": "white", "linewidths": 0.6}
    handles = [
        draw(real[[anchor]], "*", 210, "black", 5, **edge),
        draw(real[own], "^", 65, COLOURS[2], 4, **edge),
        draw(real[labels != labels[anchor]], "o", 24, COLOURS[0], 2, **edge),
        draw(made, "x", 26, COLOURS[1], 3, linewidths=1.4),
    ]
    legend_below(figure, handles, ["anchor", "its positives", "negatives", "synthetic negatives"])
    return chart_png(figure)


def _class_figures(model: EmbeddedRun, chosen: Tensor) -> list[Figure]:
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
                name=f"map-classes-{name}-{_slug(model.run.name)}",
                png=png,
                alt=f"{NAMES[name]} of images of {len(ids)} evaluated classes, embedded by {model.run.name}.",
                caption=f"{model.run.name}: {flat.text}, images of {len(ids)} evaluated classes.",
            )
        )
    return figures


def _draw_classes(title: str, flat: FlatMap, labels: Tensor, names: Sequence[str]) -> bytes:
    rows = (len(names) + 1) // 2
    figure, axes = new_chart(title, MAP_HEIGHT - 60 + 19 * rows)
    _bare(axes, flat)
    handles = []
    for number, class_id in enumerate(labels.unique().tolist()):
        points = flat.points[(labels == class_id).numpy()]
        marker = MARKERS[number % len(MARKERS)]
        handles.append(
            axes.scatter(
                points[:, 0],
                points[:, 1],
                SIZES.get(marker, 34),
                color=COLOURS[number % len(COLOURS)],
                marker=marker,
                edgecolors="white",
                linewidths=0.5,
            )
        )
    legend_below(figure, handles, names)
    return chart_png(figure)


def _bare(axes: "Axes", flat: FlatMap) -> None:
    """No ticks: only neighbourhoods count. Equal scales."""
    axes.set(xticks=[], yticks=[], aspect="equal", xlabel=flat.axes[0], ylabel=flat.axes[1], adjustable="datalim")
    axes.tick_params(colors=INK)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set(visible=True, color=FAINT)
    axes.margins(0.06)


def _slug(name: str) -> str:
    """A run's name as a part of a file's name."""
    letters = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return "-".join(part for part in letters.split("-") if part) or "run"
