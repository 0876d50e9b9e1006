"""A training step on a sparse graph: which edges it takes, and what its losses are."""

import copy

import pytest
import torch
from maths_cases import Size, assert_close, generator
from run_cases import ALONE
from sparse_reference import MaskedLosses, kept_by_loops, masked_graph
from step_cases import Case, averages_of, run
from torch import Tensor
from torch.nn import functional as F

from gcahng.graph import GraphNetwork, PairPlan
from gcahng.graph.dropout import EdgeDropout
from gcahng.random import stream_key
from gcahng.training import step as step_module
from gcahng.training.config import config_from_mapping
from gcahng.training.parts import build_modules, build_parts, build_step

SIZE = Size(7, 2, 8, 2, 2, training_classes=9)


def plans_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[PairPlan]:
    """The plans that the graph network is called with in one step, metric pass first."""
    seen: list[PairPlan] = []
    forward = GraphNetwork.forward

    def noting(self: GraphNetwork, *args: object, **named: object) -> object:
        plan = named["plan"]
        assert isinstance(plan, PairPlan)
        seen.append(plan)
        return forward(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(GraphNetwork, "forward", noting)
    run(case)
    return seen


def test_both_passes_take_the_edges_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Tensor] = []
    choose = step_module.neighbour_plan

    def noting(z: Tensor, *args: object, **named: object) -> PairPlan:
        chosen.append(z)
        return choose(z, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(step_module, "neighbour_plan", noting)
    metric, generation = plans_of(Case(SIZE, settings={"neighbours": 2}), monkeypatch)
    assert metric is generation
    assert not metric.dense
    assert len(chosen) == 1
    assert not chosen[0].requires_grad


@pytest.mark.parametrize("neighbours", [None, SIZE.num_classes - 1, 100])
def test_as_many_neighbours_as_classes_are_the_dense_graph(
    neighbours: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plans_of(Case(SIZE, settings={"neighbours": neighbours}), monkeypatch)
    assert all(plan.dense for plan in plans)


@pytest.mark.parametrize("channel", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_losses_equal_a_mask_over_all_pairs(k: int, channel: bool) -> None:
    # Nothing moves at a rate of 0, so that the witness may use one graph network for both passes.
    case = Case(SIZE, lr=0.0, settings={"neighbours": k}, channel=channel, graph_options={"dropout": 0.2})
    backend = case.backend()
    mixing = {
        phase: torch.rand(2, 1, generator=generator(number), dtype=torch.float64)
        for number, phase in enumerate(("metric", "generation"))
    }
    images, labels = case.images()
    modules = {name: copy.deepcopy(module) for name, module in backend.modules.items()}
    report = case.step_on(backend)(images, labels, averages_of(), step=4, mixing=mixing)

    z = modules["metric_model"](images).detach()
    graph, classifier = modules["graph"], modules["classifier"]
    assert isinstance(graph, GraphNetwork)
    assert isinstance(classifier, torch.nn.Linear)
    kept = kept_by_loops(z, 2, k)
    assert not kept.all()
    losses = {}
    for phase in ("metric", "generation"):
        dropout = EdgeDropout(0.2, stream_key(case.seed, "edge_dropout", 4, phase))
        logits, table = masked_graph(graph, z, labels, kept, dropout)
        losses[phase] = MaskedLosses(z, table if channel else None, kept, mixing[phase], 2.0, 3.0)
        if phase == "metric":
            want = {"node_loss": F.cross_entropy(logits, labels), "synthetic_loss": losses[phase].synthetic_loss()}
    want |= {
        "classification_loss": losses["generation"].classification(classifier, labels[:7]),
        "similarity_loss": losses["generation"].similarity(),
    }
    if channel:
        want["diversity_loss"] = losses["generation"].diversity()
    assert_close({name: report[name] for name in want}, {name: value.detach() for name, value in want.items()})


def test_the_setting_reaches_the_step() -> None:
    tree = {
        "data": {"dir": "d"},
        "run": {"dir": "r"},
        "graph": {"neighbours": 12},
        "model": {"backbone": "small_conv", "embedding_dim": 8, "pooling": "avg"},
    }
    config = config_from_mapping(tree)
    step, _ = build_step(config, build_parts(config, build_modules(config, 30), ALONE.device), ALONE)
    assert step.settings.neighbours == 12
