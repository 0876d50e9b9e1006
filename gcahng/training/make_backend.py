"""The backend for how a run was launched."""

from typing import TYPE_CHECKING

from gcahng.training.backend import Backend, PlainBackend
from gcahng.training.config import Config
from gcahng.training.launched import Launched

if TYPE_CHECKING:
    from gcahng.training.parts import RunParts


def make_backend(
    config: Config, parts: "RunParts", launched: Launched, *, deferred_checks: bool | None = None
) -> Backend:
    """What runs the parts; every rank calls it with parts of the same kinds, on `launched.device`.

    Rank 0's weights and buffers become every rank's.

    Args:
        config: Of the run.
        parts: What is trained.
        launched: How the run was started.
        deferred_checks: Whether the step never waits for the device (see `PlainBackend`); by default on CUDA, where
            each rank must then call `checks.finish()` at the same places. Never with `health.skip_non_finite`.
    Raises:
        ConfigError: The backend refuses the precision or the launcher's settings.
    """
    deferred = launched.device.type == "cuda" if deferred_checks is None else deferred_checks
    # A step that is left out must be known before the next one begins.
    deferred = deferred and not config.health.skip_non_finite
    trained = (parts.modules, parts.optimizers, parts.gates)
    precision = config.train.precision
    if launched.kind == "plain":
        return PlainBackend(*trained, device=launched.device, precision=precision, deferred_checks=deferred)
    if launched.kind == "ddp":
        from gcahng.training.ddp_backend import DistributedBackend

        return DistributedBackend(*trained, launched=launched, precision=precision, deferred_checks=deferred)
    from gcahng.training.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(*trained, launched=launched, precision=precision, deferred_checks=deferred)
