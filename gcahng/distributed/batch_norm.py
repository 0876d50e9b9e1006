"""BatchNorm whose statistics are those of the global batch, and buffers that are the same on all ranks.

A layer over ranks normalises by mean and variance of all ranks' values, as one process with the global batch does.
`torch.nn.SyncBatchNorm` does so on GPUs alone, and `timm`'s BatchNorms with an activation need a class of their own
there; here the layer stays the object it was, with its names, parameters, buffers and hooks.

One all-reduce of 2 C + 1 numbers forward, one of 2 C backward, in float64. Ranks add up means and squared deviations
(Chan, Golub and LeVeque), not squares of values: no digits are lost where the mean is far from zero, but for the
rounding of each rank's mean to the dtype of its statistics, float32 or the input's.

Letters: C channels, n values per channel on this rank, N on all of them.
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from gcahng.distributed.ranks import ONE, Ranks
from gcahng.errors import ConfigError, InputError


def use_statistics_of_all(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Let every BatchNorm in `module` take its batch statistics over all ranks, in training mode.

    Args:
        module: What runs on each rank's own images (not the graph network, whose nodes are those of the global batch on
            every rank). Changed in place: the class of its BatchNorm layers, nothing else. A layer in evaluation mode
            (frozen, for example) does what it did before, and talks to nobody.
        ranks: One rank changes nothing.
    Returns:
        `module`.
    Raises:
        ConfigError: A BatchNorm has a forward pass of its own that is not known here, or no size yet.
    """
    if ranks.size == 1:
        return module
    kinds: dict[type[_BatchNorm], type[_BatchNorm]] = {}
    for name, layer in module.named_modules():
        # SyncBatchNorm does it by itself.
        if not isinstance(layer, _BatchNorm) or isinstance(layer, nn.SyncBatchNorm | _OverRanks):
            continue
        kind = type(layer)
        if kind not in kinds:
            _require_known(kind, name)
            kinds[kind] = type(f"{kind.__name__}OverRanks", (_OverRanks, kind), {"ranks": ranks})
        layer.__class__ = kinds[kind]
    return module


def share_buffers(module: nn.Module, ranks: Ranks) -> None:
    """Make the buffers of `module` rank 0's on every rank; one message for each device that holds some."""
    if ranks.size == 1:
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for buffer in module.buffers():
        by_device.setdefault(buffer.device, []).append(buffer.detach())
    for device, buffers in by_device.items():
        message = torch.cat([_bytes(buffer) for buffer in buffers])
        group = ranks.host_group if device.type == "cpu" else ranks.group
        dist.broadcast(message, group=group, group_src=0)
        parts = message.split([_bytes(buffer).numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))


def _bytes(buffer: Tensor) -> Tensor:
    return buffer.contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True)
class _Statistics:
    """Of the global batch, float64.

    Attributes:
        count: (), N.
        mean, variance: (C,); the variance is that of the N values (not the unbiased one).
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, x: Tensor, ranks: Ranks) -> "_Statistics":
        """Statistics of all ranks' (n_0, C, ...) values; a rank without values adds nothing."""
        channels = x.shape[1]
        own = x.numel() // channels
        message = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=x.device)
        count, sums, squares = message.split([1, channels, channels])
        if own:
            mean, variance = (moment.double() for moment in _moments(x))
            count.fill_(own)
            sums.copy_(own * mean)
            # Squared deviations from this rank's mean, and this mean's own square. What cancels when the global mean's
            # square is taken off again are these squares alone, in float64.
            squares.copy_(own * (variance + mean.square()))
        count, sums, squares = ranks.sum(message).split([1, channels, channels])
        mean = sums / count
        return cls(count.squeeze(0), mean, (squares / count - mean.square()).clamp_min(0))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) mean and variance over all but the channels, by the kernels of F.batch_norm; at least float32."""
    mean_to, variance_to = None, None
    if x.device.type == "cpu":
        # With channels last it would add up thousands of numbers one after the other, and be off by 1e-4 in float32.
        x = x.contiguous()
    if x.dtype != _wide(x):
        # Only to say in which dtype they are wanted.
        mean_to, variance_to = torch.zeros(2, x.shape[1], dtype=_wide(x), device=x.device)
    mean, variance = torch.batch_norm_update_stats(x, mean_to, variance_to, 0.0)
    return mean, variance


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _OverRanks(_BatchNorm):
    """What a BatchNorm's class is mixed with: the training pass, over all ranks.

    Attributes:
        ranks: Held by the class, so that layers can still be copied.
    """

    ranks: ClassVar[Ranks] = ONE

    def forward(self, x: Tensor) -> Tensor:
        """As the layer itself; in training every rank must come here, with a part of the batch, even an empty one.

        Raises:
            InputError: All ranks together have one value per channel (looked at on the CPU only, where nobody waits).
        """
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        with torch.no_grad():
            found = _Statistics.of(x, self.ranks)
            if x.device.type == "cpu" and float(found.count) < 2:
                raise InputError(
                    f"BatchNorm needs at least 2 values per channel in training: got {int(found.count)} on all ranks "
                    f"together, {tuple(x.shape)} here. Use larger batches."
                )
            self._update_running(found)
        y: Tensor = _Normalise.apply(x, self.weight, self.bias, found, self.eps, self.ranks)
        # timm's BatchNorm with an activation.
        for name in ("drop", "act"):
            if name in self._modules:
                y = getattr(self, name)(y)
        return y

    def _update_running(self, found: _Statistics) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        new: float | Tensor = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                new = 1 / self.num_batches_tracked.double()
        unbiased = found.variance * (found.count / (found.count - 1))
        for running, value in ((self.running_mean, found.mean), (self.running_var, unbiased)):
            running.copy_((1 - new) * running.double() + new * value)


class _Normalise(torch.autograd.Function):
    """Normalise by statistics that depend on all ranks' values; the gradient goes through them, too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, found: _Statistics, eps: float, ranks: Ranks
    ) -> Tensor:
        ctx.found, ctx.eps, ctx.ranks = found, eps, ranks
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        if not x.numel():
            return torch.empty_like(x)
        wide = _wide(x)
        weight, bias = (None if one is None else one.to(wide) for one in (weight, bias))
        return F.batch_norm(x, found.mean.to(wide), found.variance.to(wide), weight, bias, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        found, eps, (gradient,) = ctx.found, ctx.eps, gradients
        scaled, plain = _channel_sums(gradient, x, found, eps)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(gradient, x, weight, ctx.ranks.sum(torch.stack([scaled, plain])), found, eps)
        grad_weight = scaled.to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = plain.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _channel_sums(gradient: Tensor, x: Tensor, found: _Statistics, eps: float) -> tuple[Tensor, Tensor]:
    """(C,) sums over this rank of the gradient times the normalised values, and of the gradient; float64."""
    if not x.numel():
        return torch.zeros_like(found.mean), torch.zeros_like(found.mean)
    wide = _wide(x)
    ones = torch.ones_like(found.mean, dtype=wide)
    dtype = x.dtype
    if x.device.type == "cpu":
        # As for `_moments`; and with channels last CPUs would add up in the input's own dtype.
        dtype, x, gradient = wide, x.contiguous(), gradient.contiguous()
    _, scaled, plain = torch.ops.aten.native_batch_norm_backward(
        gradient.to(dtype),
        x.to(dtype),
        ones,
        found.mean.to(wide),
        found.variance.to(wide),
        None,
        None,
        False,
        eps,
        [False, True, True],
    )
    return scaled.double(), plain.double()


def _input_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor | None, sums: Tensor, found: _Statistics, eps: float
) -> Tensor:
    """factor * (gradient - mean gradient - normalised x * mean of gradient * normalised x), one line of it per channel.

    Args:
        sums: (2, C) of all ranks; see `_channel_sums`.
    """
    scaled, plain = sums / found.count
    inverse = (found.variance + eps).rsqrt()
    factor = inverse if weight is None else inverse * weight.double()
    of_x = -factor * inverse * scaled
    shape = (1, -1, *[1] * (x.dim() - 2))
    factor, of_x, constant, mean = (one.to(_wide(x)).view(shape) for one in (factor, of_x, -factor * plain, found.mean))
    return (x - mean).mul_(of_x).add_(constant).addcmul_(gradient, factor).to(x.dtype)


def _require_known(kind: type[_BatchNorm], name: str) -> None:
    """Raise ConfigError unless layers of a class do what torch's BatchNorm does, or timm's with an activation."""
    timm: Any = sys.modules.get("timm.layers")
    known = [_BatchNorm.forward, *([timm.BatchNormAct2d.forward] if timm is not None else [])]
    if kind.forward in known and not issubclass(kind, LazyModuleMixin):
        return
    reason = "no size before its first batch" if issubclass(kind, LazyModuleMixin) else "a forward pass of its own"
    raise ConfigError(
        f"BatchNorm layer `{name}` cannot take its statistics over all ranks: {kind.__module__}.{kind.__name__} has "
        f"{reason}. Set distributed.batch_norm to local, or choose another backbone."
    )
