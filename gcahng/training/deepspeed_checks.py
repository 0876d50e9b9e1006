"""What DeepSpeed must and must not be told: checked when a run starts, since much of it changes results in silence.

The settings come from the launcher: a DeepSpeed JSON file (`deepspeed_config_file` of accelerate's configuration), or
none, and then the stage alone. What is allowed leaves the result as it is, up to rounding; everything else is refused
with the reason.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from gcahng.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import DeepSpeedPlugin

    from gcahng.training.config import Config

# Elements of the buffer that each engine takes while it averages gradients: DeepSpeed's own would be 2 GB.
BUCKET_ELEMENTS = 50_000_000

_HARMLESS = {
    "comms_logger",
    "dump_state",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "memory_breakdown",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_optimization",
}
_HARMLESS_OF_ZERO = {
    "allgather_bucket_size",
    "allgather_partitions",
    "compute_grad_norm",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage",
    "use_multi_rank_bucket_allreduce",
}
# Not harmless to switch off.
_ON_BY_DEFAULT = {"managed_gradient_accumulation"}
_OURS = "The run makes its own from `optim`: hooks on it clip gradients and keep parameters still that a pass misses."
_REASONS = {
    "optimizer": _OURS,
    "scheduler": _OURS,
    "amp": "Set `train.precision`.",
    "torch_autocast": "Set `train.precision`.",
    "data_types": "With bf16 it selects another optimiser wrapper, which loses gradients of losses that engines share.",
    "communication_data_type": "Gradients are averaged in float32, as by DDP.",
    "managed_gradient_accumulation": "Gradients are averaged once, right before the move.",
    "prescale_gradients": "Gradients are averaged as by DDP.",
    "gradient_predivide_factor": "Gradients are averaged as by DDP.",
}
_OFFLOAD_REASON = "Offload replaces the run's optimiser by another one, without its clipping and its pass gate."
_REASONS_OF_ZERO = {
    "zenflow": _OFFLOAD_REASON,
    "round_robin_gradients": "It changes the order of parameters in the partitions, which checkpoints rely on.",
}
_FP16_REASON = (
    "each part has an engine of its own with its own loss scale, and the loss of the metric pass, which two engines "
    "share, cannot have both. Use train.precision=bf16, or DDP"
)
# Optimisers whose move of an entry depends on that entry alone: ZeRO moves pieces of all parameters in a row.
_ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)


def deepspeed_plugin(config: "Config") -> "DeepSpeedPlugin":
    """The launcher's settings, checked and filled in, as accelerate takes them.

    Raises:
        ConfigError: A setting is missing, unreadable, or would change the result; or DeepSpeed is not installed.
    """
    check_precision(config.train.precision)
    settings, source = launcher_settings()
    check_settings(settings, source)
    try:
        import deepspeed.ops  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            f"The launcher asks for DeepSpeed, which cannot be imported here ({error}). Install it (pip install "
            "'gcahng[deepspeed]'), or use DDP (launch/accelerate/gpu_n.yaml)."
        ) from error
    from accelerate import DeepSpeedPlugin

    # On the CPU DeepSpeed would begin by compiling an operator for inference: a minute, where there is a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Do not import transformers, whose ZeRO-3 loading alone would read what is set here."""

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    return Plugin(hf_ds_config=filled(settings))


def launcher_settings() -> tuple[dict[str, Any], str]:
    """The DeepSpeed settings of the environment, and where they stand.

    Raises:
        ConfigError: The file cannot be read.
    """
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "0.0")
        offload = {
            f"offload_{what}": {"device": os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")}
            for what in ("optimizer", "param")
        }
        settings = {"zero_optimization": {"stage": _value(stage), **offload}, "gradient_clipping": _value(clipping)}
        return settings, "the launcher's DeepSpeed options"
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The DeepSpeed configuration {path} cannot be read: {error}. Correct the path or the JSON."
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"The DeepSpeed configuration {path} must be a JSON object: got {type(settings).__name__}.")
    return settings, path


def check_precision(precision: str) -> None:
    """Raise ConfigError for a `train.precision` that DeepSpeed cannot have."""
    if precision == "fp16":
        raise ConfigError(f"`train.precision` is fp16, which DeepSpeed cannot run: {_FP16_REASON}.")


def check_settings(settings: Mapping[str, Any], source: str) -> None:
    """Whether DeepSpeed settings leave the result as it is.

    Args:
        settings: As in the JSON file.
        source: Where they stand, for the message.
    Raises:
        ConfigError: With the key, the reason, and what to write.
    """
    _check_stage(settings.get("zero_optimization"), source)
    clipping = settings.get("gradient_clipping")
    if not _is_number(clipping) or clipping != 0:
        found = "missing" if clipping is None else json.dumps(clipping)
        raise ConfigError(
            f"`gradient_clipping` of {source} must be 0.0: it is {found}, and DeepSpeed would then scale the gradients "
            "of each part down to norm 1. Write 0.0; `optim.clip_value` clips."
        )
    steps = settings.get("gradient_accumulation_steps", 1)
    if steps not in (1, "auto"):
        raise ConfigError(
            f"`gradient_accumulation_steps` of {source} must be 1: it is {json.dumps(steps)}. Gradients of small "
            "batches do not add up to those of one graph. Write 1; `accumulation.micro_batch` runs large batches in "
            "little memory."
        )
    if _enabled(settings.get("fp16")):
        raise ConfigError(f"`fp16.enabled` of {source} must be false: {_FP16_REASON}.")
    if _enabled(settings.get("bf16", settings.get("bfloat16"))):
        raise ConfigError(
            f"`bf16.enabled` of {source} must be false: the weights themselves would be bfloat16. Take it out and set "
            "train.precision=bf16, which keeps them float32."
        )
    for key, value in settings.items():
        if key in ("fp16", "bf16", "bfloat16") or key in _HARMLESS or value is None:
            continue
        if _switched_off(value) and key not in _ON_BY_DEFAULT:
            continue
        if (key, value) == ("communication_data_type", "fp32"):
            continue
        raise ConfigError(_refused(key, source, _REASONS.get(key)))


def _check_stage(zero: Any, source: str) -> None:
    """Raise ConfigError for a ZeRO stage other than 0, 1, 2, or settings of it that change the result."""
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage == 3:
        raise ConfigError(
            f"`zero_optimization.stage` of {source} is 3: with it a weight is there only while its module runs forward "
            "or backward, but the step reads weights between (the classifier's as constants in the generation pass, "
            "all in an evaluation and a checkpoint), and parts share one backward pass. Use stage 2."
        )
    if not _is_number(stage) or stage not in (0, 1, 2):
        raise ConfigError(
            f"`zero_optimization.stage` of {source} must be 0, 1 or 2: got {json.dumps(stage)}. Write one of them."
        )
    for key, value in zero.items():
        if key in _HARMLESS_OF_ZERO or key.startswith("stage3_") or value is None or _switched_off(value):
            continue
        if key.startswith("offload_") or key == "cpu_offload":
            if isinstance(value, Mapping) and value.get("device", "none") in ("none", None):
                continue
            raise ConfigError(_refused(f"zero_optimization.{key}", source, _OFFLOAD_REASON))
        raise ConfigError(_refused(f"zero_optimization.{key}", source, _REASONS_OF_ZERO.get(key)))


def filled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Checked settings with what DeepSpeed wants to know besides; nothing in it is `auto`."""
    zero = {key: value for key, value in settings["zero_optimization"].items() if value != "auto"}
    zero.setdefault("reduce_bucket_size", BUCKET_ELEMENTS)
    if zero["stage"] > 0:
        # Nobody reads the norm, and DeepSpeed would skip a step in silence where its square is not finite.
        zero["compute_grad_norm"] = False
    # The sizes are for DeepSpeed's counters alone: batches come from the run's own plan.
    own = {"zero_optimization": zero, "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1}
    rest = {key: value for key, value in settings.items() if key not in own and key != "train_batch_size"}
    return rest | own | {"zero_allow_untested_optimizer": True}


def check_trained(name: str, module: nn.Module, optimizer: Optimizer, stage: int) -> None:
    """Whether ZeRO can move a part.

    Raises:
        ConfigError: Its parameters are not float32, or its optimiser looks at more than one entry at a time.
    """
    others = {str(p.dtype) for p in module.parameters() if p.requires_grad and p.dtype != torch.float32}
    if others:
        raise ConfigError(
            f"Parameters of `{name}` are {', '.join(sorted(others))}: under DeepSpeed they must be float32, which ZeRO "
            "keeps them in. Make the module float32; `train.precision` decides how it computes."
        )
    if stage > 0 and not isinstance(optimizer, _ELEMENTWISE) and not getattr(optimizer, "elementwise", False):
        raise ConfigError(
            f"The optimiser of `{name}`, {type(optimizer).__name__}, is not known to move each entry of a parameter by "
            "itself, but ZeRO cuts parameters into pieces. Use stage 0 or DDP, or one of torch's SGD and Adam kinds; "
            "an optimiser that does says so by a class attribute `elementwise = True`."
        )


def check_engine(name: str, engine: Any, optimizer: Optimizer, stage: int) -> None:
    """Whether a built engine is what its settings said.

    Raises:
        ConfigError: It clips, accumulates, or has replaced the optimiser.
    """
    got = (engine.gradient_clipping(), engine.gradient_accumulation_steps(), engine.zero_optimization_stage())
    if got != (0.0, 1, stage):
        raise ConfigError(
            f"DeepSpeed's engine of `{name}` has gradient_clipping, gradient_accumulation_steps and ZeRO stage {got}: "
            f"expected {(0.0, 1, stage)}. This version of DeepSpeed reads its settings in another way; use 0.19.8."
        )
    used = engine.optimizer.optimizer if stage > 0 else engine.optimizer
    if used is not optimizer:
        raise ConfigError(
            f"DeepSpeed replaced the optimiser of `{name}`, {type(optimizer).__name__}, and so lost its clipping and "
            "its pass gate. Use another optimiser, stage 0 or DDP."
        )


def _is_news(record: logging.LogRecord) -> bool:
    """Not what each engine says of optimisers it does not know: `check_trained` has looked."""
    return "untested optimizer" not in record.getMessage()


def _refused(key: str, source: str, reason: str | None) -> str:
    reason = reason or "It is not known to leave the result as it is."
    return f"`{key}` of {source} is not supported. {reason} Take it out."


def _enabled(block: Any) -> bool:
    """Whether a block of settings is switched on; `auto` would leave that to the launcher."""
    return isinstance(block, Mapping) and block.get("enabled", False) not in (False, None)


def _switched_off(value: Any) -> bool:
    return value is False or (isinstance(value, Mapping) and value.get("enabled") is False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(text: str) -> Any:
    """A number where the text is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text
