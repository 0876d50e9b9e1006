"""From a configuration to modules, optimisers, gates and the step's constants."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import ALONE, make_config
from safetensors.torch import save_file
from torch import nn

from gcahng.errors import ConfigError
from gcahng.generation.generated_losses import GeneratorFactors
from gcahng.losses import NPairLoss, NPairPlusLoss, ProxyAnchorLoss
from gcahng.training.config import Config, LossConfig
from gcahng.training.generator_passes import GeneratorSettings
from gcahng.training.metric_losses import build_metric_loss
from gcahng.training.parts import (
    RunParts,
    build_metric_model,
    build_modules,
    build_parts,
    build_step,
    choose_device,
)

CPU = torch.device("cpu")
NUM_CLASSES = 5


def config_of(**overrides: Any) -> Config:
    return make_config(Path("shards"), Path("run"), {k.replace("__", "."): v for k, v in overrides.items()})


def parts_of(config: Config) -> RunParts:
    return build_parts(config, build_modules(config, NUM_CLASSES), CPU)


def test_a_part_exists_where_the_configuration_asks_for_it() -> None:
    always = {"metric_model", "metric_loss"}
    assert build_modules(config_of(), 5).keys() == always | {"graph", "classifier"}
    no_generation = config_of(generation__enabled=False)
    assert build_modules(no_generation, 5).keys() == always | {"graph"}
    baseline = config_of(generation__enabled=False, graph__enabled=False)
    assert build_modules(baseline, 5).keys() == always


def test_settings_reach_the_modules() -> None:
    config = config_of(
        graph__num_layers=2,
        graph__num_heads=4,
        graph__dropout=0.25,
        graph__norm="layer_norm",
        graph__edge_to_node=False,
        graph__backend="eager",
        graph__edge_aggregation="scaled",
        model__head="linear",
        model__pooling="max",
        model__freeze_batch_norm=True,
        model__head_init="orthogonal",
    )
    modules = build_modules(config, NUM_CLASSES)
    graph, model = modules["graph"], modules["metric_model"]
    assert len(graph.node_blocks) == len(graph.edge_blocks) == 2
    assert (graph.embedding_dim, graph.dropout, graph.backend) == (8, 0.25, "eager")
    assert graph.edge_aggregation == "scaled"
    assert graph.node_classifier.weight.shape == (NUM_CLASSES, 8)
    assert not any(block.sums_edges for block in graph.node_blocks)
    assert modules["classifier"].weight.shape == (NUM_CLASSES, 8)
    assert (model.pooling, model.embedding_dim) == ("max", 8)
    assert [name for name, _ in model.head.named_children()] == ["linear"]
    weight = model.head.linear.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), atol=1e-5, rtol=0)
    norms = [m for m in model.train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)


def test_initial_weights_depend_on_the_seed_and_the_part_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = build_modules(config_of(), NUM_CLASSES)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    torch.manual_seed(6)
    smaller = build_modules(config_of(graph__enabled=False, generation__coefficients="single"), NUM_CLASSES)
    other_seed = build_modules(config_of(seed=2), NUM_CLASSES)
    for name, module in smaller.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, whole[name].state_dict()[key])
    for name in ("metric_model", "graph", "classifier"):
        pairs = zip(whole[name].parameters(), other_seed[name].parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)


def test_local_weights_are_loaded_unless_told_not_to(tmp_path) -> None:
    source = build_metric_model(config_of(seed=9).model).backbone.network
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.fill_(0.25)
    save_file(source.state_dict(), tmp_path / "small.safetensors")
    config = config_of(model__weights=str(tmp_path / "small.safetensors"))
    loaded = build_metric_model(config.model).backbone.network
    assert all(bool((p == 0.25).all()) for p in loaded.parameters())
    without = build_metric_model(config.model, load_weights=False).backbone.network
    assert not any(bool((p == 0.25).all()) for p in without.parameters())
    modules = build_modules(config, NUM_CLASSES, load_weights=False)
    assert not any(bool((p == 0.25).all()) for p in modules["metric_model"].backbone.network.parameters())


@pytest.mark.parametrize(
    ("metric", "args", "kind"),
    [
        ("n_pair", {}, NPairLoss),
        ("n_pair_plus", {}, NPairPlusLoss),
        ("proxy_anchor", {"scale": 16.0}, ProxyAnchorLoss),
        ("torch.nn.Identity", {"anything": 1}, nn.Identity),
        ("torch.nn:Linear", {"in_features": 2, "out_features": 3}, nn.Linear),
    ],
)
def test_losses_by_name_and_by_path(metric: str, args: dict[str, Any], kind: type) -> None:
    loss = build_metric_loss(LossConfig(metric=metric, args=args), num_classes=5, embedding_dim=8)
    assert type(loss) is kind
    if isinstance(loss, ProxyAnchorLoss):
        assert loss.scale == 16.0 and loss.margin == 0.1
        assert loss.proxies.shape == (5, 8)


@pytest.mark.parametrize(
    ("metric", "args", "message"),
    [
        ("proxy_anchor", {"scal": 3}, r"`loss.args` do not fit loss.metric `proxy_anchor`: .*scal"),
        ("n_pair_plus", {"margin": 1}, r"`loss.args` do not fit loss.metric `n_pair_plus`"),
        ("collections.Counter", {}, r"`loss.metric` must make a torch.nn.Module: .*made Counter"),
        ("math.pi", {}, r"`loss.metric` must name a class or a function: `math.pi` is no such"),
        ("no_such_module:Loss", {}, r"no module `no_such_module` can be imported"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(metric: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_metric_loss(LossConfig(metric=metric, args=args), num_classes=5, embedding_dim=8)


def test_each_part_has_the_optimiser_of_its_section() -> None:
    config = config_of(
        loss__metric="proxy_anchor",
        optim__metric_model__name="sgd",
        optim__metric_model__momentum=0.5,
        optim__graph__weight_decay=0.125,
    )
    parts = parts_of(config)
    assert parts.optimizers.keys() == parts.schedules.keys() == parts.gates.keys() == parts.modules.keys()
    kinds = {name: type(optimizer).__name__ for name, optimizer in parts.optimizers.items()}
    assert kinds == {
        "metric_model": "SGD",
        "metric_loss": "AdamW",
        "graph": "AdamW",
        "classifier": "AdamW",
    }
    rates = {name: {g["lr"] for g in o.param_groups} for name, o in parts.optimizers.items()}
    assert rates == {"metric_model": {1e-2}, "metric_loss": {1e-2}, "graph": {2e-3}, "classifier": {1e-3}}
    assert {g["weight_decay"] for g in parts.optimizers["graph"].param_groups} == {0.125}
    assert {g["weight_decay"] for g in parts.optimizers["classifier"].param_groups} == {1e-2}
    assert parts.optimizers["metric_model"].param_groups[0]["momentum"] == 0.5
    for name, optimizer in parts.optimizers.items():
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in parts.modules[name].parameters() if p.requires_grad}
    assert all(module.training for module in parts.modules.values())


def test_a_part_without_parameters_has_no_optimiser() -> None:
    assert parts_of(config_of(loss__metric="n_pair_plus")).optimizers.keys() == {
        "metric_model",
        "graph",
        "classifier",
    }


@pytest.mark.parametrize("bound", [10.0, None])
def test_metric_model_and_graph_are_clipped_and_nothing_else(bound: float | None) -> None:
    overrides = {f"optim__{part}__name": "sgd" for part in ("metric_model", "graph", "classifier", "proxies")}
    overrides |= {f"optim__{part}__weight_decay": 0.0 for part in ("metric_model", "graph", "classifier", "proxies")}
    parts = parts_of(config_of(loss__metric="proxy_anchor", optim__clip_value=bound, **overrides))
    for name, optimizer in parts.optimizers.items():
        parts.gates[name].active = "both"
        parameter = optimizer.param_groups[0]["params"][0]
        before = parameter.detach().clone()
        parameter.grad = torch.full_like(parameter, 1000.0)
        optimizer.step()
        clipped = bound is not None and name in ("metric_model", "graph")
        want = before - optimizer.param_groups[0]["lr"] * (10.0 if clipped else 1000.0)
        torch.testing.assert_close(parameter.detach(), want)


def test_factors_reach_the_step() -> None:
    config = config_of(
        seed=11,
        batch__num_samples=3,
        generation__alpha=2.0,
        generation__beta=3.0,
        generation__fusion="pick",
        generation__normalised_distance=True,
        generation__generator={"reconstruction": 8.0, "classification": 9.0, "classify": "embeddings"},
        accumulation__micro_batch=3,
        accumulation__microbatch_statistics=True,
        generation__weights={
            "classifier": 4.0,
            "classification": 5.0,
            "similarity": 6.0,
            "diversity": 7.0,
            "diversity_scale": 0.5,
        },
    )
    parts = parts_of(config)
    settings = build_step(config, parts, ALONE)[0].settings
    assert vars(settings) == {
        "seed": 11,
        "num_samples": 3,
        "generate": True,
        "channel_coefficients": True,
        "fusion": "pick",
        "generator": GeneratorSettings(GeneratorFactors(8.0, 9.0), "embeddings"),
        "alpha": 2.0,
        "beta": 3.0,
        "neighbours": None,
        "normalised_distance": True,
        "classifier_weight": 4.0,
        "classification_weight": 5.0,
        "similarity_weight": 6.0,
        "diversity_weight": 3.5,
        "micro_batch": 3,
        "microbatch_statistics": True,
    }
    single = replace(config, generation=replace(config.generation, coefficients="single", enabled=False))
    settings = build_step(single, parts, ALONE)[0].settings
    assert not settings.generate and not settings.channel_coefficients


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_precision_reaches_the_backend(precision: str, dtype: torch.dtype | None) -> None:
    config = config_of(train__precision=precision)
    assert build_step(config, parts_of(config), ALONE)[1].matmul_dtype is dtype


def test_fp16_needs_cuda() -> None:
    config = config_of(train__precision="fp16", train__device="auto")
    with pytest.raises(ConfigError, match=r"`train.precision` fp16 needs CUDA: the device is cpu"):
        build_step(config, parts_of(config), ALONE)


def test_the_device_is_chosen() -> None:
    assert choose_device("cpu") == CPU
    available = torch.cuda.is_available()
    assert choose_device("auto") == torch.device("cuda" if available else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to use")
def test_a_missing_cuda_device_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"`train.device` is cuda, but torch sees no CUDA device"):
        choose_device("cuda")


def test_the_cosine_ends_with_the_run() -> None:
    parts = parts_of(config_of(train__epochs=4))
    rates = []
    for _ in range(4):
        rates.append(parts.optimizers["graph"].param_groups[0]["lr"])
        for name, optimizer in parts.optimizers.items():
            optimizer.step()
            parts.schedules[name].step()
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])
    assert parts.optimizers["graph"].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
