"""Steps with a generator: losses, gradients and moves of one step against dense formulas, for each kind of feature."""

import copy
import math
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from exact_cases import Outcome, errors_by_kind, run_case, too_large
from generator_cases import GeneratorCase, small_embedder
from host_waits import noted
from maths_cases import OWN_PATHS, errors
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.generation import generate_negatives
from gcahng.generation.generator import FeatureGenerator
from gcahng.losses import NPairPlusLoss
from gcahng.losses.synthetic import synthetic_n_pair_loss
from gcahng.models import Embedder
from gcahng.random import mixing_weights
from gcahng.training import generator_passes
from gcahng.training import step as step_module
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import PlainBackend
from gcahng.training.config_schema import OptimizerConfig
from gcahng.training.finite_checks import NotFinite
from gcahng.training.optimizers import build_optimizer
from gcahng.training.step import TrainingStep

CASES = {
    "average": GeneratorCase(steps=1, num_samples=3),
    "maximum": GeneratorCase(steps=1, pooling="max"),
    "average + maximum": GeneratorCase(steps=1, pooling="avg+max", head="linear"),
    "class token": GeneratorCase(steps=1, pooling="cls"),
    "class token, embeddings": GeneratorCase(steps=1, pooling="cls", classify="embeddings"),
}


def as_batch(norm: nn.Module, rows: Tensor, batch: Tensor) -> Tensor:
    """`rows` through a BatchNorm with the statistics of `batch`."""
    mean, variance = batch.mean(0), batch.var(0, correction=0)
    return (rows - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def generated(generator: FeatureGenerator, z: Tensor, rows: Tensor) -> Tensor:
    """The one hidden layer of the cases, written out."""
    (linear,), (norm,) = generator.hidden, generator.norms
    return generator.last(as_batch(norm, F.relu(linear(rows)), F.relu(linear(z))))


def head_of(model: Embedder, features: Tensor, rows: Tensor) -> Tensor:
    rows = as_batch(model.head.norm, rows, features) if hasattr(model.head, "norm") else rows
    return model.head.linear(rows)


def pulled(case: GeneratorCase, z: Tensor, phase: str) -> Tensor:
    """(B, P, D) interpolated embeddings of the first step, whose averages are those of `run_case`."""
    labels = torch.arange(case.num_classes).repeat(case.num_samples)
    weights = mixing_weights(case.num_samples, seed=case.seed, step=0, phase=phase, dtype=z.dtype)
    return generate_negatives(z, labels, None, alpha=2.0, mean_metric_loss=3.0, weights=weights)


def expected(case: GeneratorCase, after: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Losses and gradients of the first step; `after` are its classifier and metric model, as they have moved."""
    parts = case.modules()
    model, generator = parts["metric_model"], parts["generator"]
    assert isinstance(model, Embedder) and isinstance(generator, FeatureGenerator)
    images, labels = case.batch(0)
    features = model.features(images)
    z = model.embed_features(features)
    found = {"metric_loss": NPairPlusLoss()(z, labels)}
    negatives = pulled(case, z, "metric")
    made = head_of(model, features, generated(generator, z, negatives.flatten(0, 1)))
    found["synthetic_loss"] = synthetic_n_pair_loss(z, made.view_as(negatives))
    total = found["metric_loss"] + (1 - math.exp(-5.0 / 10.0)) * found["synthetic_loss"]
    found["total_loss"] = total
    slopes = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    named = zip(model.named_parameters(), slopes, strict=True)
    found |= {f"gradient:metric_model | {name}": g for (name, _), g in named if g is not None}

    z, features = z.detach(), features.detach()
    classifier = parts["classifier"]
    logits = F.linear(z if case.classify == "embeddings" else features, classifier.weight, classifier.bias)
    found["classifier_loss"] = 10 * F.cross_entropy(logits, labels)
    slopes = torch.autograd.grad(found["classifier_loss"], list(classifier.parameters()))
    named = zip(classifier.named_parameters(), slopes, strict=True)
    found |= {f"gradient:classifier | {name}": g for (name, _), g in named}

    negatives = pulled(case, z, "generation")
    rebuilt = generated(generator, z, z)
    made = generated(generator, z, negatives.flatten(0, 1))
    found["reconstruction_loss"] = (rebuilt - features).square().sum() / case.num_samples / case.num_classes
    if case.classify == "embeddings":
        model.load_state_dict(after["metric_model"], strict=False)
        rebuilt, made = head_of(model, features, rebuilt), head_of(model, features, made)
    judged = partial(F.linear, weight=after["classifier"]["weight"], bias=after["classifier"]["bias"])
    wanted = labels[: case.num_classes].repeat(z.shape[0])
    found["classification_loss"] = F.cross_entropy(judged(made), wanted) + F.cross_entropy(judged(rebuilt), labels)
    found["generation_loss"] = 0.5 * found["reconstruction_loss"] + 2.0 * found["classification_loss"]
    slopes = torch.autograd.grad(found["generation_loss"], list(generator.parameters()))
    named = zip(generator.named_parameters(), slopes, strict=True)
    return found | {f"gradient:generator | {name}": g for (name, _), g in named}


def quantities(outcome: Outcome) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Losses and gradients of the first step by short names, and the parameters behind it by part."""
    losses: dict[str, Tensor] = {}
    after: dict[str, dict[str, Tensor]] = {}
    for key, value in outcome.by_name().items():
        family, name = key.split(" | ")
        if family.startswith("loss"):
            losses[name] = value
        elif family.startswith("gradient"):
            losses[f"{family.split()[0]} | {name}"] = value
        elif family.startswith("parameter"):
            after.setdefault(family.removeprefix("parameter:"), {})[name] = value
    return losses, after


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_equals_the_dense_formulas(case: GeneratorCase) -> None:
    found, flat = quantities(run_case(case))
    shapes = {part: dict(module.named_parameters()) for part, module in case.modules().items()}
    after = {part: {k: v.view_as(shapes[part][k]) for k, v in values.items()} for part, values in flat.items()}
    want = expected(case, after)
    assert want.keys() <= found.keys()
    assert found.keys() - want.keys() == {"synthetic_weight", "pull_factor"}
    got = {key: found[key].view(value.shape) for key, value in want.items()}
    off = {name: error for name, error in errors(got, want).items() if error > OWN_PATHS}
    assert off == {}
    # The head gets gradient from both its uses, and the generator none in the metric pass.
    moved = {key.split(" | ")[0] for key in found if key.startswith("gradient")}
    assert moved == {"gradient:metric_model", "gradient:classifier", "gradient:generator"}


@pytest.mark.parametrize("classify", ["features", "embeddings"])
def test_running_statistics_are_those_of_the_real_pass_alone(classify: str) -> None:
    case = GeneratorCase(steps=2, classify=classify)
    got = {k: v for k, v in run_case(case).by_name().items() if k.startswith("buffer:metric_model")}
    model = small_embedder(case.dim).double()
    other = copy.deepcopy(model)
    model(case.batch(0)[0])
    first = model.head.norm.running_mean.clone()
    assert not torch.equal(first, other.head.norm.running_mean)
    one_step = run_case(replace(case, steps=1)).by_name()
    for name, buffer in model.named_buffers():
        assert torch.equal(one_step[f"buffer:metric_model {name} | {name}"], buffer.double().reshape(-1)), name
    assert got.keys() == {k for k in one_step if k.startswith("buffer:metric_model")}


def test_micro_batches_give_the_numbers_of_the_whole() -> None:
    """The features have gradient from two uses, the head and its statistics over synthetic features."""
    case = GeneratorCase(steps=2, pooling="cls", num_samples=3)
    want = run_case(case)
    assert too_large(errors_by_kind(run_case(replace(case, micro_batch=5)), want), OWN_PATHS) == {}


def test_numbers_that_are_not_finite_stop_the_generator() -> None:
    case = GeneratorCase(steps=1)

    def spoil(step: object, number: int) -> None:
        with torch.no_grad():
            step.backend.module("generator").last.bias.fill_(math.inf)  # type: ignore[attr-defined]

    with pytest.raises(NotFinite, match="metric"):
        run_case(case, before_step=spoil)


def test_in_bf16_the_losses_of_generated_rows_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """J_gen is of the order of 1e4. Autocast reaches the metric model and the classifier's own training alone."""
    low: dict[str, bool] = {}

    def note(where: ModuleType, name: str) -> None:
        function = getattr(where, name)

        def noting(*arguments: Any, **options: Any) -> Any:
            low[name] = torch.is_autocast_enabled("cpu")
            return function(*arguments, **options)

        monkeypatch.setattr(where, name, noting)

    for name in ("embed_with_features", "generated_synthetic_loss", "generator_loss"):
        note(generator_passes, name)
    note(step_module, "class_loss")
    run_case(
        GeneratorCase(dtype=torch.float32, steps=1),
        make_backend=lambda modules, optimizers, gates, *_: PlainBackend(modules, optimizers, gates, precision="bf16"),
    )
    wanted = {"embed_with_features": True, "class_loss": True}
    assert low == wanted | {"generated_synthetic_loss": False, "generator_loss": False}


def test_a_step_never_waits_for_the_device() -> None:
    case = GeneratorCase(deferred=True)
    modules = case.modules()
    optimizers, gates = {}, {}
    for name, module in modules.items():
        if any(True for _ in module.parameters()):
            optimizers[name], gates[name] = build_optimizer(module, OptimizerConfig(lr=1e-3), fused=True)
    step = TrainingStep(PlainBackend(modules, optimizers, gates, deferred_checks=True), case.settings())
    step(*case.batch(0), EpochAverages(), step=0)
    images, labels = case.batch(1)
    with noted() as waits:
        step(images, labels, EpochAverages(), step=1)
    assert waits == []
