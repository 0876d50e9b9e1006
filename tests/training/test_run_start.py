"""What a run begins with."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import make_config
from torch import nn

from gcahng.distributed import Ranks
from gcahng.training import run_start
from gcahng.training.run_start import make_parts, weight_digest

NUM_CLASSES = 21  # no other size


def test_no_two_parts_have_all_their_classes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With class shards a rank lets the rows of others go before it makes the next part."""
    whole: list[Any] = []
    alive: list[int] = []
    makers = run_start.module_makers

    def count() -> None:
        alive.append(sum(parameter() is not None for parameter in whole))

    def watched(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            count()
            module = make()
            whole.extend(weakref.ref(p) for p in module.parameters() if p.shape[:1] == (NUM_CLASSES,))
            return module

        return made

    def watched_makers(*arguments: Any, **options: Any) -> dict[str, Callable[[], nn.Module]]:
        return {name: watched(make) for name, make in makers(*arguments, **options).items()}

    settings = {"loss.metric": "proxy_anchor", "distributed.shard_classes": True, "distributed.batch_norm": "local"}
    config = make_config(Path("shards"), Path("run"), settings)
    monkeypatch.setattr(run_start, "module_makers", watched_makers)
    modules, weights = make_parts(config, {"num_classes": NUM_CLASSES, "classes": ""}, None, Ranks(1, 2))
    count()

    assert len(whole) == 5  # proxies, and weight and bias of two classifiers
    assert alive == [0] * len(alive) and len(alive) == 5
    for name in ("metric_loss", "classifier", "node_classifier"):
        assert {p.shape[0] for p in modules[name].parameters()} == {NUM_CLASSES // 2}
    assert weights.keys() == {"metric_model", "metric_loss", "graph", "classifier"}


def test_a_checksum_tells_weights_apart() -> None:
    layer = nn.Linear(3, 2)
    before = weight_digest(layer)
    assert weight_digest(layer) == before
    with torch.no_grad():
        layer.bias[1] = torch.nextafter(layer.bias[1], torch.tensor(torch.inf))
    assert weight_digest(layer) != before
