"""What this process was started as: one of several ranks, on which device, under which distribution.

`accelerate launch` and `torchrun` say it in environment variables; without a launcher a run is one process. Nothing
here is a setting of the experiment: the same configuration runs under every launcher.

    launched = gcahng.training.launched.launched(config)      # first of all: every rank, before data and parts
    ...                                                       # parts on launched.device, launched.ranks to the step
    backend = make_backend(config, parts, launched)           # gcahng.training.make_backend
    ...
    backend.close()                                           # engines first,
    end(launched)                                             # then the groups they talk over

One rank without DeepSpeed is "plain": no process group, no accelerator, accelerate is not imported.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist

from gcahng.distributed import ONE, Ranks
from gcahng.errors import ConfigError, TrainingError
from gcahng.training.config import Config

if TYPE_CHECKING:
    from accelerate import Accelerator

Kind = Literal["plain", "ddp", "deepspeed"]

# What each rank of several needs to know, from whichever launcher.
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Distributions of accelerate that know nothing of a graph over all ranks.
_REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_PRECISION_OF = {"no": "fp32"}
_EMBEDDING_WAIT = timedelta(hours=1)


@dataclass(frozen=True)
class Launched:
    """This process among those that were started together.

    Attributes:
        ranks: All of them. Tensors go over the default group (NCCL on CUDA, gloo on the CPU), numbers and objects of
            the CPU over a gloo group of their own.
        device: Where this rank computes: CUDA device number LOCAL_RANK, or the CPU.
        kind: Which backend trains.
        accelerator: Prepares parts for the backend; None for "plain".
        owns_groups: Whether the default group was made here, so that `end` takes it down.
    """

    ranks: Ranks
    device: torch.device
    kind: Kind
    accelerator: "Accelerator | None" = None
    owns_groups: bool = True


def launched(config: Config, *, training: bool = True) -> Launched:
    """Find out, and connect the ranks; every rank calls it once.

    A default process group that is there already is used as it is.

    Args:
        config: Says on which device, in which precision, and how long ranks wait for each other.
        training: False where nothing is trained: no batch is shared, and DeepSpeed has no part in it.
    Raises:
        ConfigError: The launcher asks for what the configuration or the method does not allow.
        TrainingError: The other ranks cannot be reached.
    """
    size = _number("WORLD_SIZE", 1)
    uses_deepspeed = _flag("ACCELERATE_USE_DEEPSPEED")
    _check(config, size, uses_deepspeed)
    if training:
        _check_training(config, size)
    elif uses_deepspeed:
        raise ConfigError(
            "The launcher asks for DeepSpeed (ACCELERATE_USE_DEEPSPEED), but nothing is trained. Launch without it."
        )
    device = _device(config.train.device, size)
    if size == 1 and not uses_deepspeed:
        return Launched(ONE, device, "plain")
    owns_groups = not dist.is_initialized()
    _share_cores(device)
    timeout = timedelta(seconds=config.distributed.timeout_seconds)
    try:
        accelerator = _accelerator(config, device, timeout, uses_deepspeed)
    except dist.DistError as error:
        raise _not_met(size, config.distributed.timeout_seconds, error) from error
    if dist.get_world_size() != size:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {dist.get_world_size()} processes met. Start them with one command."
        )
    # Steps keep ranks together; embedding a whole split or some tars may end much earlier on one than on another.
    wait = timeout if training else max(timeout, _EMBEDDING_WAIT)
    host_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=wait))
    ranks = Ranks(dist.get_rank(), size, None, host_group)
    return Launched(ranks, device, "deepspeed" if uses_deepspeed else "ddp", accelerator, owns_groups)


def launched_rank() -> int:
    """The rank that the launcher gave this process, before anything has been checked; 0 where there is one process."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    number = os.environ.get("RANK", "0")
    return int(number) if several and number.isdigit() else 0


def local_rank() -> int:
    """This process's number on its machine, as the launcher gave it; 0 where there is one process."""
    return _number("LOCAL_RANK", 0) if _number("WORLD_SIZE", 1) > 1 else 0


def require_one_process(command: str) -> None:
    """Refuse a launcher's many processes for a command of which each would do all.

    Raises:
        ConfigError: There are several.
    """
    size = _number("WORLD_SIZE", 1)
    if size > 1:
        raise ConfigError(
            f"{command} runs as one process, but {size} were started (WORLD_SIZE): each would do all of it, and write "
            f"the same files. Start `python {command}` without a launcher, or unset WORLD_SIZE."
        )


def end(launched: Launched) -> None:
    """Take the groups down; the backend has been closed, and every rank has come here or the run has failed."""
    if launched.accelerator is None:
        return
    if launched.owns_groups:
        launched.accelerator.end_training()
    elif launched.ranks.host_group is not None:
        dist.destroy_process_group(launched.ranks.host_group)


def _check(config: Config, size: int, uses_deepspeed: bool) -> None:
    """Raise ConfigError for what the launcher's variables must not say."""
    for variable, name in _REFUSED.items():
        if _flag(variable):
            raise ConfigError(
                f"The launcher asks for {name} ({variable}), which does not keep a graph over all ranks exact. Use "
                "plain DDP or DeepSpeed ZeRO (launch/accelerate/)."
            )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        raise ConfigError(
            f"The launcher asks for dynamo_backend {compiler}: expected no. Parts are not compiled as a whole, what "
            "pays is (`graph.backend`). Leave dynamo_backend out."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and _PRECISION_OF.get(precision, precision) != config.train.precision:
        raise ConfigError(
            f"The launcher asks for mixed_precision {precision}, but `train.precision` is {config.train.precision}. "
            "Leave mixed_precision at no: `train.precision` decides."
        )
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if (size > 1 or uses_deepspeed) and missing and not dist.is_initialized():
        raise ConfigError(
            f"{size} processes are to run together (WORLD_SIZE), but {', '.join(missing)} is not set. Start them with "
            "`accelerate launch` or `torchrun`; for one process unset WORLD_SIZE, which a shell may have kept."
        )


def _check_training(config: Config, size: int) -> None:
    """Raise ConfigError for what the launcher must not ask of training."""
    steps = _number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)
    if steps > 1:
        raise ConfigError(
            f"The launcher asks for gradient_accumulation_steps {steps}: expected 1. Summing gradients of small "
            "batches would make small graphs, not one large one. Set gradient_accumulation_steps to 1 and "
            "`accumulation.micro_batch` to the images that fit: one graph over all of them, in less memory."
        )
    if size > config.batch.num_classes:
        raise ConfigError(
            f"`batch.num_classes` is {config.batch.num_classes}, but {size} ranks were started: each needs a class of "
            "every batch. Start fewer, or raise batch.num_classes."
        )


def _not_met(size: int, seconds: int, error: Exception) -> TrainingError:
    """What to say when not all ranks come to where they meet; torch's words may be many lines."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    said = next(iter(str(error).strip().splitlines()), "no message")
    return TrainingError(
        f"The {size} ranks did not meet at {place} (MASTER_ADDR, MASTER_PORT) within `distributed.timeout_seconds` "
        f"({seconds}): {said[:200]} Check that all of them were started, and that this port is free there and open to "
        "the other nodes."
    )


def _device(setting: str, size: int) -> torch.device:
    # Here, since what makes the parts may want to know what was launched.
    from gcahng.training.parts import choose_device

    if _flag("ACCELERATE_USE_CPU"):
        if setting == "cuda":
            raise ConfigError(
                "`train.device` is cuda, but the launcher asks for the CPU (ACCELERATE_USE_CPU). Use auto or cpu, or "
                "launch without it."
            )
        setting = "cpu"
    device = choose_device(setting)
    if size == 1 or device.type != "cuda":
        return device
    local, found = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= found:
        raise ConfigError(
            f"Local rank {local} has no GPU of its own: this machine shows {found}. Start at most {found} processes "
            "on it, or set train.device=cpu."
        )
    return torch.device("cuda", local)


def _share_cores(device: torch.device) -> None:
    """Give each process its share of the CPU's cores, where the launcher has not."""
    if device.type == "cpu" and _number("OMP_NUM_THREADS", 0) == 0:
        cores = len(os.sched_getaffinity(0)) // _number("LOCAL_WORLD_SIZE", 1)
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores))
        torch.set_num_threads(max(1, cores))


def _accelerator(config: Config, device: torch.device, timeout: timedelta, uses_deepspeed: bool) -> Any:
    """Accelerate, in full precision (autocast is the backend's business) and without torch.compile."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_cpu = device.type == "cpu"
    groups = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout)
    options: dict[str, Any] = {"mixed_precision": "no", "dynamo_backend": "no", "kwargs_handlers": [groups]}
    if not uses_deepspeed:
        return Accelerator(cpu=on_cpu, **options)
    from gcahng.training.deepspeed_checks import deepspeed_plugin

    with _deepspeed_on_cpu() if on_cpu else nullcontext():
        return Accelerator(deepspeed_plugins=deepspeed_plugin(config), **options)


@contextmanager
def _deepspeed_on_cpu() -> Iterator[None]:
    """Accelerate leaves DeepSpeed out where it is told to use the CPU: name the device instead."""
    asked = os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_CPU"] = asked


def _number(name: str, default: int) -> int:
    """An environment variable that holds a whole number."""
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ConfigError(f"The environment variable {name} must be a whole number: got {text!r}.") from None


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")
