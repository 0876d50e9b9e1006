"""The table of docs/graph.md, cell by cell: what it says works gives the right numbers, what it excludes is refused."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from maths_cases import Size, assert_close, batch_of, errors, graph_of, results
from share_threads import Group
from torch import Tensor

from gcahng.errors import InputError
from gcahng.graph import GraphNetwork
from gcahng.graph.backends import BACKENDS
from gcahng.graph.kernels import EagerKernels
from gcahng.graph.kernels.triton_kernels import triton_problem
from gcahng.graph.neighbours import neighbour_plan
from gcahng.graph.pairs import PairPlan, class_major_plan
from gcahng.training.config import config_from_mapping

ROOT = Path(__file__).parents[2]
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
KEY = 3


def read_table() -> dict[tuple[str, str], str]:
    """Cells by (switch, backend)."""
    lines = (ROOT / "docs" / "graph.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| switch |"))
    _, *backends = split(lines[start])
    cells: dict[tuple[str, str], str] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        switch, *values = split(line)
        cells |= {(switch.strip("`"), name): value for name, value in zip(backends, values, strict=True)}
    return cells


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


CELLS = read_table()
# Triton interprets its kernels on the CPU where it was told to before its import; see the last test.
INTERPRETED = triton_problem("cpu") is None
# Interpreting is slow.
SIZE = Size(4, 2, 8, 1 if INTERPRETED else 2, 2)
HERE = [cell for cell in CELLS if cell[1] != "triton" or INTERPRETED]


def test_the_table_has_every_backend_and_every_switch() -> None:
    assert {backend for _, backend in CELLS} == set(BACKENDS) - {"auto"}
    named = {switch.partition(":")[0] for switch, _ in CELLS}
    assert named == {
        "edge_dropout",
        "norm",
        "node_propagation",
        "edge_to_node",
        "edge_aggregation",
        "neighbours",
        "train.precision",
        "float64 tensors",
        "several processes",
    }


@pytest.mark.parametrize(("switch", "backend"), HERE)
def test_cell(switch: str, backend: str) -> None:
    # What is compiled is tested beside the kernels; here the same code runs uncompiled.
    with torch.compiler.set_stance("force_eager"):
        name, _, value = switch.partition(": ")
        check = {
            "neighbours": sparse,
            "train.precision": precision,
            "float64 tensors": double,
            "several processes": processes,
        }.get(name, option)
        check(CELLS[switch, backend], backend, name, value)


def option(cell: str, backend: str, name: str, value: str) -> None:
    """A keyword of the network."""
    assert cell == "yes"
    chosen = {name: False if value == "false" else value}
    want, got = (run(graph_of(SIZE, backend=other, **chosen).float()) for other in ("scatter", backend))
    close(got, want)


def sparse(cell: str, backend: str, name: str, value: str) -> None:
    z, _ = batch_of(SIZE)
    plan = neighbour_plan(z, SIZE.num_samples, int(value))
    assert not plan.dense
    settings = {"data": {"dir": "x"}, "run": {"dir": "y"}, "graph": {"backend": backend, name: int(value)}}
    if cell == "no":
        with pytest.raises(InputError, match=rf"{backend} .*{name}"):
            run(graph_of(SIZE, backend=backend), plan)
        with pytest.raises(InputError, match=rf"graph\.{name} .*graph\.backend={backend}"):
            config_from_mapping(settings)
        return
    assert cell == "yes"
    config_from_mapping(settings)
    close(run(graph_of(SIZE, backend=backend), plan), run(graph_of(SIZE, backend="eager"), plan))


def precision(cell: str, backend: str, name: str, value: str) -> None:
    assert cell == "yes"
    want = run(graph_of(SIZE, backend="eager").float())
    low = PRECISIONS[value]
    with torch.autocast("cpu", low, enabled=low is not None):
        got = run(graph_of(SIZE, backend=backend).float())
    close(got, want, 2e-5 if low is None else 0.1)


def double(cell: str, backend: str, name: str, value: str) -> None:
    assert cell == "yes"
    z, labels = batch_of(SIZE)
    want, got = (results(graph_of(SIZE, backend=other), z, labels, dropout_key=KEY) for other in ("scatter", backend))
    assert_close(got, want)


def processes(cell: str, backend: str, name: str, value: str) -> None:
    """Two processes as threads: node logits of the whole batch on each, and how the edges are divided."""
    z, labels = batch_of(SIZE)
    want = run(graph_of(SIZE, backend=backend))["node_logits"]
    group, in_use = Group(2), threading.RLock()
    # Made before the threads start: they draw from torch's global generator.
    graphs = [graph_of(SIZE, backend=backend) for _ in range(2)]

    def share_of(rank: int) -> Tensor:
        plan = class_major_plan(SIZE.num_classes, SIZE.num_samples, share=(rank, 2))
        graph = graphs[rank]
        rows: list[int] = []
        if backend != "scatter":
            one_at_a_time(graph.kernels(plan, z.device), in_use, rows)
        output = graph(z, labels, dropout_key=KEY, plan=plan, reduce=group.reducer(rank), coefficient_gradient=False)
        assert output.coefficients is not None
        if cell == "shared":
            assert sum(rows) == SIZE.layers * plan.num_rows < SIZE.layers * SIZE.batch**2 / 2
        else:
            assert cell == "repeated"
            assert output.pull_coefficients.shape[:2] == (SIZE.batch, SIZE.batch)
        return output.node_logits

    for got in group.run(share_of):
        torch.testing.assert_close(got.detach(), want)


def one_at_a_time(kernels: EagerKernels, in_use: threading.RLock, rows: list[int]) -> None:
    """Guard the methods by a lock: compilers and Triton's interpreter expect one thread. Notes the rows of `hidden`."""

    def guarded(name: str) -> Callable[..., Any]:
        method = getattr(kernels, name)

        def call(first: Any, *arguments: Any, **options: Any) -> Any:
            if name == "hidden":
                rows.append(len(first))
            with in_use, torch.compiler.set_stance("force_eager"):
                return method(first, *arguments, **options)

        return call

    for name in ("mix", "product_mix", "messages", "product_messages", "hidden", "normalise"):
        setattr(kernels, name, guarded(name))


def run(graph: GraphNetwork, plan: PairPlan | None = None) -> dict[str, Tensor]:
    """Node logits, and every gradient of a function of them and of the coefficients as a generation pass sees them."""
    z, labels = batch_of(SIZE)
    z = z.to(graph.reduction.weight.dtype).requires_grad_()
    plan = class_major_plan(SIZE.num_classes, SIZE.num_samples) if plan is None else plan
    if plan.dense:
        return {n: t for n, t in results(graph, z, labels, dropout_key=KEY, plan=plan).items() if "tracked" not in n}
    output = graph(z, labels, dropout_key=KEY, plan=plan)
    output.node_logits.square().sum().backward()
    found = {"node_logits": output.node_logits, "logits": output.coefficients.logits(), "gradient z": z.grad}
    return {name: value.detach().double() for name, value in found.items()}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """The node logits, coefficients and running statistics; gradients of a tiny random network amplify rounding."""
    found = errors(got, want)
    for name, error in found.items():
        assert torch.isfinite(got[name]).all(), name
        assert error <= (tolerance if not name.startswith("gradient") else 40 * tolerance), (name, error)


@pytest.mark.skipif(INTERPRETED, reason="Triton interprets in this process: its column is tried here")
def test_the_triton_column() -> None:
    pytest.importorskip("triton")
    # A process of its own: Triton reads the setting once, when a kernel is defined.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_cell and triton", __file__]
    found = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    rows = sum(backend == "triton" for _, backend in CELLS)
    assert f"{rows} passed" in found.stdout
