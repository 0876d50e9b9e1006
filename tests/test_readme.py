"""The code of the README and of docs/graph.md runs, and the paths that the README names exist."""

import re
from pathlib import Path
from typing import Any

import torch

from gcahng.generation import synthetic_loss
from gcahng.losses import synthetic_n_pair_loss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loop_runs_and_trains() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    labels = torch.arange(6).repeat(3)[torch.randperm(18)]
    images = torch.randn(18, 3, 32, 32)
    scope: dict[str, object] = {"batches": [(images, labels)] * 3}
    exec(code, scope)
    loss = scope["loss"]
    assert isinstance(loss, torch.Tensor) and torch.isfinite(loss)
    graph = scope["graph"]
    assert isinstance(graph, torch.nn.Module)
    assert all(torch.isfinite(p).all() for p in graph.parameters())
    hard = scope["hard"]
    assert isinstance(hard, torch.Tensor) and hard.shape == (18, 6, 64)


def test_the_loop_of_the_graph_document_runs_and_trains() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "graph.md").read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    labels = torch.arange(6).repeat(3)[torch.randperm(18)]
    images = torch.randn(18, 3, 32, 32)
    scope: dict[str, Any] = {"batches": [(images, labels)] * 3}
    exec(code, scope)
    want = 0.5 * (scope["found"].classification + 10 * scope["found"].similarity + 0.3 * scope["found"].diversity)
    torch.testing.assert_close(scope["found"].total.detach(), want)
    assert torch.isfinite(scope["loss"]) and torch.isfinite(want)
    assert all(torch.isfinite(p).all() for p in [*scope["graph"].parameters(), *scope["model"].parameters()])
    # Its two losses are the dense formulas of the README on the same batch.
    z, synthesis, batch = scope["z"], scope["synthesis"], scope["batch"]
    graph = scope["graph"].eval()
    out = graph(z, labels[batch.order], plan=scope["plan"], coefficient_gradient=False)
    negatives = synthesis.all_at_once(z, out.pull_coefficients)
    torch.testing.assert_close(
        synthetic_loss(z, out.coefficients, synthesis), synthetic_n_pair_loss(z, negatives, labels[batch.order])
    )


def test_the_tree_and_the_commands_name_what_exists() -> None:
    (tree,) = re.findall(r"## Tree\n```\n(.*?)```", README, re.DOTALL)
    for folder in re.findall(r"(?:^|\s)([a-z]+/(?:[a-z]+/)?)(?=\s)", tree):
        assert (ROOT / folder).is_dir(), folder
    for path in re.findall(r"(?<![\w.-])((?:configs|launch|docs|tests|benchmarks|gcahng)/[\w/.]+\.\w+)", README):
        assert (ROOT / path).exists(), path


def test_it_opens_with_the_two_commands() -> None:
    head = "\n".join(README.splitlines()[:12])
    assert "make demo" in head and "make test" in head


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"(?<![A-Z_])[A-Z]{3,}_[A-Z]+", README.replace("OMP_NUM_THREADS", "")) == []
