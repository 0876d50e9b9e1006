"""What of sharded classes one process can show: what is refused, what is kept in memory, what the graph gives."""

from typing import Any

import pytest
import torch
from class_shard_cases import backend_of, batch, part_of
from host_waits import noted
from maths_cases import OWN_PATHS, assert_close, batch_of, generator, graph_of
from step_cases import SIZE, Case, averages_of
from tensor_watch import TensorWatch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.distributed import ONE, Ranks, class_shards
from gcahng.distributed.class_shards import ShardedLinear
from gcahng.distributed.shard_states import (
    check_by_entry,
    is_sharded,
    load_whole_optimizer_state,
)
from gcahng.errors import ConfigError, InputError
from gcahng.losses import NPairLoss, ProxyAnchorLoss, proxy_anchor
from gcahng.training.optimizers import parameter_groups
from gcahng.training.sharded_parts import ShardedProxyAnchorLoss, shard_part


class OwnLoss(ProxyAnchorLoss):
    """A user's own."""


def test_rows_are_slices_of_the_same_start() -> None:
    for size in (1, 2, 3, 4):
        parts = [ShardedLinear(nn.Linear(3, 10), Ranks(rank, size)) for rank in range(size)]
        sizes = [part.weight.shape[0] for part in parts]
        assert sum(sizes) == 10
        assert max(sizes) - min(sizes) <= 1
        assert [(part.rows.start, part.rows.stop) for part in parts] == [
            (sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(size)
        ]
    layer = nn.Linear(3, 10)
    parts = [ShardedLinear(layer, Ranks(rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat([part.weight for part in parts]), layer.weight)
    assert torch.equal(torch.cat([part.bias for part in parts if part.bias is not None]), layer.bias)
    # Nothing of the other ranks' rows is kept alive.
    assert all(part.weight.untyped_storage().nbytes() == part.weight.numel() * 4 for part in parts)
    assert all(part.own_rows and is_sharded(part) for part in parts)


def test_gradients_of_own_rows_are_divided() -> None:
    shard = ShardedLinear(nn.Linear(3, 10), Ranks(1, 3))
    shard.own(shard.weight).sum().backward()
    assert torch.equal(shard.weight.grad, torch.full_like(shard.weight, 1 / 3))


def test_whether_an_optimizer_is_fused_stays() -> None:
    layer, settings = nn.Linear(3, 10), {"lr": 0.1, "weight_decay": 0.0}
    shard = ShardedLinear(layer, Ranks(1, 3))
    saved = torch.optim.AdamW(layer.parameters(), **settings, fused=False)
    layer(torch.ones(1, 3)).sum().backward()
    saved.step()
    own = torch.optim.AdamW(shard.parameters(), lr=0.2, fused=True)
    load_whole_optimizer_state(shard, own, saved.state_dict())
    assert own.param_groups[0]["fused"]
    assert own.param_groups[0]["lr"] == 0.1
    for parameter, whole in zip(shard.parameters(), layer.parameters(), strict=True):
        assert torch.equal(own.state[parameter]["exp_avg"], saved.state[whole]["exp_avg"][shard.rows])
        assert int(own.state[parameter]["step"]) == 1


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a training class for every rank: expected 4 or more, got 3"):
        ShardedLinear(nn.Linear(2, 3), Ranks(0, 4))
    with pytest.raises(ConfigError, match=r"loss\.metric OwnLoss over ranks: expected proxy_anchor"):
        shard_part("metric_loss", OwnLoss(5, 3), ONE)
    loss = NPairLoss()
    assert shard_part("metric_loss", loss, ONE) == {"metric_loss": loss}
    model = nn.Linear(3, 3)
    assert shard_part("metric_model", model, ONE) == {"metric_model": model}


def test_optimizers_that_mix_entries_are_refused() -> None:
    rows = [nn.Parameter(torch.zeros(3, 2))]
    check_by_entry("classifier", torch.optim.AdamW(rows))
    check_by_entry("classifier", torch.optim.SGD(rows, lr=0.1))
    with pytest.raises(ConfigError, match="cannot spread part `classifier` over ranks: its optimiser Adafactor"):
        check_by_entry("classifier", torch.optim.Adafactor(rows))


def test_arguments_that_do_not_fit() -> None:
    (shard,) = shard_part("classifier", part_of("linear"), ONE).values()
    z, labels = batch()
    with pytest.raises(InputError, match=r"must lie in \[0, 11\), the classifier's outputs: got 11 to 11"):
        shard(z, torch.full_like(labels, 11))
    with pytest.raises(InputError, match=r"`features` must have shape \(B, D\) with D = 6: got \(9, 5\)"):
        shard(z[:, :5], labels)
    with pytest.raises(InputError, match="`labels` must have one entry per embedding"):
        shard(z, labels[1:])
    (proxies,) = shard_part("metric_loss", part_of("proxies"), ONE).values()
    with pytest.raises(InputError, match="`candidates` must be None"):
        proxies(z, labels, z, labels)
    with pytest.raises(InputError, match=r"must lie in \[0, 11\), one proxy each: got -1 to -1"):
        proxies(z, torch.full_like(labels, -1))


def test_labels_of_any_integer_width() -> None:
    z, labels = batch()
    for kind, name in (("linear", "classifier"), ("proxies", "metric_loss")):
        (shard,) = shard_part(name, part_of(kind), ONE).values()
        assert torch.equal(shard(z, labels.to(torch.int32)), shard(z, labels))


@pytest.mark.parametrize("kind", ["linear", "proxies"])
def test_no_logits_of_all_classes(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    classes, size, dim = 640, 32, 8
    monkeypatch.setitem(class_shards.LOGIT_BYTES, "cpu", size * 64 * 8)
    monkeypatch.setattr(proxy_anchor, "SIMILARITY_BYTES", size * 64 * 8)
    z = torch.randn(size, dim, generator=generator(0), dtype=torch.float64, requires_grad=True)
    labels = torch.arange(size) * 20
    whole = ProxyAnchorLoss(classes, dim) if kind == "proxies" else nn.Linear(dim, classes)
    (shard,) = shard_part("metric_loss" if kind == "proxies" else "classifier", whole.double(), ONE).values()
    with TensorWatch() as watch:
        shard(z, labels).backward()
    assert watch.with_axes([classes])
    assert not watch.with_axes([size, classes])
    # One slice of logits, or the rows themselves.
    assert watch.largest <= max((size + 1) * 64, classes * dim)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_logits(scale: float) -> None:
    whole = part_of("linear")
    (shard,) = shard_part("classifier", whole, ONE).values()
    z, labels = batch()
    got, want = (z.clone().mul_(scale).requires_grad_() for _ in range(2))
    loss, expected = shard(got, labels), F.cross_entropy(whole(want), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*torch.autograd.grad(loss, [got]), *torch.autograd.grad(expected, [want]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_show(bad: float) -> None:
    for kind, name in (("linear", "classifier"), ("proxies", "metric_loss")):
        (shard,) = shard_part(name, part_of(kind), ONE).values()
        with torch.no_grad():
            next(shard.parameters())[2, 1] = bad
        assert not torch.isfinite(shard(*batch()))


def test_products_in_the_dtype_of_autocast() -> None:
    draw = generator(1)
    layer = nn.Linear(16, 50)
    z, labels = torch.randn(300, 16, generator=draw), torch.randint(50, (300,), generator=draw)
    (shard,) = shard_part("classifier", layer, ONE).values()
    z.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = shard(z, labels)
    low = [t.detach().bfloat16().float() for t in (z, layer.weight)]
    want = F.cross_entropy((low[0] @ low[1].T).bfloat16().float() + layer.bias, labels)
    exact = F.cross_entropy(layer(z), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    (got,), (expected,) = torch.autograd.grad(loss, [z]), torch.autograd.grad(exact, [z])
    largest = float(expected.abs().max())
    # Rounded operands: some thousandths off, not millionths.
    assert 1e-4 * largest < float((got - expected).abs().max()) < 0.02 * largest


def test_slices_of_proxies_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> dict[str, Tensor]:
        loss = part_of("proxies")
        z, labels = batch()
        value = loss(z.requires_grad_(), labels)
        by_z, by_proxies = torch.autograd.grad(value, [z, *loss.parameters()])
        return {"loss": value, "z": by_z, "proxies": by_proxies}

    whole = run()
    monkeypatch.setattr(proxy_anchor, "SIMILARITY_BYTES", 4 * 9 * 8)
    assert_close(run(), whole, OWN_PATHS)


def test_a_graph_whose_node_classifier_is_taken() -> None:
    z, labels = batch_of(SIZE)
    whole, graph = graph_of(SIZE), graph_of(SIZE)
    classifier = graph.take_node_classifier()
    want = whole(z, labels, dropout_key=3)
    got = graph(z, labels, dropout_key=3)
    assert whole.classifies_nodes
    assert not graph.classifies_nodes
    assert torch.equal(classifier(got.node_features), want.node_logits)
    assert torch.equal(got.pull_coefficients, want.pull_coefficients)
    with pytest.raises(InputError, match="no node classifier: who took it scores `node_features`"):
        _ = got.node_logits
    taken = {"node_classifier.weight", "node_classifier.bias"}
    assert whole.state_dict().keys() - graph.state_dict().keys() == taken
    groups: list[dict[str, Any]] = parameter_groups(graph)
    assert [group["reach"] for group in groups] == ["both", "metric", "generation"]
    assert [p.shape for p in groups[1]["params"]] == [graph.node_norm.weight.shape]
    # Checkpoints rely on this order.
    of_whole = parameter_groups(whole)[1]["params"]
    assert of_whole[-2:] == [whole.node_classifier.weight, whole.node_classifier.bias]


def test_a_step_waits_for_nothing() -> None:
    case = Case(proxies=True, deferred=True, fused=True, dtype=torch.float32)
    backend = backend_of(case, ONE, sharded=True)
    step = case.step_on(backend)
    images, labels = case.images()
    step(images, labels, averages_of(), step=0)
    with noted() as waits:
        step(images, labels, averages_of(), step=1)
    assert waits == []
    assert isinstance(backend.modules["metric_loss"], ShardedProxyAnchorLoss)
