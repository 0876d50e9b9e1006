from functools import reduce
from typing import Any

import pytest

from gcahng.errors import ConfigError
from gcahng.training.config import config_from_mapping
from gcahng.training.config_check import LIMITS
from gcahng.training.config_load import walk_settings
from gcahng.training.config_types import Mismatch, convert, show


def build(**settings: Any) -> Any:
    """A configuration from dotted keys, `__` for the dot."""
    tree: dict[str, Any] = {"data": {"dir": "d"}, "run": {"dir": "r"}}
    for key, value in settings.items():
        *sections, name = key.split("__")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return config_from_mapping(tree)


IMPOSSIBLE = [
    ("seed", -1, "seed (mapping): must lie in [0, 2**63): got -1"),
    ("data__dir", " ", "data.dir (mapping): must not be empty: got ' '"),
    ("data__validation", 1.0, "must lie in [0, 1): got 1.0"),
    ("data__num_workers", -1, "must be at least 0: got -1"),
    ("data__small_classes", "pad", "must be one of repeat, drop: got 'pad'"),
    ("data__on_error", "skp", "must be one of fail, skip (did you mean `skip`?): got 'skp'"),
    ("data__transform__preset", "gca", "must be one of gca_hng, sct_cub"),
    ("data__transform__image_size", 0, "must be at least 1: got 0"),
    ("data__transform__scale", [0.5, 1.2], "two increasing numbers above 0 and at most 1"),
    ("data__transform__ratio", [2, 1], "must be two increasing numbers above 0: got [2.0, 1.0]"),
    ("data__transform__flip", 2, "data.transform.flip (mapping): must lie in [0, 1]: got 2.0"),
    ("data__transform__mean", [0, 0, 128], "must lie in [0, 1] each: got [0.0, 0.0, 128.0]"),
    ("data__transform__std", [0, 1, 1], "must be above 0 each: got [0.0, 1.0, 1.0]"),
    ("data__transform__std", [1, 1], "must be a list of 3 numbers or null: got [1, 1]"),
    ("batch__num_classes", 1, "must be at least 2: got 1"),
    ("batch__num_samples", 1, "must be at least 2: got 1"),
    ("batch__sampler", "random", "must be one of uniform, released, filled, sample, or a dotted path"),
    ("batch__passes", 0, "batch.passes (mapping): must be at least 1: got 0"),
    ("data__cache_dir", "", "data.cache_dir (mapping): must not be empty: got ''"),
    ("data__cache_bytes", -1, "data.cache_bytes (mapping): must be at least 0: got -1"),
    ("data__remote", "stream", "must be one of shards, direct: got 'stream'"),
    ("model__backbone", "", "must not be empty"),
    ("model__weights", "a.bin", "must end in .safetensors, .pth or .pt: got 'a.bin'"),
    ("model__embedding_dim", 0, "must be at least 2: got 0"),
    ("model__head", "mlp", "must be one of bn_linear, linear: got 'mlp'"),
    ("model__head_init", "zero", "must be one of default, orthogonal: got 'zero'"),
    ("model__pretrained", "yes please", "must be true or false: got 'yes please'"),
    ("graph__num_layers", 0, "must be at least 1: got 0"),
    ("graph__backend", "cuda", "must be one of auto, triton, compiled, eager, scatter: got 'cuda'"),
    ("graph__backend", "pairs", "eager, scatter (`pairs` is now called `eager`): got 'pairs'"),
    ("graph__backend", ["pairs"], "must be one of auto, triton, compiled, eager, scatter: got ['pairs']"),
    ("graph__edge_aggregation", "max", "must be one of sum, mean, scaled: got 'max'"),
    ("graph__num_heads", 0, "must be at least 1: got 0"),
    ("graph__dropout", 1, "must lie in [0, 1): got 1.0"),
    ("graph__neighbours", 0, "graph.neighbours (mapping): must be at least 1: got 0"),
    ("graph__norm", "rms", "must be one of gelu_layer_norm, layer_norm: got 'rms'"),
    ("generation__alpha", -1, "must be at least 0: got -1.0"),
    ("generation__beta", float("nan"), "must be finite: got nan"),
    ("generation__weights__diversity", -1, "generation.weights.diversity (mapping): must be at"),
    ("loss__metric", "triplet", "must be one of n_pair, n_pair_plus, proxy_anchor, hn, shn, sct, pml.NAME of"),
    ("loss__miner", "hard", "must be pml.NAME of pytorch-metric-learning, or a dotted path: got 'hard'"),
    ("optim__graph__name", "adam", "optim.graph.name (mapping): must be one of adamw, sgd, or a"),
    ("optim__graph__lr", 0, "must be above 0: got 0.0"),
    ("optim__graph__lr", float("inf"), "must be finite: got inf"),
    ("optim__graph__weight_decay", -1e-4, "must be at least 0: got -0.0001"),
    ("optim__proxies__momentum", 1.0, "must lie in [0, 1): got 1.0"),
    ("optim__graph__schedule__step_size", 0, "must be at least 1: got 0"),
    ("optim__graph__schedule__gamma", 0, "must lie in (0, 1]: got 0.0"),
    ("optim__graph__schedule__milestones", [5, 5], "must be increasing epochs of at least 1"),
    ("optim__clip_value", 0, "must be above 0: got 0.0"),
    ("train__epochs", 0, "must be at least 1: got 0"),
    ("train__warm_up_epochs", -1, "must be at least 0: got -1"),
    ("train__precision", "tf32", "must be one of fp32, bf16, fp16"),
    ("train__resume", "atuo", "must be never, auto, or the path of a checkpoint folder (with"),
    ("train__init_from", "", "must not be empty"),
    ("train__log_every", 0, "must be at least 1: got 0"),
    ("train__keep_last", 0, "must be at least 1: got 0"),
    ("train__max_steps_per_epoch", 0, "must be at least 1: got 0"),
    ("train__device", "gpu", "must be one of auto, cpu, cuda: got 'gpu'"),
    ("eval__every_epochs", 0, "must be at least 1: got 0"),
    ("eval__ks", [], "must be increasing numbers of at least 1: got []"),
    ("eval__ks", [0, 1], "must be increasing numbers of at least 1: got [0, 1]"),
    ("eval__batch_size", 0, "must be at least 1: got 0"),
    ("eval__memory_mb", 0, "must be at least 1: got 0"),
    ("eval__precision_ks", [2, 2], "must be increasing numbers of at least 1: got [2, 2]"),
    ("eval__coarse_ks", [], "must be increasing numbers of at least 1: got []"),
    ("eval__coarse_label", " ", "must not be empty"),
    ("eval__galleries", ["a", "a"], "must be different names: got ['a', 'a']"),
    ("eval__distractor_splits", [""], "must be different names: got ['']"),
    ("eval__distractor_splits", [1], "must be a list of texts: got [1]"),
    ("eval__split", "", "must not be empty"),
    ("run__dir", "", "must not be empty"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), IMPOSSIBLE)
def test_impossible_values_are_refused(key, value, message):
    with pytest.raises(ConfigError) as caught:
        build(**{key: value})
    assert message in str(caught.value)
    assert f"{key.replace('__', '.')} (mapping): " in str(caught.value)


RELATED = [
    (
        {"batch__sampler": "released", "batch__passes": 2},
        "batch.passes (mapping): an epoch of the sampler 'released' does not consist of passes: got 2. Set it to null",
    ),
    ({"batch__passes": 1}, "an epoch of the sampler 'uniform' does not consist of passes: got 1."),
    (
        {"model__embedding_dim": 510},
        "graph.num_heads (default): must divide model.embedding_dim (510): got 4",
    ),
    (
        {"graph__enabled": False, "generation__enabled": False, "graph__neighbours": 5},
        "graph.neighbours (mapping): is about the edges of the graph network, but graph.enabled is false: got 5. "
        "Set it to null.",
    ),
    (
        {"graph__neighbours": 5, "graph__backend": "scatter"},
        "must be null with graph.backend=scatter, which computes every pair: got 5. Set graph.backend=auto.",
    ),
    (
        {"graph__enabled": False},
        "generation.coefficients (default): channel coefficients come from the graph network, but "
        "graph.enabled is false. Set graph.enabled=true, generation.coefficients=single or",
    ),
    (
        {"model__pretrained": True, "model__backbone": "small_conv"},
        "model.pretrained (mapping): small_conv has no published weights.",
    ),
    (
        {"optim__graph__momentum": 0.9},
        "AdamW takes no momentum: got 0.9. Remove it or set optim.graph.name=sgd.",
    ),
    (
        {"optim__classifier__schedule__name": "milestones"},
        "optim.classifier.schedule.milestones (default): must list at least one epoch",
    ),
    (
        {"train__warm_up_epochs": 3, "train__epochs": 2},
        "train.warm_up_epochs (mapping): must not exceed train.epochs (2): got 3.",
    ),
    (
        {"train__precision": "fp16", "train__device": "cpu"},
        "fp16 needs CUDA, but train.device is cpu. Set train.precision=bf16 or fp32.",
    ),
    (
        {"eval__protocol": "query_gallery"},
        "eval.gallery_split (default): must name another split than eval.split",
    ),
    (
        {"eval__protocol": "query_gallery", "eval__split": "q", "eval__gallery_split": "q"},
        "must name another split than eval.split for eval.protocol=query_gallery: got 'q'.",
    ),
    (
        {"eval__gallery_split": "gallery"},
        "eval.protocol=self searches no other split: got 'gallery'. Set it to null",
    ),
    (
        {"eval__protocol": "query_gallery", "eval__gallery_split": "a", "eval__galleries": ["b"]},
        "names one gallery, eval.galleries (['b']) several: got 'a'. Set one of the two to null or [].",
    ),
    (
        {"eval__protocol": "query_gallery", "eval__galleries": ["a", "test"]},
        "eval.galleries (mapping): must name other splits than eval.split: got ['a', 'test'].",
    ),
    ({"eval__galleries": ["a"]}, "eval.galleries (mapping): eval.protocol=self searches no other split: got ['a']."),
    (
        {"eval__distractor_splits": ["train", "test"]},
        "eval.distractor_splits (mapping): must name other splits than those of queries and galleries: got ['train',",
    ),
    (
        {"loss__metric": "n_pair", "batch__num_samples": 3},
        "loss.metric (mapping): the original N-pair loss takes batch.num_samples=2: got 3.",
    ),
    (
        {"loss__miner": "pml.BatchHardMiner"},
        "loss.miner (mapping): chooses pairs for a loss `pml.NAME`, or one of your own that takes an `indices_tuple`: "
        "got 'pml.BatchHardMiner' for loss.metric 'n_pair_plus'. Set it to null, or name such a loss.",
    ),
    (
        {"loss__metric": "pml.NCALoss", "loss__miner_args": {"epsilon": 0.1}},
        "loss.miner_args (mapping): are the arguments of a miner, but loss.miner is null: got {'epsilon': 0.1}. Name a "
        "miner, or set them to {}.",
    ),
    (
        {"loss__metric": "pml.CrossBatchMemory", "loss__args": {"loss": "pml.NCALoss"}, "batch__num_classes": 400},
        "loss.args (mapping): the memory of pml.CrossBatchMemory must hold a batch of 400 x 3 samples: got",
    ),
    (
        {
            "loss__metric": "pml.MultipleLosses",
            "loss__args": {"losses": [{"pml.CrossBatchMemory": {"memory_size": 80}}, {"pml.NCALoss": {}}]},
        },
        "the memory of pml.CrossBatchMemory must hold a batch of 27 x 3 samples",
    ),
    (
        {"data__transform__eval_resize": 100},
        "data.transform (mapping): Transform settings are impossible: `eval_resize` must be at",
    ),
]


@pytest.mark.parametrize(("settings", "message"), RELATED)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError) as caught:
        build(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"graph__enabled": False, "generation__enabled": False, "model__embedding_dim": 510},
        {"graph__enabled": False, "generation__coefficients": "single"},
        {"graph__edge_dropout": "independent", "graph__backend": "scatter"},
        {"graph__edge_dropout": "independent", "graph__backend": "compiled", "graph__edge_aggregation": "scaled"},
        {"graph__edge_dropout": "independent"},
        {"model__pretrained": True, "model__backbone": "small_conv", "model__weights": "w.pth"},
        {"optim__graph__name": "sgd", "optim__graph__momentum": 0.9},
        {"optim__graph__name": "my.optim:Lion", "batch__sampler": "my.samplers.Own"},
        {"batch__sampler": "sample", "batch__passes": 5},
        {"batch__sampler": "filled"},
        {"batch__sampler": "my.samplers.Own", "batch__passes": 2},
        {"data__dir": "s3://bucket/sop", "data__cache_bytes": 0, "data__remote": "direct"},
        {"train__precision": "fp16"},
        {"train__resume": "runs/a/step-5", "train__warm_up_epochs": 100},
        {"eval__protocol": "query_gallery", "eval__split": "q", "eval__gallery_split": "g"},
        {"eval__protocol": "query_gallery", "eval__galleries": ("g", "h"), "eval__distractor_splits": ("train",)},
        {"eval__distractor_splits": ("train",), "eval__coarse_label": "super_class", "eval__precision_ks": (5,)},
        {"loss__metric": "n_pair", "batch__num_samples": 2},
        {"loss__metric": "sct"},
        {"loss__metric": "pml.NCALoss", "loss__miner": "pml.HDCMiner", "loss__miner_args": {"filter_percentage": 0.3}},
        {"loss__metric": "my.losses:Own", "loss__miner": "my.miners:Own"},
        {"loss__metric": "pml.CrossBatchMemory", "loss__args": {"memory_size": 81, "loss": {"pml.NCALoss": None}}},
        {"loss__metric": "pml.CrossBatchMemory"},
        {"seed": 2**63 - 1, "optim__clip_value": None, "data__validation": 0},
    ],
)
def test_sound_settings_pass(settings):
    config = build(**settings)
    for key, value in settings.items():
        assert reduce(getattr, key.split("__"), config) == value


def test_every_limit_guards_a_setting():
    keys = [key.split(".") for key, _, _ in walk_settings()]
    for pattern, _ in LIMITS:
        parts = pattern.split(".")
        assert any(
            len(key) == len(parts) and all(p in ("*", k) for p, k in zip(parts, key, strict=True)) for key in keys
        ), pattern


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (True, int, "a whole number"),
        (1, bool, "true or false"),
        ("3", int, "a whole number"),
        (3.0, int, "a whole number"),
        ("x", float, "a number"),
        (True, float, "a number"),
        (3, str, "text"),
        (None, str, "text"),
        (3, str | None, "text or null"),
        ([1, "a"], tuple[int, ...], "a list of whole numbers"),
        (3, tuple[int, ...], "a list of whole numbers"),
        ({1: 2}, dict[str, Any], "a mapping of names to plain YAML values"),
        ({"a": {3, 4}}, dict[str, Any], "a mapping of names to plain YAML values"),
    ],
)
def test_wrong_types(value, kind, expected):
    with pytest.raises(Mismatch) as caught:
        convert(value, kind)
    assert str(caught.value) == expected


def test_show_writes_values_as_yaml_does():
    assert show([None, True, 1.5, "a"]) == "[null, true, 1.5, 'a']"
