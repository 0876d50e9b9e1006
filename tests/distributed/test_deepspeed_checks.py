"""What DeepSpeed must not be told ends in one clear error before anything is trained."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launched_here import small_config
from torch import nn

from gcahng.errors import ConfigError
from gcahng.training.deepspeed_checks import (
    BUCKET_ELEMENTS,
    check_engine,
    check_precision,
    check_settings,
    check_trained,
    deepspeed_plugin,
    filled,
    launcher_settings,
)
from gcahng.training.deepspeed_state import MAPPING_NEEDS, OPTIMIZER_NEEDS, Layout, check_zero_optimizer

GOOD: dict[str, Any] = {"gradient_clipping": 0.0, "zero_optimization": {"stage": 2}}


def with_zero(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **values}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clipping": 0},
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": "auto"},
        {"fp16": {"enabled": False}, "bf16": {"enabled": False}},
        {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "steps_per_print": 10},
        {"optimizer": None, "communication_data_type": "fp32"},
        with_zero(stage=0),
        with_zero(offload_optimizer={"device": "none"}, offload_param={"device": None}),
        with_zero(stage3_max_live_parameters=10, round_robin_gradients=False, zenflow=None),
    ],
)
def test_harmless_settings_pass(settings: dict[str, Any]) -> None:
    check_settings(GOOD | settings, "ds.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clipping": 1.0}, "`gradient_clipping` of ds.json must be 0.0: it is 1.0, and DeepSpeed would then"),
        ({"gradient_clipping": "auto"}, '`gradient_clipping` of ds.json must be 0.0: it is "auto"'),
        ({"gradient_clipping": None}, "`gradient_clipping` of ds.json must be 0.0: it is missing"),
        ({"gradient_clipping": False}, "`gradient_clipping` of ds.json must be 0.0: it is false"),
        ({"gradient_accumulation_steps": 4}, "must be 1: it is 4. .*`accumulation.micro_batch`"),
        ({"fp16": {"enabled": True}}, "each part has an engine of its own with its own loss scale"),
        ({"fp16": {"enabled": "auto"}}, "`fp16.enabled` of ds.json must be false"),
        ({"bf16": {"enabled": True}}, "`bf16.enabled` .* set train.precision=bf16, which keeps them float32"),
        ({"bfloat16": {"enabled": True}}, "set train.precision=bf16"),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}},
            "`data_types` of ds.json is not supported. With bf16 it selects",
        ),
        ({"optimizer": {"type": "AdamW"}}, "`optimizer` of ds.json .* The run makes its own from `optim`"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler` of ds.json .* The run makes its own"),
        ({"torch_autocast": {"enabled": True}}, "`torch_autocast` of ds.json is not supported. Set `train.precision`"),
        ({"communication_data_type": "fp16"}, "averaged in float32"),
        ({"gradient_predivide_factor": 2.0}, "as by DDP"),
        ({"prescale_gradients": True}, "as by DDP"),
        ({"managed_gradient_accumulation": False}, "`managed_gradient_accumulation` of ds.json is not supported"),
        ({"sparse_attention": {"mode": "fixed"}}, "`sparse_attention` .* It is not known to leave the result as it is"),
        (with_zero(stage=3), "`zero_optimization.stage` of ds.json is 3: .* the step reads weights between"),
        (with_zero(stage="auto"), 'must be 0, 1 or 2: got "auto"'),
        (with_zero(stage=True), "must be 0, 1 or 2: got true"),
        ({"zero_optimization": None}, "must be 0, 1 or 2: got null"),
        (with_zero(offload_optimizer={"device": "cpu"}), "`zero_optimization.offload_optimizer` .* replaces the run's"),
        (with_zero(cpu_offload=True), "`zero_optimization.cpu_offload` .* replaces"),
        (with_zero(zenflow={"topk_ratio": 0.1}), "`zero_optimization.zenflow` .* replaces"),
        (with_zero(round_robin_gradients=True), "`zero_optimization.round_robin_gradients` .* order of parameters"),
        (
            with_zero(zero_quantized_gradients=True),
            "`zero_optimization.zero_quantized_gradients` .* not known to leave",
        ),
    ],
)
def test_settings_that_change_the_result_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(GOOD | settings, "ds.json")


def test_a_missing_clipping_is_refused() -> None:
    with pytest.raises(ConfigError, match="it is missing"):
        check_settings({"zero_optimization": {"stage": 1}}, "ds.json")


def test_fp16_is_refused_and_bf16_is_not() -> None:
    for precision in ("fp32", "bf16"):
        check_precision(precision)
    with pytest.raises(
        ConfigError, match="`train.precision` is fp16, .*the loss of the metric pass, which two engines"
    ):
        check_precision("fp16")


def test_filled_leaves_nothing_to_deepspeeds_defaults() -> None:
    given = (
        GOOD | {"train_batch_size": 80, "gradient_accumulation_steps": "auto"} | with_zero(reduce_bucket_size="auto")
    )
    assert filled(given) == {
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET_ELEMENTS, "compute_grad_norm": False},
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
    }
    assert filled(GOOD | with_zero(stage=0, reduce_bucket_size=7))["zero_optimization"] == {
        "stage": 0,
        "reduce_bucket_size": 7,
    }
    assert given["train_batch_size"] == 80


def test_settings_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(GOOD))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert launcher_settings() == (GOOD, str(file))
    for content, message in (("{", "cannot be read"), ("[1]", "must be a JSON object: got list")):
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            launcher_settings()
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read: .*No such file"):
        launcher_settings()


def test_settings_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG_FILE", "ZERO_STAGE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE"):
        monkeypatch.delenv(f"ACCELERATE_DEEPSPEED_{name}", raising=False)
    monkeypatch.delenv("ACCELERATE_GRADIENT_CLIPPING", raising=False)
    settings, source = launcher_settings()
    check_settings(settings, source)
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["gradient_clipping"] == 0
    for name, value, message in (
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "of the launcher's DeepSpeed options is 3"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "must be 0.0: it is 1.0"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer"),
    ):
        with monkeypatch.context() as here:
            here.setenv(name, value)
            settings, source = launcher_settings()
            with pytest.raises(ConfigError, match=message):
                check_settings(settings, source)


def trained(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Linear(2, 2).to(dtype)


def test_parts_that_zero_cannot_move() -> None:
    good = trained()
    for stage in (0, 1, 2):
        check_trained("graph", good, torch.optim.AdamW(good.parameters()), stage)
    half = trained(torch.bfloat16)
    with pytest.raises(
        ConfigError, match="Parameters of `graph` are torch.bfloat16: under DeepSpeed they must be float32"
    ):
        check_trained("graph", half, torch.optim.AdamW(half.parameters()), 0)


def test_optimisers_that_look_at_whole_tensors() -> None:
    class Whole(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

    class Elementwise(Whole):
        elementwise = True

    part = trained()
    check_trained("graph", part, Whole(part.parameters()), 0)
    check_trained("graph", part, Elementwise(part.parameters()), 2)
    with pytest.raises(ConfigError, match="`graph`, Whole, is not known to move each entry"):
        check_trained("graph", part, Whole(part.parameters()), 1)


def engine_of(optimizer: Any, clipping: float = 0.0, steps: int = 1, stage: int = 1) -> Any:
    return SimpleNamespace(
        gradient_clipping=lambda: clipping,
        gradient_accumulation_steps=lambda: steps,
        zero_optimization_stage=lambda: stage,
        optimizer=SimpleNamespace(optimizer=optimizer) if stage else optimizer,
    )


def test_a_built_engine_must_be_what_was_asked_for() -> None:
    optimizer = torch.optim.SGD(trained().parameters(), 0.1)
    for stage in (0, 1, 2):
        check_engine("graph", engine_of(optimizer, stage=stage), optimizer, stage)
    for wrong in ({"clipping": 1.0}, {"steps": 2}, {"stage": 2}):
        with pytest.raises(
            ConfigError, match="DeepSpeed's engine of `graph` has gradient_clipping, gradient_accumulation"
        ):
            check_engine("graph", engine_of(optimizer, **wrong), optimizer, 1)
    for stage in (0, 1):
        with pytest.raises(ConfigError, match="DeepSpeed replaced the optimiser of `graph`, SGD"):
            check_engine("graph", engine_of(object(), stage=stage), optimizer, stage)


def zero_of(layout: Layout) -> Any:
    """A ZeRO optimiser with everything that is used of it."""
    for group in layout.trained:
        for parameter in group:
            parameter._hp_mapping = SimpleNamespace(**dict.fromkeys(MAPPING_NEEDS))  # type: ignore[attr-defined]
    zero = SimpleNamespace(**dict.fromkeys(OPTIMIZER_NEEDS))
    zero.bit16_groups = [list(group) for group in layout.trained]
    zero.optimizer = SimpleNamespace(param_groups=[{"params": [torch.zeros(1)]} for _ in layout.groups])
    return zero


@pytest.mark.parametrize("need", [*OPTIMIZER_NEEDS, *MAPPING_NEEDS])
def test_another_version_of_deepspeed_is_refused(need: str) -> None:
    part = trained()
    layout = Layout.of(torch.optim.SGD(part.parameters(), 0.1), ())
    zero = zero_of(layout)
    check_zero_optimizer("graph", zero, layout)
    delattr(zero if need in OPTIMIZER_NEEDS else part.bias._hp_mapping, need)
    with pytest.raises(ConfigError, match=f"ZeRO optimiser of `graph` lacks {need}.*Use DeepSpeed 0.19.8"):
        check_zero_optimizer("graph", zero, layout)


def test_groups_that_deepspeed_changed_are_refused() -> None:
    part = trained()
    layout = Layout.of(torch.optim.SGD([{"params": [part.weight]}, {"params": [part.bias]}], 0.1), ())
    for change in (
        lambda zero: zero.bit16_groups.reverse(),
        lambda zero: zero.bit16_groups.pop(),
        lambda zero: zero.optimizer.param_groups[0]["params"].append(torch.zeros(1)),
    ):
        zero = zero_of(layout)
        change(zero)
        with pytest.raises(ConfigError, match="has other parameter groups than the run's optimiser"):
            check_zero_optimizer("graph", zero, layout)


def test_deepspeed_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"asks for DeepSpeed, which cannot be imported.*'gcahng\[deepspeed\]'"):
        deepspeed_plugin(small_config())
