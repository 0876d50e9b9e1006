"""The section of single queries: what is found for them, by one model and by another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcahng.report.embedded import EmbeddedRun, EmbeddedRuns
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section
from gcahng.training.pictures import COLUMNS, Found, Neighbour, Query, choose_queries, comparison_png

NUM_QUERIES = 4


@dataclass(frozen=True)
class Choice:
    """A query to show, and why.

    Attributes:
        query: Its position among the queries.
        name: For the file's name.
        remark: For the reader.
    """

    query: int
    name: str
    remark: str


def gallery_section(runs: Sequence[RunData], embedded: EmbeddedRuns, num_queries: int = NUM_QUERIES) -> Section | None:
    """Queries with their nearest neighbours: worst ones, those on which two runs differ most, typical ones.

    Args:
        runs: Of the report; the names of those that are shown come from them.
        embedded: The same runs, embedded. Two of them are shown (`EmbeddedRuns.compared`).
        num_queries: At most so many of each kind, and half as many typical ones.
    Returns:
        None where no run could be embedded.
    """
    pair = embedded.compared()
    if pair is None:
        return None
    before, shown = pair
    models = [shown] if before is None else [before, shown]
    figures = [_figure(choice, models) for choice in _choices(before, shown, num_queries)]
    searched = "all the others" if shown.is_self else "the gallery"
    intro = (
        f"Each query searches {searched} for its class; the nearest images stand first, with their cosine similarity. "
        "A solid green frame and \u2713 mark the query's class, a dashed red frame and \u2717 another one, whose name "
        "stands below. MAP@R is the query's own. The worst queries come first"
    )
    if before is None:
        intro += ", then typical ones."
    else:
        intro += (
            f"; then those on which {shown.run.name} and {before.run.name} differ most, in either direction; then "
            "typical ones."
        )
    left_out = [run.name for run in runs if run.name in embedded and run.name not in {m.run.name for m in models}]
    if left_out:
        intro += f" Not shown here: {', '.join(left_out)}."
    return Section("gallery", "Queries and what they find", intro, figures)


def _choices(before: EmbeddedRun | None, shown: EmbeddedRun, num_queries: int = NUM_QUERIES) -> list[Choice]:
    """Each query once, for the first reason that it has; of a class one query for each reason."""
    order = _sortable(shown)
    name = shown.run.name
    # As many again of each, for those of a class that is there already.
    worst = order.argsort(stable=True).tolist()[: 8 * num_queries]
    groups = [("worst", f"among the worst of {name}", [q for q in worst if not order[q].isnan()], num_queries)]
    if before is not None:
        gain = order - _sortable(before)
        against = f"from {before.run.name} to {name}"
        groups.append(("better", f"among the largest gains {against}", most(gain, 8 * num_queries), num_queries))
        groups.append(("worse", f"among the largest losses {against}", most(-gain, 8 * num_queries), num_queries))
    num_typical = (num_queries + 1) // 2
    around = [q for q, _ in choose_queries(order, 0, 8 * num_typical)]
    typical = sorted(around, key=lambda q: abs(around.index(q) - len(around) // 2))  # from the middle on
    groups.append(("typical", f"typical of {name}", typical, num_typical))
    choices: list[Choice] = []
    for word, remark, queries, count in groups:
        classes: set[int] = set()
        for query in queries:
            class_id = int(shown.labels[query])
            if class_id not in classes and query not in {c.query for c in choices} and len(classes) < count:
                classes.add(class_id)
                choices.append(Choice(query, word, remark))
    return choices


def _sortable(run: EmbeddedRun) -> Tensor:
    """(n,) MAP@R; where it is the same, queries whose first right image stands further down come lower."""
    return run.result.query_map_at_r - 1e-9 * run.result.first_hit_rank


def most(values: Tensor, count: int) -> list[int]:
    """Positions of the `count` largest values above 0, largest first, equal ones by position; NaN is left out."""
    above = torch.nan_to_num(values, nan=0.0)
    order = above.argsort(descending=True, stable=True)[:count].tolist()
    return [int(i) for i in order if above[i] > 0]


def _figure(choice: Choice, models: Sequence[EmbeddedRun]) -> Figure:
    query = choice.query
    first = models[0]
    class_name = first.class_name(int(first.labels[query]))
    found, sentences, ranks = [], [], []
    for model in models:
        count = COLUMNS if len(models) > 1 else 2 * COLUMNS
        positions = model.neighbours[query, :count].tolist()
        neighbours = [
            Neighbour(
                model.gallery.image(n),
                model.gallery.class_name(n),
                model.is_right(query, n),
                model.similarity(query, n),
            )
            for n in positions
        ]
        name, value = model.run.name, float(model.result.query_map_at_r[query])
        found.append(Found(name, neighbours, f"MAP@R {100 * value:.0f} %"))
        words = [f"right ({n.score:.2f})" if n.is_right else f"{n.name} ({n.score:.2f})" for n in neighbours]
        sentences.append(f"{name} finds {', '.join(words)}.")
        ranks.append(f"{int(model.result.first_hit_rank[query]):,} with {name}")
    return Figure(
        name=f"gallery-{choice.name}-{query}",
        png=comparison_png(Query(first.image(query), class_name), found),
        alt=f"Query of class {class_name}. " + " ".join(sentences),
        caption=f"{class_name}, sample {first.key(query)}: {choice.remark}. First right image at rank "
        f"{', '.join(ranks)}.",
    )
