"""Cached accumulation: batches whose images do not fit into memory at once, with the gradients of the whole batch.

The graph relates all samples of a batch, so that gradients of small batches do not add up to those of the large one.
What can be divided is the metric model up to its pooled features: there, images know nothing of each other. So, as in
GradCache, each rank

1. computes the features of its images in small batches, keeping no autograd graph;
2. runs everything behind them (the head with its BatchNorm, the gather, the graph, the losses) once, on all;
3. in the backward pass, when the gradient of the features has come, computes them again, one small batch after
   another, now with a graph, and sends the rows of that gradient through.

Step 3 is the backward pass of one autograd function that has the parameters as inputs. To everything around (DDP,
DeepSpeed, loss scalers, the step) it is an ordinary forward pass of the metric model with an ordinary gradient, which
arrives once: gradients are reduced over ranks once a step, and they are scaled like all others.

The second pass repeats the first: torch's generators are set back to where each small batch found them, and the model
runs on copies of its parameters' handles (whose hooks stay silent) and of its buffers as they were. So running
statistics move once. Draws from other generators (`random`, numpy) are not repeated.

Letters: R images of this rank, C channels of the features, D of the embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from gcahng.errors import ConfigError, InputError

STAGES = ("backbone", "features", "embed_features")

# The states of the CPU's generator and, on CUDA, of the device's.
_RandomState = tuple[Tensor, Tensor | None]


def check_accumulation(model: nn.Module, micro_batch: int, microbatch_statistics: bool) -> None:
    """Whether a metric model can be run in small batches.

    Args:
        model: As it is in training. It has `features` (images to (R, C)), `embed_features` (those to (R, D)) and
            `backbone`, the layers that `features` runs.
        micro_batch: Images at once.
        microbatch_statistics: Whether BatchNorms of the backbone may take their statistics from a small batch.
    Raises:
        ConfigError: The model lacks one of the three, or has BatchNorms that would see small batches only, or would
            talk to other ranks about them.
    """
    if micro_batch < 1:
        raise ConfigError(f"`accumulation.micro_batch` must be at least 1 or null: got {micro_batch}.")
    missing = [name for name in STAGES if not hasattr(model, name)]
    if missing:
        raise ConfigError(
            f"`accumulation.micro_batch` is {micro_batch}, but the metric model {type(model).__name__} has no "
            f"{', '.join(f'`{name}`' for name in missing)}. Give it `features(images)` and `embed_features(features)`, "
            "one after the other its forward pass, and `backbone`, the layers of the first; or set micro_batch to null."
        )
    live = _live_batch_norms(cast(nn.Module, model.backbone))
    if live and not microbatch_statistics:
        raise ConfigError(
            f"`accumulation.micro_batch` is {micro_batch}, but {len(live)} BatchNorms of the backbone take statistics "
            f"of the batch in training, the first being `{next(iter(live))}`: small batches would change them. Freeze "
            "them (model.freeze_batch_norm), take the statistics of each small batch "
            "(accumulation.microbatch_statistics=true), or set micro_batch to null."
        )
    shared = [name for name, layer in live.items() if isinstance(layer, nn.SyncBatchNorm) or hasattr(layer, "ranks")]
    if shared:
        raise ConfigError(
            f"BatchNorm `{shared[0]}` of the backbone takes its statistics over all ranks, but "
            f"`accumulation.micro_batch` is {micro_batch}: with microbatch_statistics they are those of one rank's "
            "small batch, and ranks may have different numbers of those. Set distributed.batch_norm to local (in code: "
            "give `use_statistics_of_all` the head alone), or set micro_batch to null."
        )


def cached_embeddings(model: nn.Module, images: Tensor, micro_batch: int, microbatch_statistics: bool) -> Tensor:
    """The embeddings of `images` in memory for `micro_batch` of them; their gradient is that of the whole.

    To be run as one forward pass of the metric model (`Backend.run`).

    Args:
        model: See `check_accumulation`.
        images: (R, ...), this rank's images.
        micro_batch: Most images at once. They are divided evenly: 10 in fours are 4, 3 and 3.
        microbatch_statistics: See `check_accumulation`.
    Returns:
        (R, D)
    Raises:
        ConfigError: See `check_accumulation`; the mode of a layer may have changed since the start.
        InputError: `features` does not return one row for each image.
    """
    if images.shape[0] <= micro_batch:
        return cast(Tensor, model(images))
    features = cached_features(model, images, micro_batch, microbatch_statistics)
    return cast(Tensor, cast(Any, model).embed_features(features))


def cached_features(model: nn.Module, images: Tensor, micro_batch: int, microbatch_statistics: bool) -> Tensor:
    """The features behind `cached_embeddings`, (R, C), for those who need both; arguments and errors as there."""
    if images.shape[0] <= micro_batch:
        return _features_of(model, images)
    if model.training:
        check_accumulation(model, micro_batch, microbatch_statistics)
    return _cached_features(model, images.detach().tensor_split(-(-images.shape[0] // micro_batch)))


def _cached_features(model: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    """(R, C) features of all parts, whose gradient takes a second pass; without one if nothing of them is trained."""
    device = parts[0].device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    states, found = [], []
    reached: dict[str, nn.Parameter] = {}
    for number, images in enumerate(parts):
        states.append(_random_state(device))
        # The first part leaves a graph for a moment: it says which parameters the features are made of.
        with torch.set_grad_enabled(number == 0 and torch.is_grad_enabled()):
            features = _features_of(model, images)
        if features.requires_grad:
            reached = _reached_parameters(model, features)
        found.append(features.detach())
        del features  # and its graph
    whole = torch.cat(found)
    if not reached:
        return whole
    second_pass = _SecondPass(model, tuple(parts), tuple(states), buffers, tuple(reached), _Precision.current(device))
    return cast(Tensor, _CachedFeatures.apply(whole, second_pass, *reached.values()))


def _features_of(model: Any, images: Tensor) -> Tensor:
    features = model.features(images)
    if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1]:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            f"`features` of the metric model must return a tensor with one row for each image: expected "
            f"{images.shape[0]} rows, got {got}. Correct it, or set accumulation.micro_batch to null."
        )
    return features


class _CachedFeatures(torch.autograd.Function):
    """The features as they are, with the second pass as backward pass."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, second_pass: "_SecondPass", *parameters: Tensor) -> Tensor:
        ctx.second_pass = second_pass
        return features.view_as(features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.second_pass.gradients(gradients[0])


@dataclass(frozen=True)
class _Precision:
    """Autocast as it was in the first pass: the backward pass does not run under it."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @staticmethod
    def current(device: torch.device) -> "_Precision":
        kind = device.type
        return _Precision(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def __call__(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)


@dataclass(frozen=True)
class _SecondPass:
    """What it takes to compute the features again as the first time.

    Attributes:
        model: The metric model; its parameters have not moved since.
        parts: The images in small batches.
        states: Of the random generators before each.
        buffers: As they were before the first.
        reached: Names of the parameters that the features are made of.
        precision: Of the first pass.
    """

    model: nn.Module
    parts: tuple[Tensor, ...]
    states: tuple[_RandomState, ...]
    buffers: Mapping[str, Tensor]
    reached: tuple[str, ...]
    precision: _Precision

    def gradients(self, gradient: Tensor) -> list[Tensor | None]:
        """Gradients of the reached parameters; `gradient`: (R, C) of the features."""
        device = self.parts[0].device
        stage = _FeatureStage(self.model)
        trained = {name: p.detach().requires_grad_() for name, p in self.model.named_parameters() if p.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        tensors = {f"model.{name}": tensor for name, tensor in (trained | buffers).items()}
        rows = gradient.split([part.shape[0] for part in self.parts])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for images, state, of_part in zip(self.parts, self.states, rows, strict=True):
                _set_random_state(state, device)
                # A context for each: autocast keeps weights that it has cast, and their graph, until it ends.
                with torch.enable_grad(), self.precision():
                    features = functional_call(stage, tensors, (images,))
                if features.requires_grad:
                    torch.autograd.backward(features, of_part)
        strays = [name for name, alias in trained.items() if alias.grad is not None and name not in self.reached]
        if strays:
            raise InputError(
                f"The backbone uses other parameters for one small batch than for another, such as `{strays[0]}`: "
                "expected the same for all. Switch off the drawing of whole layers, or set accumulation.micro_batch to "
                "null."
            )
        return [trained[name].grad for name in self.reached]


class _FeatureStage(nn.Module):
    """`features` of a metric model as the forward pass of a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.model).features(images))


def _reached_parameters(model: nn.Module, features: Tensor) -> dict[str, nn.Parameter]:
    """The trained parameters of `model`, by name, that are in the graph of `features`."""
    inside: set[int] = set()
    seen, open_nodes = set(), [features.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            inside.add(id(node.variable))
        open_nodes += [following for following, _ in node.next_functions]
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside}


def _live_batch_norms(backbone: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorms that take statistics of the batch, by name."""
    return {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    }


def _random_state(device: torch.device) -> _RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: _RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
