"""Each ablation of the paper changes what it says and nothing else: gradients of real steps against plain loops.

Dropout is off where a loop follows, so that one pass of the graph is a function of its input alone. What switches do
within the graph network: `tests/graph/test_ablated_graph.py`; the files: `test_ablation_configs.py`.
"""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from generation_loops import classification, distance, diversity, similarity, synthetic_loss, synthetic_negatives
from maths_cases import Size, assert_close
from step_cases import Case, NotingBackend, averages_of, run
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.random import mixing_weights, picking_weights

ALPHA, MEAN_LOSS = 2.0, 3.0  # as `step_cases`
TRUST = 1 - math.exp(-5 / 10)
FACTORS = ("classification_weight", "similarity_weight", "diversity_weight")


# Loops take their time.
SMALL = Size(3, 3, 4, 1, 2, training_classes=5)


def case_of(backend: str = "eager", size: Size = SMALL, **options: object) -> Case:
    graph_options = {"dropout": 0.0, "backend": backend}
    return Case(size=size, clip=None, graph_options=graph_options, **options)  # type: ignore[arg-type]


@cache
def usual_run(fusion: str) -> NotingBackend:
    return run(case_of(settings={"fusion": fusion}))[0]


def picked_negatives(z: Tensor, coefficients: Tensor, picks: list[int], num_samples: int) -> Tensor:
    """(B, P, D): of an anchor's interpolations with a class the one that its group picks; nothing is mixed."""
    num_classes = z.shape[0] // num_samples
    rows = []
    for i in range(z.shape[0]):
        group, own = divmod(i, num_classes)
        near = distance(z[i], z[(group + 1) % num_samples * num_classes + own])
        columns = []
        for p in range(num_classes):
            j = picks[group] * num_classes + p
            far = distance(z[i], z[j])
            pull = coefficients[i, j] * math.exp(-ALPHA / MEAN_LOSS)
            columns.append(z[i] + (near + (far - near) * pull) / far * (z[j] - z[i]) if far > near else z[j])
        rows.append(torch.stack(columns))
    return torch.stack(rows)


def negatives(case: Case, z: Tensor, labels: Tensor, table: Tensor | None, phase: str) -> Tensor:
    """The synthetic negatives of a pass of step 0, by loops."""
    samples = case.size.num_samples
    draws = {"seed": case.seed, "step": 0, "phase": phase, "dtype": torch.float64}
    if case.settings.get("fusion") == "pick":
        assert table is not None
        weights = picking_weights(samples, **draws).tolist()  # type: ignore[arg-type]
        picks = [row.index(0.0) + 1 if 0.0 in row else 0 for row in weights]
        return picked_negatives(z, table, picks, samples)
    weights = mixing_weights(samples, **draws)  # type: ignore[arg-type]
    return synthetic_negatives(z, labels.tolist(), table, weights, ALPHA, MEAN_LOSS)


def metric_pass_by_hand(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms of J_metric, and its gradients by parameter; a term is there if the case's switches say so."""
    modules = case.modules()
    images, labels = case.images()
    z = modules["metric_model"](images)
    terms = {"metric_loss": modules["metric_loss"](z, labels)}
    table = None
    if case.graph:
        output = modules["graph"](z, labels)
        terms["node_loss"] = F.cross_entropy(output.node_logits, labels)
        if case.generate and case.channel:
            table = output.pull_coefficients.detach()
    if case.generate:
        synthetic = negatives(case, z, labels, table, "metric")
        terms["synthetic_loss"] = synthetic_loss(z, synthetic, case.size.num_samples)
    total = sum(terms.values()) + (TRUST - 1) * terms.get("synthetic_loss", torch.zeros(()))
    total.backward()
    return terms, gradients_of(modules)


def gradients_of(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": parameter.grad
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


# What each row says J_metric is made of, and which parts there are.
ROWS = {
    "baseline": (case_of(graph=False, generate=False), ["metric_loss"], []),
    "baseline and graph": (case_of(generate=False), ["metric_loss", "node_loss"], ["graph"]),
    "single coefficient": (
        case_of(graph=False, channel=False), ["metric_loss", "synthetic_loss"], ["classifier"],
    ),
    "without random weighting": (
        case_of(settings={"fusion": "pick"}), ["metric_loss", "node_loss", "synthetic_loss"], ["classifier", "graph"],
    ),
    "without random weighting, edge list": (
        case_of("scatter", settings={"fusion": "pick"}),
        ["metric_loss", "node_loss", "synthetic_loss"],
        ["classifier", "graph"],
    ),
    "baseline, proxies": (case_of(graph=False, generate=False, proxies=True), ["metric_loss"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_metric_pass_is_what_the_row_says(name: str) -> None:
    case, terms, parts = ROWS[name]
    backend, (report,) = run(case)
    assert sorted(set(backend.modules) - {"metric_model", "metric_loss"}) == parts
    want, gradients = metric_pass_by_hand(case)
    assert sorted(want) == sorted(terms)
    assert_close({name: report[name] for name in want}, want)
    assert {"metric_loss", "node_loss", "synthetic_loss"} & report.keys() == set(terms)
    phase = backend.phases[0]
    # In the metric pass the last edge block and the read-out of the edges have no gradient, here as there.
    assert_close(phase.gradients, gradients, 1e-9)


def generation_gradients(case: Case, backend: NotingBackend) -> dict[str, dict[str, Tensor]]:
    """Values and graph gradients of J_cls, J_sim and J_div at the parameters that the third phase meets."""
    modules = case.modules()
    images, labels = case.images()
    z = modules["metric_model"](images).detach()
    for part, module in modules.items():
        state = {n: backend.phases[1].parameters[f"{part}.{n}"] for n, _ in module.named_parameters()}
        module.load_state_dict(module.state_dict() | state)
    graph, classifier, classes = modules["graph"], modules["classifier"], case.size.num_classes
    table = graph(z, labels).pull_coefficients
    synthetic = negatives(case, z, labels, table, "generation")
    losses = {
        "classification_weight": classification(
            synthetic, labels[:classes].tolist(), classifier.weight, classifier.bias
        ),
        "similarity_weight": similarity(z, synthetic, classes),
        "diversity_weight": diversity(table),
    }
    found = {}
    for name, loss in losses.items():
        graph.zero_grad()
        loss.backward(retain_graph=True)
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in graph.named_parameters()}
        found[name] = {"": loss.detach()} | {f"graph.{n}": g.clone() for n, g in gradients.items()}
    return found


@cache
def terms_of_generation(fusion: str) -> dict[str, dict[str, Tensor]]:
    case = case_of(settings={"fusion": fusion})
    return generation_gradients(case, usual_run(fusion))


@pytest.mark.parametrize(
    ("fusion", "weights"),
    [
        ("mix", (20.0, 20.0, 0.6)),
        ("mix", (0.0, 20.0, 0.6)),  # table 4
        ("mix", (20.0, 0.0, 0.6)),
        ("mix", (20.0, 20.0, 0.0)),
        ("mix", (20.0, 200.0, 0.6)),  # table 5
        ("mix", (20.0, 20.0, 0.06)),
        ("pick", (20.0, 20.0, 0.6)),
    ],
)
def test_the_generation_pass_is_the_weighted_sum_of_its_terms(fusion: str, weights: tuple[float, ...]) -> None:
    terms = terms_of_generation(fusion)
    settings = dict(zip(FACTORS, weights, strict=True)) | {"fusion": fusion}
    case = case_of(settings=settings)
    backend, (report,) = run(case)
    want = {
        name: sum(0.5 * settings[factor] * terms[factor][name] for factor in FACTORS)  # type: ignore[operator]
        for name in terms["similarity_weight"]
    }
    phase = backend.phases[2]
    got = {name: phase.gradients.get(name, torch.zeros_like(value)) for name, value in want.items() if name}
    value = want.pop("")
    assert_close({"J_gen": report["generation_loss"]}, {"J_gen": value})
    # Key biases of the edge attention: zero in ours, rounding noise in autograd's.
    names = [name for name in got if not name.endswith("key.bias")]
    assert_close({n: got[n] for n in names}, {n: want[n] for n in names}, 1e-9)
    # The terms are measured whatever they weigh, and the metric pass knows nothing of it.
    for factor, name in zip(FACTORS, ("classification_loss", "similarity_loss", "diversity_loss"), strict=True):
        assert_close({name: report[name]}, {name: terms[factor][""]}, 1e-9)
    usual = usual_run(fusion)
    for before in (0, 1):
        names, other = backend.phases[before].gradients, usual.phases[before].gradients
        assert names.keys() == other.keys()
        assert all(torch.equal(names[name], other[name]) for name in names)


def test_without_its_loss_the_classifier_is_trained_and_judges_nothing() -> None:
    case = case_of(settings={"classification_weight": 0.0})
    backend, (report,) = run(case)
    assert float(report["classifier_loss"]) > 0
    assert {name for name in backend.phases[1].gradients if name.startswith("classifier.")}
    other = case.backend()
    with torch.no_grad():
        other.modules["classifier"].weight.mul_(-3.0)
    case.step_on(other)(*case.images(), averages_of(), step=0)
    for phase in (0, 2):
        first, second = backend.phases[phase].gradients, other.phases[phase].gradients
        assert all(torch.equal(first[name], second[name]) for name in first if name.startswith(("metric", "graph")))


def test_a_generation_loss_below_zero_trusts_the_negatives_fully() -> None:
    """Diversity alone goes down to 1 - sqrt(D) / 2: the mean counts as 1e-6, and exp(-beta / 1e-6) is 0."""
    size = Size(4, 2, 8, 1, 2, training_classes=5)
    case = case_of(size=size, settings=dict(zip(FACTORS, (0.0, 0.0, 60.0), strict=True)))
    backend = case.backend()
    with torch.no_grad():
        backend.modules["graph"].edge_out.weight.mul_(100.0)
    step, averages = case.step_on(backend), averages_of()
    report = step(*case.images(), averages, step=0)
    assert -60 * (math.sqrt(8) / 2 - 1) / 2 <= float(report["generation_loss"]) < 0
    averages.end_epoch()
    assert averages.generation_loss == pytest.approx(1e-6)
    later = step(*case.images(1), averages, step=1)
    assert float(later["synthetic_weight"]) == 1.0
    assert all(bool(torch.isfinite(value)) for value in later.values())


def test_picking_changes_the_negatives_alone() -> None:
    """The same weights, dropout masks and real losses; each pass picks for itself."""
    case = Case(size=SMALL)
    usual, (mixed,) = run(case)
    backend, (picked,) = run(replace(case, settings={"fusion": "pick"}))
    assert picked.keys() == mixed.keys()
    changed = {name for name in mixed if not torch.equal(mixed[name], picked[name])}
    # J_div too stays as it is: no synthetic negative has moved the graph network yet.
    assert changed == {"synthetic_loss", "total_loss", "classification_loss", "similarity_loss", "generation_loss"}
    first, second = usual.phases[0].gradients, backend.phases[0].gradients
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("graph."))
    drawn = {p: picking_weights(3, seed=0, step=0, phase=p, dtype=torch.float64) for p in ("metric", "generation")}
    assert not torch.equal(drawn["metric"], drawn["generation"])
    given = case.step_on(case.backend())(*case.images(), averages_of(), step=0, mixing=drawn)
    assert all(torch.equal(given[name], picked[name]) for name in given)


def test_heads_change_numbers_and_layers_add_blocks() -> None:
    size = Case().size
    usual = dict(Case().modules()["graph"].named_parameters())
    heads = dict(Case(size=replace(size, heads=4)).modules()["graph"].named_parameters())
    assert usual.keys() == heads.keys()
    assert all(torch.equal(usual[name], heads[name]) for name in usual)
    reports = [run(case_of(size=replace(SMALL, heads=number)))[1][0] for number in (2, 4)]
    assert torch.equal(reports[0]["metric_loss"], reports[1]["metric_loss"])
    assert not torch.equal(reports[0]["node_loss"], reports[1]["node_loss"])
    deeper = Case(size=replace(size, layers=3)).modules()["graph"].named_parameters()
    shapes = {name: value.shape for name, value in deeper}
    assert {name: shapes.pop(name) for name in usual} == {name: value.shape for name, value in usual.items()}
    assert {name.rpartition("_blocks.")[2].partition(".")[0] for name in shapes} == {"2"}
