"""Which parameters each phase reaches and moves, for every combination of switches."""

import itertools

import pytest
import torch
from maths_cases import Size
from step_cases import Case, NotingBackend, averages_of, run

from gcahng.graph import GraphNetwork
from gcahng.training.optimizers import parameter_groups

GRAPHS = [
    {
        "size": Size(4, 2, 8, layers, 2, training_classes=6),
        "graph_options": {
            "backend": backend, "node_propagation": propagate, "edge_to_node": add, "norm": norm,
        },
    }
    for layers, backend, (propagate, add), norm in itertools.product(
        (1, 2, 3),
        ("eager", "scatter"),
        ((True, True), (True, False), (False, True)),
        ("gelu_layer_norm", "layer_norm"),
    )
]  # fmt: skip


def names_of(arguments: dict[str, object]) -> str:
    options = arguments["graph_options"]
    assert isinstance(options, dict)
    return f"L{arguments['size'].layers}-" + "-".join(str(value) for value in options.values())  # type: ignore[attr-defined]


def declared(backend: NotingBackend) -> dict[str, set[str]]:
    """Names of the graph's parameters by the passes that `parameter_groups` says reach them."""
    graph = backend.module("graph")
    assert isinstance(graph, GraphNetwork)
    names = {id(p): f"graph.{n}" for n, p in graph.named_parameters()}
    return {reach: {names[id(p)] for p in g} for reach, g in graph.parameter_groups().items()}


@pytest.mark.parametrize("arguments", GRAPHS, ids=names_of)
def test_exactly_the_declared_parameters_get_gradients(arguments: dict[str, object]) -> None:
    backend, _ = run(Case(**arguments))  # type: ignore[arg-type]
    groups = declared(backend)
    assert [phase.reach for phase in backend.phases] == ["metric", "classifier", "generation"]
    for phase in (backend.phases[0], backend.phases[2]):
        reached = {name for name in phase.gradients if name.startswith("graph.")}
        assert reached == groups["both"] | groups[phase.reach]
    edge_keys = {n for n in backend.parameters() if "edge_blocks" in n and n.endswith("key.bias")}
    for name in edge_keys & backend.phases[2].gradients.keys():
        gradient = backend.phases[2].gradients[name]
        largest = max(float(g.abs().max()) for g in backend.phases[2].gradients.values())
        exact = arguments["graph_options"]["backend"] == "eager"  # type: ignore[index]
        assert float(gradient.abs().max()) <= (0 if exact else 1e-13 * largest), name
    assert edge_keys


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("backend_name", ["eager", "scatter"])
@pytest.mark.parametrize("proxies", [False, True])
def test_each_phase_moves_what_it_reaches_and_nothing_else(proxies: bool, backend_name: str) -> None:
    case = Case(proxies=proxies, graph_options={"backend": backend_name})
    backend = case.backend()
    start = backend.snapshot()
    case.step_on(backend)(*case.images(), averages_of(), step=0)
    groups = declared(backend)
    of_part = {
        part: {f"{part}.{n}" for n, p in module.named_parameters() if p.requires_grad}
        for part, module in backend.modules.items()
    }
    states = [start, *[phase.parameters for phase in backend.phases]]
    moved = [changed(a, b) for a, b in itertools.pairwise(states)]
    assert moved[0] == (of_part["metric_model"] | of_part["metric_loss"] | groups["both"] | groups["metric"])
    assert moved[1] == of_part["classifier"]
    assert moved[2] == groups["both"] | groups["generation"]
    assert bool(of_part["metric_loss"]) == proxies
    counts = backend.move_counts()
    assert {counts[n] for n in groups["both"]} == {2}
    assert {counts[n] for n in groups["metric"] | groups["generation"]} == {1}
    assert {counts[n] for n in of_part["classifier"] | of_part["metric_model"]} == {1}
    frozen = {"graph.node_norm.bias", "graph.edge_norm.bias"}
    assert {counts[n] for n in frozen} == {0}
    assert all(p.grad is None for p in backend.parameters().values())


def test_gradients_of_zero_in_place_of_none_change_nothing() -> None:
    """Distributed backends fill what a pass does not reach with zeros; the gate takes them out."""

    class Filling(NotingBackend):
        def step(self, names, reach):  # type: ignore[no-untyped-def]
            for name in names:
                for parameter in self.modules[name].parameters():
                    if parameter.requires_grad and parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            super().step(names, reach)

    case = Case()
    plain = case.backend()
    filling = Filling(plain.modules, plain.optimizers, plain.gates)
    want, _ = run(case, 3)
    averages = averages_of()
    for number in range(3):
        case.step_on(filling)(*case.images(number), averages, step=number)
    for name, value in want.snapshot().items():
        torch.testing.assert_close(filling.snapshot()[name], value, rtol=1e-12, atol=1e-13)
    assert filling.move_counts() == want.move_counts()


def test_groups_of_other_parts_are_reached_by_all_passes() -> None:
    groups = parameter_groups(torch.nn.Linear(2, 3))
    assert [group["reach"] for group in groups] == ["both"]
    graph = GraphNetwork(8, 5, 1, 2)
    assert {group["reach"] for group in parameter_groups(graph)} == {"both", "metric", "generation"}
    count = sum(len(group["params"]) for group in parameter_groups(graph))
    assert count == sum(p.requires_grad for p in graph.parameters())
