"""The section of classes: how well each is found, and which are taken for each other.

Letters: n queries, R references of a query, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcahng.metrics.per_class import PerClass, per_class
from gcahng.report.chart import (
    GAP,
    INK,
    MARGIN,
    POINTS,
    chart_png,
    chart_style,
    line_key,
    new_chart,
    round_ticks,
    run_line,
)
from gcahng.report.embedded import EmbeddedRun, EmbeddedRuns
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section, Table
from gcahng.training.canvas import fitted
from gcahng.training.pictures import Neighbour, Pair, Query, pairs_png

NUM_CLASSES = 6  # best and worst classes in the table
NUM_PAIRS = 8
NUM_EXAMPLES = 4
BINS = 10
MATRIX_CLASSES = 8
# Inches.
PLOT = 1.85
NAME_WIDTH, MATRIX_ROW = 1.5, 0.33


@dataclass(frozen=True)
class Confused:
    """Two classes whose images are taken for each other.

    Attributes:
        first, second: Class ids; more of the first one's neighbours belong to the second than the other way round.
        there, back: Share of the nearest neighbours of the first one's images that belong to the second, and the
            other way round. Of a query as many neighbours count as it has references, up to the number known.
    """

    first: int
    second: int
    there: float
    back: float


def confusion_section(runs: Sequence[RunData], embedded: EmbeddedRuns) -> Section | None:
    """Accuracy of single classes, and the pairs of classes that are confused most, with examples.

    Args:
        runs: Of the report.
        embedded: The same runs, embedded: the distributions are of all of them, tables and examples of the one that
            `EmbeddedRuns.compared` shows, beside the one it is compared with.
    Returns:
        None where no run could be embedded.
    """
    pair = embedded.compared()
    if pair is None:
        return None
    before, shown = pair
    models = [shown] if before is None else [before, shown]
    count = shown.neighbours.shape[1]
    pairs = most_confused(shown, NUM_PAIRS)
    parts: list[Figure | Table] = [*_distributions(runs, embedded)]
    parts += [_matrix(pairs, shown)] if pairs else []
    parts += [_class_table(models)]
    parts += [_pair_table(pairs, models)] if pairs else []
    parts += [_examples(number, found, shown) for number, found in enumerate(pairs, 1)]
    intro = (
        "A class's accuracy is the mean over its images as queries: R@1 is the share whose nearest image is of the "
        "class, MAP@R the mean average precision over the first R, R being the number of other images of the class. "
        f"Two classes are confused where the nearest neighbours of one (the first R, {count} at most) belong to the "
        "other."
    )
    if not pairs:
        intro += f" {shown.run.name} confuses no classes."
    return Section("classes", "Classes: accuracy and confusion", intro, parts)


def confusion_counts(run: EmbeddedRun) -> tuple[Tensor, Tensor, Tensor]:
    """How many of the nearest neighbours of each class belong to each other class.

    Of a query the first min(R, num_neighbours) count, so that a perfect model has none in other classes; queries
    without a reference do not count.

    Returns:
        pairs (m, 2) class ids (of the query, of the neighbour), both the same for right ones; counts (m,); and
        totals (m,), all neighbours that count of the query's class.
    """
    known = run.neighbours.shape[1]
    depth = run.result.num_references.clamp(max=known)
    counted = torch.arange(known) < depth[:, None]
    theirs = run.gallery.labels[run.neighbours]
    mine = run.labels[:, None].expand_as(theirs)
    pairs, counts = torch.stack([mine[counted], theirs[counted]], 1).unique(dim=0, return_counts=True)
    ids, place = pairs[:, 0].unique(return_inverse=True)
    totals = torch.zeros(len(ids), dtype=torch.int64).index_add_(0, place, counts)
    return pairs, counts, totals[place]


def most_confused(run: EmbeddedRun, count: int) -> list[Confused]:
    """The pairs of classes with the largest shares, both directions added; at most `count`, none without confusion."""
    shares: dict[tuple[int, int], float] = {}
    pairs, counts, totals = confusion_counts(run)
    for (mine, other), number, total in zip(pairs.tolist(), counts.tolist(), totals.tolist(), strict=True):
        if mine != other:
            shares[mine, other] = number / total
    found = []
    for (mine, other), there in shares.items():
        back = shares.get((other, mine), 0.0)
        if (there, -mine) > (back, -other):  # each pair once, the larger share first
            found.append(Confused(mine, other, there, back))
    return sorted(found, key=lambda c: (-c.there - c.back, c.first, c.second))[:count]


def _percent(value: float) -> str:
    return "\u2013" if value != value else f"{100 * value:.1f}"


def _distributions(runs: Sequence[RunData], embedded: EmbeddedRuns) -> list[Figure]:
    """Histograms of the classes' R@1 and MAP@R, all embedded runs in each."""
    named = [(index, run.name) for index, run in enumerate(runs) if run.name in embedded]
    tables = [per_class(embedded[name].result) for _, name in named]
    figures = []
    for file, title in (("recall", "R@1"), ("map", "MAP@R")):
        values = [(t.recall_at_k[1] if file == "recall" else t.map_at_r).numpy() for t in tables]
        values = [v[~np.isnan(v)] for v in values]
        with chart_style():
            png = _histogram(title, values, named)
        means = ", ".join(
            f"{name} {_percent(float(v.mean()))} % ({int((v >= 1).sum()):,} of {len(v):,} classes at 100 %)"
            for (_, name), v in zip(named, values, strict=True)
        )
        figures.append(
            Figure(
                name=f"classes-{file}",
                png=png,
                alt=f"Distribution of {title} over classes.",
                caption=f"In steps of ten points. Mean {title} over classes: {means}.",
            )
        )
    return figures


def _histogram(title: str, values: Sequence[NDArray[np.float64]], runs: Sequence[tuple[int, str]]) -> bytes:
    """Shares of classes by their value; runs with their places in the report."""
    lines = [run_line(index, below=number, above=len(runs) - 1 - number) for number, (index, _) in enumerate(runs)]
    keys = [line_key(name, line) for (_, name), line in zip(runs, lines, strict=True)]
    figure, axes = new_chart(f"Share of the classes by their {title}, %", PLOT, keys)
    edges = np.linspace(0, 1, BINS + 1)
    for of_run, line in zip(values, lines, strict=True):
        shares = np.histogram(of_run, edges)[0] / max(len(of_run), 1)
        axes.stairs(100 * shares, 100 * edges, linewidth=1.8, baseline=None, **line)
    axes.set(xlim=(0, 100), xticks=range(0, 101, 20), ylim=(0, None), xlabel=f"{title} of a class, %")
    round_ticks(axes.yaxis)
    return chart_png(figure)


def _class_table(models: Sequence[EmbeddedRun]) -> Table:
    """The worst and the best classes of the last model by MAP@R."""
    tables = [per_class(model.result) for model in models]
    shown = tables[-1]
    ascending = [i for i in shown.map_at_r.argsort(stable=True).tolist() if not shown.map_at_r[i].isnan()]
    worst = ascending[:NUM_CLASSES]
    best = [i for i in ascending[::-1] if i not in worst][:NUM_CLASSES]
    columns = ["class", "queries"]
    for model in models:
        columns += [f"{model.run.name} R@1", f"{model.run.name} MAP@R"]
    rows = [
        [models[-1].class_name(int(shown.class_id[i])), f"{int(shown.num_queries[i]):,}", *_values(tables, i)]
        for i in worst + best[::-1]
    ]
    unanswered = int(shown.map_at_r.isnan().sum())
    caption = (
        f"The {len(worst)} worst and the {len(best)} best of {len(ascending):,} classes by MAP@R of "
        f"{models[-1].run.name}, worst first, in percent."
    )
    if unanswered:
        caption += f" {unanswered:,} more classes have no image that could be found."
    return Table(columns, rows, caption)


def _values(tables: Sequence[PerClass], row: int) -> list[str]:
    return [_percent(float(v[row])) for table in tables for v in (table.recall_at_k[1], table.map_at_r)]


def _matrix(pairs: Sequence[Confused], run: EmbeddedRun) -> Figure:
    """Shares between the classes of the most confused pairs."""
    ids = list(dict.fromkeys(i for pair in pairs for i in (pair.first, pair.second)))[:MATRIX_CLASSES]
    shares = np.zeros((len(ids), len(ids)))
    for (mine, other), count, total in zip(*(part.tolist() for part in confusion_counts(run)), strict=True):
        if mine in ids and other in ids:
            shares[ids.index(mine), ids.index(other)] = 100 * count / total
    names = [run.class_name(i) for i in ids]
    with chart_style():
        png = _draw_matrix(f"Confusion: {run.run.name}", shares, names)
    listed = "; ".join(f"{number} {name}" for number, name in enumerate(names, 1))
    return Figure(
        name="confusion-matrix",
        png=png,
        alt=f"Confusion between {len(ids)} classes: {listed}.",
        caption=f"{run.run.name}: of the nearest neighbours of a row's class, the percentage that belongs to a "
        "column's class; the rest belongs to other classes.",
    )


def _draw_matrix(title: str, shares: NDArray[np.float64], names: Sequence[str]) -> bytes:
    size = len(names)
    left = NAME_WIDTH + MARGIN
    figure, axes = new_chart(title, GAP + MATRIX_ROW * size, subtitle="% of the neighbours of each class", left=left)
    axes.grid(False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=130, aspect="auto")
    for row, column in np.argwhere(shares >= 0.5):
        ink = "white" if shares[row, column] > 80 else INK
        axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=ink)
    labels = [fitted(figure, f"{n} {name}", NAME_WIDTH - 0.08, 2, fontsize=POINTS) for n, name in enumerate(names, 1)]
    axes.set_yticks(range(size), labels, parse_math=False, ha="left", linespacing=1)
    axes.tick_params(axis="y", pad=NAME_WIDTH * 72)
    axes.set_xticks(range(size), [str(n) for n in range(1, size + 1)])
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("class of the neighbour")
    return chart_png(figure)


def _pair_table(pairs: Sequence[Confused], models: Sequence[EmbeddedRun]) -> Table:
    columns = ["classes"]
    for model in models:
        columns += [f"{model.run.name} \u2192", f"{model.run.name} \u2190"]
    by_model = []
    for model in models:
        found = zip(*(part.tolist() for part in confusion_counts(model)), strict=True)
        by_model.append({tuple(ids): count / total for ids, count, total in found})
    rows = []
    for pair in pairs:
        row = [f"{models[-1].class_name(pair.first)} \u2192 {models[-1].class_name(pair.second)}"]
        for shares in by_model:
            row += [
                _percent(shares.get((pair.first, pair.second), 0.0)),
                _percent(shares.get((pair.second, pair.first), 0.0)),
            ]
        rows.append(row)
    caption = (
        f"The classes that {models[-1].run.name} confuses most: percent of the first one's nearest neighbours that "
        "belong to the second (\u2192), and of the second one's that belong to the first (\u2190)."
    )
    return Table(columns, rows, caption)


def _examples(number: int, pair: Confused, run: EmbeddedRun) -> Figure:
    """Images of a class beside their nearest neighbours of the other, most similar first, each query once."""
    first, second = run.class_name(pair.first), run.class_name(pair.second)
    theirs = run.gallery.labels[run.neighbours]
    counted = torch.arange(theirs.shape[1]) < run.result.num_references.clamp(max=theirs.shape[1])[:, None]
    wrong = (theirs == pair.second) & counted & (run.labels == pair.first)[:, None]
    found = []
    for query in wrong.any(1).nonzero().flatten().tolist():
        neighbour = int(run.neighbours[query, int(wrong[query].int().argmax())])
        found.append((run.similarity(query, neighbour), query, neighbour))
    found.sort(key=lambda item: (-item[0], item[1]))
    shown = [
        Pair(
            Query(run.image(query), first),
            Neighbour(run.gallery.image(neighbour), second, False, score),
        )
        for score, query, neighbour in found[:NUM_EXAMPLES]
    ]
    return Figure(
        name=f"confused-{number}",
        png=pairs_png(shown),
        alt=f"Images of class {first}, each above its nearest image of class {second}.",
        caption=f"{number}. {run.run.name} takes {first} for {second}: {_percent(pair.there)} % of its nearest "
        f"neighbours; the reverse {_percent(pair.back)} %. {len(found):,} of its images find one; "
        "the most similar are shown, each above what it finds.",
    )
