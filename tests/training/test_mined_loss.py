"""Losses and miners of pytorch-metric-learning: the same numbers as called by hand, state that comes back, faults."""

import inspect
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from maths_cases import generator
from pml_cases import MEMORY, loss_config
from run_cases import make_config
from torch import Tensor, nn

from gcahng.distributed import Ranks
from gcahng.errors import ConfigError, InputError
from gcahng.training import checkpoint
from gcahng.training.config_schema import LossConfig
from gcahng.training.metric_losses import build_metric_loss
from gcahng.training.mined_loss import MinedLoss
from gcahng.training.pml_objects import PACKAGES, _classes
from gcahng.training.preflight import preflight
from gcahng.training.sharded_parts import shard_part

losses = pytest.importorskip("pytorch_metric_learning.losses")
distances = pytest.importorskip("pytorch_metric_learning.distances")
miners = pytest.importorskip("pytorch_metric_learning.miners")
reducers = pytest.importorskip("pytorch_metric_learning.reducers")

N, D = 9, 8
# What the constructors of these demand beside N and D.
ARGS: dict[str, dict[str, Any]] = {
    "RankedListLoss": {"margin": 1.0, "Tn": 1.0},
    "CrossBatchMemory": MEMORY,
    "MultipleLosses": {"losses": ["pml.ContrastiveLoss", {"pml.ArcFaceLoss": {}}], "miners": [None, "pml.HDCMiner"]},
}
# Compares views (no labels), wants one loss function of two matrices, or says that it takes no labels.
NOT_FOR_BATCHES = {"GenericPairLoss", "ManifoldLoss", "SelfSupervisedLoss", "VICRegLoss"}


def build(metric: str, args: Mapping[str, Any] | None = None, miner: str | None = None, **miner_args: Any) -> MinedLoss:
    config = LossConfig(metric=metric, args=dict(args or {}), miner=miner, miner_args=miner_args)
    found = build_metric_loss(config, N, D)
    assert isinstance(found, MinedLoss)
    return found


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = generator(seed)
    labels = torch.randperm(N, generator=draw)[:4].repeat(2)
    return torch.randn(8, D, generator=draw).to(dtype).requires_grad_(), labels


def train(loss: nn.Module, seeds: range) -> list[Tensor]:
    """Losses and gradients of some batches; draws depend on the batch."""
    found = []
    for seed in seeds:
        z, labels = batch(seed)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            warnings.simplefilter("ignore")  # HistogramLoss indexes in a way that torch does not like
            value = loss(z, labels)
        found += [value.detach(), *torch.autograd.grad(value, z)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_miner_are_called_as_by_hand(dtype: torch.dtype) -> None:
    ours = build("pml.MultiSimilarityLoss", {"alpha": 3, "base": 0.4}, "pml.MultiSimilarityMiner", epsilon=0.2)
    z, labels = batch(dtype=dtype)
    chosen = miners.MultiSimilarityMiner(epsilon=0.2)(z, labels)
    assert 0 < len(chosen[2]) < 48
    want = losses.MultiSimilarityLoss(alpha=3, base=0.4)(z, labels, chosen)
    got = ours(z, labels)
    assert got.dtype == dtype and got.shape == ()
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(value, z)[0] for value in (got, want)))
    assert not torch.equal(got, build("pml.MultiSimilarityLoss", {"alpha": 3, "base": 0.4})(z, labels))


def test_low_precision_embeddings_are_compared_in_float32() -> None:
    z, labels = batch()
    got = build("pml.TripletMarginLoss")(z.bfloat16(), labels)
    assert got.dtype == torch.float32
    assert torch.equal(got, losses.TripletMarginLoss()(z.bfloat16().float(), labels))


def test_nested_objects() -> None:
    args = {
        "distance": {"pml.LpDistance": {"normalize_embeddings": False, "p": 1}},
        "reducer": "pml.AvgNonZeroReducer",
        "embedding_regularizer": {"pml.LpRegularizer": None},
        "embedding_reg_weight": 0.3,
    }
    loss = build("pml.ContrastiveLoss", args).loss
    assert isinstance(loss.distance, distances.LpDistance)
    assert (loss.distance.p, loss.distance.normalize_embeddings, loss.embedding_reg_weight) == (1, False, 0.3)
    assert all(isinstance(r, reducers.AvgNonZeroReducer) for r in loss.reducer.reducers.values())
    memory = build("pml.CrossBatchMemory", MEMORY).loss
    assert (type(memory.miner), type(memory.loss)) == (miners.MultiSimilarityMiner, losses.ContrastiveLoss)
    assert memory.embedding_memory.shape == (13, D)
    several = build("pml.MultipleLosses", ARGS["MultipleLosses"] | {"weights": [1, 0.5]}).loss
    assert [type(one).__name__ for one in several.losses] == ["ContrastiveLoss", "ArcFaceLoss"]
    assert several.losses[1].W.shape == (D, N)
    named = build("pml.MultipleLosses", {"losses": {"a": "pml.ContrastiveLoss", "b": "pml.NCALoss"}}).loss
    assert set(named.losses) == {"a", "b"}


@pytest.mark.parametrize(
    ("metric", "args", "shapes"),
    [
        ("ArcFaceLoss", {}, {"loss.W": (D, N)}),
        ("ArcFaceLoss", {"num_classes": 20}, {"loss.W": (D, 20)}),
        ("SubCenterArcFaceLoss", {}, {"loss.W": (D, 3 * N)}),
        ("CosFaceLoss", {"margin": 0.2}, {"loss.W": (D, N)}),
        ("P2SGradLoss", {}, {"loss.weight": (D, N)}),
        ("SoftTripleLoss", {"centers_per_class": 2}, {"loss.fc": (D, 2 * N)}),
        # One margin for all classes unless the user says so.
        ("MarginLoss", {"learn_beta": True}, {"loss.beta": (1,)}),
        ("MarginLoss", {"learn_beta": True, "num_classes": N}, {"loss.beta": (N,)}),
        ("TripletMarginLoss", {}, {}),
    ],
)
def test_class_count_and_width_are_filled_in(metric: str, args: dict[str, Any], shapes: dict[str, Any]) -> None:
    assert {n: tuple(p.shape) for n, p in build(f"pml.{metric}", args).named_parameters()} == shapes


def test_what_is_known_of_a_batch_is_reported() -> None:
    config = loss_config("pml_cases:CloseToItsClass", "pml_cases:FirstOfOthers")
    loss = build_metric_loss(config, N, D)
    assert loss.measured == {}
    loss(*batch())
    assert loss.measured["num_triplets"].item() == 16
    assert build("pml.NCALoss").measured == {}


def test_initial_weights_do_not_depend_on_the_trial() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ours = build("pml.ProxyAnchorLoss").loss.proxies
        after = torch.rand(1)
        torch.manual_seed(3)
        theirs = losses.ProxyAnchorLoss(N, D).proxies
        assert torch.equal(ours, theirs)
        assert torch.equal(after, torch.rand(1))


LOSS_NAMES = sorted(set(_classes("losses", "")) - NOT_FOR_BATCHES)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_every_loss_comes_back_from_a_checkpoint(name: str, tmp_path) -> None:
    """After three batches a fresh object with the saved state goes on bit for bit: nothing that counts is left out."""
    args = ARGS.get(name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, fresh = build(f"pml.{name}", args), build(f"pml.{name}", args)
    train(loss, range(3))
    checkpoint._write_parts(tmp_path, {"metric_loss": loss.state_dict()}, {})
    checkpoint.load_module(fresh, tmp_path, "metric_loss")
    for got, want in zip(train(fresh, range(3, 5)), train(loss, range(3, 5)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", sorted(set(_classes("miners", "")) - {"EmbeddingsAlreadyPackagedAsTriplets"}))
def test_every_miner_chooses_for_a_batch_and_keeps_nothing(name: str) -> None:
    loss = build("pml.ContrastiveLoss", {}, f"pml.{name}")
    train(loss, range(2))
    fresh = build("pml.ContrastiveLoss", {}, f"pml.{name}")
    assert all(map(torch.equal, train(fresh, range(2, 4)), train(loss, range(2, 4))))


def test_half_a_memory_is_not_taken() -> None:
    """`train.init_from` leaves out what has another shape: the position in a queue goes with its rows."""
    loss, other = build("pml.CrossBatchMemory", MEMORY), build("pml.CrossBatchMemory", MEMORY | {"memory_size": 20})
    train(loss, range(2))
    state = {name: value for name, value in loss.state_dict().items() if "memory" not in name}
    assert set(state) == {"loss.queue_idx", "loss.has_been_filled"}
    other.load_state_dict(state, strict=False)
    assert (other.loss.queue_idx, other.loss.has_been_filled) == (0, False)
    with pytest.raises(RuntimeError, match=r"Missing key.*queue_idx"):
        loss.load_state_dict({n: v for n, v in loss.state_dict().items() if n != "loss.queue_idx"})


# (settings of `loss`, what the message says)
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown loss": (
        {"metric": "pml.TripletMargin"},
        "no `TripletMargin` among its losses. Did you mean `pml.TripletM",
    ),
    "far from all": ({"metric": "pml.X"}, "no `X` among its losses. It has AngularLoss, ArcFaceLoss, "),
    "a base class": ({"metric": "pml.BaseMetricLossFunction"}, "no `BaseMetricLossFunction` among its losses"),
    "a miner for a loss": ({"metric": "pml.HDCMiner"}, "It is one of its miners: name one of its losses."),
    "unknown miner": ({"miner": "pml.HardMiner"}, "no `HardMiner` among its miners. Did you mean `pml.BatchHardMiner`"),
    "unfit miner": ({"miner": "pml.EmbeddingsAlreadyPackagedAsTriplets"}, "a batch is group-major"),
    "wrapper": ({"metric": "pml.DistributedLossWrapper"}, "the batch is gathered from all ranks already"),
    "argument": ({"args": {"margn": 1}}, "`loss.args`: pml.TripletMarginLoss has no argument `margn`; did you mean `m"),
    "no such argument": ({"metric": "pml.NCALoss", "args": {"zzz": 1}}, "no argument `zzz`; it takes softmax_scale, "),
    "missing argument": ({"metric": "pml.RankedListLoss"}, "do not fit pml.RankedListLoss: TypeError: "),
    "miner's argument": (
        {"miner": "pml.TripletMarginMiner", "miner_args": {"kind": 1}},
        "`loss.miner_args`: pml.TripletMarginMiner has no argument `kind`",
    ),
    "nested argument": (
        {"args": {"distance": {"pml.LpDistance": {"pp": 1}}}},
        "`loss.args.distance.pml.LpDistance`: pml.LpDistance has no argument `pp`; did you mean `p`?",
    ),
    "nested name": ({"args": {"distance": "pml.LDistance"}}, "among its losses, miners, distances, reducers, regula"),
    "two objects": (
        {"args": {"distance": {"pml.LpDistance": {}, "p": 1}}},
        "`loss.args.distance`: an object is a mapping with its name as the only key: got the keys pml.LpDistance, p.",
    ),
    "nested arguments": ({"args": {"distance": {"pml.LpDistance": 2}}}, "of pml.LpDistance must be a mapping: got 2."),
    "refused": (
        {"metric": "pml.CrossBatchMemory", "args": {"loss": "pml.ArcFaceLoss"}},
        "not supported for ArcFaceLoss",
    ),
    "too few classes": (
        {"metric": "pml.ArcFaceLoss", "args": {"num_classes": 5}},
        "at least the number of training cl",
    ),
    "another width": ({"metric": "pml.ArcFaceLoss", "args": {"embedding_size": 5}}, "4 classes x 3 samples it raised"),
    "no labels": ({"metric": "pml.VICRegLoss"}, "pml.VICRegLoss cannot be used: on random embeddings of 4 classes x 3"),
    "two views": (
        {"metric": "pml.SelfSupervisedLoss", "args": {"loss": "pml.NCALoss"}},
        "compares (embeddings, ref_emb): expected a loss of (embeddings, labels)",
    ),
    "no sum": ({"args": {"reducer": "pml.DoNothingReducer"}}, "must return one number for a batch: got dict"),
    "takes no choice": ({"metric": "pml.InstanceLoss", "miner": "pml.HDCMiner"}, "with loss.miner pml.HDCMiner cannot"),
    "rows of a memory": (
        {"metric": "pml.CrossBatchMemory", "args": MEMORY, "miner": "pml.HDCMiner"},
        "give it the miner as its argument, miner: {pml.HDCMiner: {}}",
    ),
    "own loss": (
        {"metric": "own_row_losses:OwnCentres", "args": {"dim": D, "ranks": None}, "miner": "pml.HDCMiner"},
        "expected an `indices_tuple` among them",
    ),
    "own miner": ({"miner": "pml_cases:FirstOfOthers", "miner_args": {"n": 1}}, "`loss.miner_args` do not fit loss.mi"),
    "no function": ({"miner": "fractions:Fraction"}, "`fractions:Fraction` made Fraction."),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_when_a_run_starts(name: str) -> None:
    settings, message = FAULTS[name]
    if name == "own loss":
        settings = settings | {"args": {"dim": D, "ranks": Ranks(0, 1)}}
    with pytest.raises(ConfigError) as caught:
        build_metric_loss(LossConfig(**{"metric": "pml.TripletMarginLoss"} | settings), N, D)
    text = str(caught.value)
    assert message in text
    assert text.endswith((".", "?")) and ".." not in text


@pytest.mark.parametrize("size", [4, 6, 8, 10])
def test_a_memory_may_be_as_small_as_a_batch(size: int) -> None:
    """The batch on which losses are tried is no larger, and finds what does not fit all the same."""
    loss = build("pml.CrossBatchMemory", MEMORY | {"memory_size": size})
    assert loss.loss.embedding_memory.shape == (size, D)
    with pytest.raises(ConfigError, match=rf"{size // 2 if size < 8 else 4} classes x 2 samples it raised \w+: "):
        build("pml.CrossBatchMemory", MEMORY | {"memory_size": size, "embedding_size": 5})


def test_few_classes_and_arguments_for_each_class() -> None:
    three = LossConfig(metric="pml.ArcFaceLoss", args={"num_classes": 3})
    assert build_metric_loss(three, 3, D).loss.W.shape == (D, 3)  # type: ignore[union-attr]
    args = {"weights": [1.0] * N}
    config = LossConfig(metric="pml_cases:ClassWeights", args=args, miner="pml_cases:FirstOfOthers")
    assert build_metric_loss(config, N, D)(*batch()).isfinite()


def test_an_error_without_words_is_named() -> None:
    config = LossConfig(metric="pml_cases:Speechless", miner="pml.HDCMiner")
    with pytest.raises(ConfigError, match=r"it raised AssertionError\. Change loss\.args"):
        build_metric_loss(config, N, D)


def test_names_are_looked_up_before_anything_loads(shards, tmp_path) -> None:
    settings = {"loss.metric": "pml.TripletLoss", "loss.miner": "pml_cases:FirstOfOther", "data.dir": "nowhere"}
    with pytest.raises(
        ConfigError, match=r"(?s)3 things are missing.*nowhere.*among its losses. Did you mean `pml.*`FirstOfOther`"
    ):
        preflight(make_config(shards, tmp_path / "run", settings))
    preflight(make_config(shards, tmp_path / "run", {"loss.metric": "pml.NCALoss", "loss.miner": "pml.HDCMiner"}))


def test_the_package_is_needed_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch, shards, tmp_path) -> None:
    for module in [name for name in sys.modules if name.startswith("pytorch_metric_learning")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    preflight(make_config(shards, tmp_path / "run"))
    for settings in ({"loss.metric": "pml.NCALoss"}, {"loss.metric": "pml.NCALoss", "loss.miner": "pml.HDCMiner"}):
        with pytest.raises(
            ConfigError, match=r"`loss.metric` .* no module `.*`. Install it: pip install 'gcahng\[pml\]'"
        ):
            preflight(make_config(shards, tmp_path / "run", settings))


def test_no_name_is_in_two_packages() -> None:
    names = [name for package in PACKAGES for name in _classes(package, "")]
    assert len(names) == len(set(names)) > 60
    assert all(not inspect.isabstract(kind) for kind in _classes("losses", "").values())


def test_rows_of_other_libraries_are_not_spread_over_ranks() -> None:
    with pytest.raises(ConfigError, match=r"cannot spread the parameters of loss.metric pml.ArcFaceLoss over ranks"):
        shard_part("metric_loss", build("pml.ArcFaceLoss"), Ranks(0, 2))
    without = build("pml.NCALoss")
    assert shard_part("metric_loss", without, Ranks(0, 2)) == {"metric_loss": without}


def test_a_loss_that_gives_several_numbers_is_refused_in_training() -> None:
    with pytest.raises(InputError, match=r"Several must return one number for a batch: got shape \(8,\)"):
        MinedLoss(Several())(*batch())


class Several(nn.Module):
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return embeddings.sum(1)
