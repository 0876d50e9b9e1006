"""Signals of a collapse against plain loops and numpy, over ranks, at logged steps; and which of them are warned of."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_cases import Case
from generation_loops import synthetic_negatives
from host_waits import noted
from maths_cases import Size
from run_cases import make_config, make_trainer, read_metrics
from share_threads import Group
from step_cases import Case as StepCase
from step_cases import averages_of
from torch import Tensor

from gcahng.distributed import ONE, Ranks
from gcahng.graph import Coefficients, GraphNetwork, PairPlan, UnitCoefficients, class_major_plan, identity, pair_plan
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.neighbours import neighbour_plan
from gcahng.metrics.spread import MOST_SAMPLES, effective_rank, relative_std, scatter_matrix
from gcahng.training.collapse import ACTIVE_SHARE, embedding_signals, synthetic_signals
from gcahng.training.collapse_warning import CollapseWarning
from gcahng.training.hardness import HardnessRecord
from gcahng.training.observers import RunFacts
from gcahng.training.progress import Progress

CASES = {
    "pairs": Case(Size(7, 2, 12, 1, 2)),
    "three samples, padded blocks": Case(Size(5, 3, 16, 2, 4), per_block=2),
    "paper's distances": Case(Size(7, 2, 12, 1, 2), normalised=True),
    "dropout per direction": Case(Size(7, 2, 12, 1, 2), options={"edge_dropout": "independent", "dropout": 0.4}),
}
# Some synthetic negatives weigh next to nothing, others do not.
SCALE = 0.7


def looped(case: Case, z: Tensor, table: Tensor | None, listed: Tensor | None = None) -> dict[str, float]:
    """Every signal by plain loops."""
    size, synthesis = case.size, case.synthesis()
    classes, samples = size.num_classes, size.num_samples
    x = z.numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    points = unit if case.normalised else x
    rule = synthesis.rule
    labels = list(range(classes)) * samples
    made = synthetic_negatives(
        z, labels, table, synthesis.weights, rule.alpha, rule.mean_metric_loss, normalised_distance=case.normalised
    ).numpy()
    near, far, active, coefficients = [], [], [], []
    for i in range(size.batch):
        positive = (i + classes) % size.batch
        near.append(np.linalg.norm(points[i] - points[positive] + 1e-6))
        others = [j for j in range(size.batch) if labels[j] != labels[i] and (listed is None or listed[i, j])]
        far += [np.linalg.norm(points[i] - points[j] + 1e-6) for j in others]
        if table is not None:
            coefficients += [table[i, j].numpy() for j in others]
        scores = {p: float(x[i] @ made[i, p]) for p in {labels[j] for j in others}}
        whole = sum(map(math.exp, scores.values())) + math.exp(float(x[i] @ x[positive]))
        active += [math.exp(score) / whole >= ACTIVE_SHARE / classes for score in scores.values()]
    found = {
        "embedding_std": float(np.mean(unit.std(0)) * np.sqrt(size.dim)),
        "mean_positive_distance": float(np.mean(near)),
        "mean_negative_distance": float(np.mean(far)),
        "active_synthetic_ratio": float(np.mean(active)),
    }
    return found | ({"coefficient_spread": float(np.std(coefficients))} if coefficients else {})


def measured(case: Case, z: Tensor, coefficients: Coefficients, reduce: Any = identity) -> dict[str, float]:
    synthesis = case.synthesis()
    found = embedding_signals(z, coefficients.plan, synthesis.rule, case.size.num_samples, reduce)
    found |= synthetic_signals(z, coefficients, synthesis, reduce)
    return {name: float(value) for name, value in found.items()}


def coefficients_of(
    case: Case, z: Tensor, plan: PairPlan, graph: GraphNetwork, *, gradient: bool = False, reduce: Any = identity
) -> Coefficients:
    labels = case.batch()[1]
    output = graph(z, labels, dropout_key=5, plan=plan, coefficient_gradient=gradient, reduce=reduce)
    assert output.coefficients is not None
    return output.coefficients


@pytest.mark.parametrize("name", CASES)
def test_signals_are_what_plain_loops_find(name: str) -> None:
    case = CASES[name]
    z = case.batch()[0] * SCALE
    table = coefficients_of(case, z, case.plan(), case.graph("scatter"), gradient=True).table().detach()
    want = looped(case, z, table)
    assert 0.1 < want["active_synthetic_ratio"] < 0.9 and want["coefficient_spread"] > 0.01
    for backend in ("eager", "scatter"):
        for gradient in (False, True):
            coefficients = coefficients_of(case, z, case.plan(), case.graph(backend), gradient=gradient)
            # Directions of a pair share their distance: 1e-6 is added to either.
            assert measured(case, z, coefficients) == pytest.approx(want, rel=1e-6), (backend, gradient)
    unit = UnitCoefficients(edge_layout(case.plan(), None, 0))
    assert measured(case, z, unit) == pytest.approx(looped(case, z, None), rel=1e-6)


def test_a_sparse_graph_counts_the_edges_it_keeps() -> None:
    case = Case(Size(9, 2, 8, 1, 2))
    z = case.batch()[0] * SCALE
    coefficients = coefficients_of(case, z, neighbour_plan(z, 2, 2), case.graph("eager"), gradient=True)
    table = coefficients.table().detach()
    listed = table.abs().sum(-1) > 0
    assert int((~listed).sum()) > 9 * 4
    assert measured(case, z, coefficients) == pytest.approx(looped(case, z, table, listed), rel=1e-6)


@pytest.mark.parametrize("backend", ["eager", "scatter", "none"])
def test_ranks_find_what_one_process_finds(backend: str) -> None:
    case, ranks = CASES["pairs"], 2
    z = case.batch()[0] * SCALE
    order = class_major_plan(7, 2).order[: case.size.batch]
    graphs = [None if backend == "none" else case.graph(backend) for _ in range(ranks + 1)]

    def of_share(rank: int, size: int, reduce: Any) -> dict[str, float]:
        plan = pair_plan(order, 6, share=(rank, size), edges_per_chunk=50)
        graph = graphs.pop()
        if graph is None:
            return measured(case, z, UnitCoefficients(edge_layout(plan, None, 0)), reduce)
        return measured(case, z, coefficients_of(case, z, plan, graph, reduce=reduce), reduce)

    group = Group(ranks)
    one = of_share(0, 1, identity)
    first, second = group.run(lambda rank: of_share(rank, ranks, group.reducer(rank)))
    assert first == second == pytest.approx(one, rel=1e-12)


def entropy_rank(z: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of the centred unit rows, by numpy's SVD."""
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    singular = np.linalg.svd(unit - unit.mean(0), compute_uv=False)
    shares = singular[singular > 1e-12] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize(("rows", "dim"), [(40, 8), (8, 40), (30, 30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_effective_rank_is_that_of_the_singular_values(rows: int, dim: int, dtype: torch.dtype) -> None:
    z = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    scatter = scatter_matrix(z)
    assert scatter.shape == (min(rows, dim),) * 2 and scatter.dtype == torch.float64
    found = effective_rank(scatter)
    assert found == pytest.approx(entropy_rank(z.double().numpy()), rel=1e-6)
    assert 0.5 * min(rows - 1, dim) < found <= min(rows - 1, dim) + 1e-4


def test_the_effective_rank_of_few_directions() -> None:
    # The corners of a cross in k dimensions: spread alike in k directions.
    for k in (1, 2, 5):
        z = torch.cat([torch.eye(k, 9), -torch.eye(k, 9)])
        assert effective_rank(scatter_matrix(z)) == pytest.approx(k, rel=1e-6)
    assert effective_rank(scatter_matrix(torch.ones(6, 4))) < 1e-6 or float(relative_std(torch.ones(6, 4))) < 1e-6
    assert effective_rank(torch.zeros(3, 3)) == 0
    # Beyond `MOST_SAMPLES` rows the first ones speak.
    z = torch.cat([torch.eye(2, 3), -torch.eye(2, 3)]).repeat(MOST_SAMPLES // 4, 1)
    assert effective_rank(scatter_matrix(torch.cat([z, torch.randn(50, 3)]))) == pytest.approx(2, rel=1e-6)


def test_the_deviation_of_a_sphere_is_one() -> None:
    z = torch.randn(20000, 16, generator=torch.Generator().manual_seed(1))
    assert float(relative_std(z * torch.rand(20000, 1) * 9)) == pytest.approx(1, abs=0.01)
    assert float(relative_std(torch.ones(5, 16) * torch.arange(1, 6)[:, None])) == pytest.approx(0, abs=1e-6)


def test_a_logged_step_has_them_and_waits_once(shards: Path, tmp_path: Path) -> None:
    trainer = make_trainer(shards, tmp_path / "run")
    batch = next(iter(trainer.loader.epoch_iterator(0)))
    seen: list[Tensor] = []
    trainer.parts.metric_model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    record = HardnessRecord(edges=False, reduce=ONE.sum)
    report = trainer.run_step(batch.images, batch.labels, batch.rows, record)
    with noted() as waits:
        values = trainer.steps.read(report, record)
    assert len(waits) == 1 and "cpu" in waits[0]
    assert values.keys() - report.keys() == {"effective_rank"}
    assert {name: values[name] for name in report} == {name: float(value) for name, value in report.items()}
    assert values["effective_rank"] == pytest.approx(entropy_rank(seen[0].double().numpy()), rel=1e-5)
    assert values["embedding_std"] == pytest.approx(float(relative_std(seen[0])), rel=1e-6)


def test_bf16_changes_nothing_but_the_embeddings() -> None:
    case = StepCase(dtype=torch.float32, precision="bf16")
    backend = case.backend()
    record = HardnessRecord(edges=False, reduce=identity)
    report = case.step_on(backend)(*case.images(), averages_of(), step=0, record=record)
    for name in ("embedding_std", "mean_negative_distance", "active_synthetic_ratio", "coefficient_spread"):
        assert report[name].dtype in (torch.float32, torch.float64) and 0 < float(report[name]) < 100


def warned(caplog: pytest.LogCaptureFixture, rows: list[dict[str, float]], *, first: bool = True) -> list[str]:
    """What is said of the logged rows of steps 10, 20, ..."""
    settings = {"batch.num_classes": 32, "model.embedding_dim": 64, "loss.metric": "hn"}
    config = make_config(Path("data"), Path("run"), settings)
    ranks = ONE if first else Ranks(1, 2)
    warning = CollapseWarning(config)
    warning.begin(RunFacts(config, Path("run"), ranks, torch.device("cpu"), 0, 100), Progress())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "gcahng.training.collapse_warning"):
        for number, row in enumerate(rows, 1):
            warning.logged(Progress(step=10 * number), row)
    return [record.getMessage() for record in caplog.records]


def rows(stds: list[float], ranks: list[float] | None = None) -> list[dict[str, float]]:
    return [{"embedding_std": s, "effective_rank": r} for s, r in zip(stds, ranks or [20.0] * len(stds), strict=True)]


def test_a_collapse_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    # Steps 50, 60, ..., 90 are the first five that count.
    (said,) = warned(caplog, rows([0.02] * 30))
    for words in (
        "embedding_std is 0.02 at step 90",
        "under 0.1 in 5",
        "loss.metric=shn or sct",
        "optim.metric_model.lr",
    ):
        assert words in said
    (said,) = warned(caplog, rows([0.9] * 30, [2.9] * 30))
    assert "effective_rank is 2.9 at step 90, under 3.1 in 5" in said and "can span 31" in said
    assert warned(caplog, rows([0.02] * 30), first=False) == []


def test_no_alarm_where_there_is_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    for stds in (
        [0.02] * 8 + [0.9] * 30,  # a fresh model
        [0.9] * 9 + [0.05] * 4 + [0.11] + [0.05] * 4,  # never five in a row
        [0.001 * 1.05**n for n in range(80)],  # rises, slowly
    ):
        assert warned(caplog, rows(stds)) == []
    assert len(warned(caplog, rows([0.9] * 30 + [0.05] * 5))) == 1


@pytest.mark.parametrize("collapsed", [True, False])
def test_a_run_says_it(caplog: pytest.LogCaptureFixture, shards: Path, tmp_path: Path, collapsed: bool) -> None:
    """A head whose bias is all there is: every image has the same embedding."""
    settings = {"train.epochs": 12, "eval.every_epochs": 12, "graph.enabled": False, "generation.enabled": False}
    trainer = make_trainer(shards, tmp_path / "run", settings | {"model.head": "linear"})
    if collapsed:
        with torch.no_grad():
            trainer.parts.metric_model.head.linear.bias.fill_(1e3)
    with caplog.at_level(logging.WARNING, "gcahng"):
        trainer.run()
    said = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert len(said) == collapsed and all("embedding_std" in text for text in said)
    logged = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "step"]
    assert len(logged) == 60 and (max(row["embedding_std"] for row in logged[50:]) < 0.1) == collapsed
