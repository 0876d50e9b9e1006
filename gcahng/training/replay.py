"""Repeats the pass of a step that met numbers that are not finite, from its dump (`step_dump`), without the data set.

In one process, on the global batch, whatever number of ranks the run had: what BatchNorms take from each rank's images
alone (`distributed.batch_norm` local) and what a backbone draws on other ranks than the first are different then.

Letters: B samples of the batch, D channels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gcahng.data.images.transforms import normalise
from gcahng.distributed import ONE
from gcahng.errors import ConfigError
from gcahng.models import Embedder
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import PlainBackend, Precision
from gcahng.training.config import Config
from gcahng.training.data_setup import image_transform
from gcahng.training.evaluate_checkpoint import embedding_config
from gcahng.training.finite_checks import finite_rows
from gcahng.training.parts import build_modules, step_settings
from gcahng.training.step import CLASSIFIER, GENERATION, METRIC, TrainingStep
from gcahng.training.step_dump import CONFIG, Fault, StepDump, read_dump
from gcahng.training.step_runner import model_seed
from gcahng.training.trusted import check_components


@dataclass
class Replayed:
    """What a repeated pass showed.

    Attributes:
        fault: What the run met.
        precision, device: Of the replay.
        losses: Of the pass, by name; none where embeddings are not finite.
        bad_module: First module whose output was not finite, "part.name", in the order of the forward pass.
        bad_module_kind: Its class.
        bad_weights: Parameters and buffers that are not finite themselves.
        bad_gradients: Parameters whose gradients are not finite.
        bad_positions: Samples whose embeddings are not finite, by their places in the batch.
    """

    fault: Fault
    precision: str
    device: str
    losses: dict[str, float] = field(default_factory=dict)
    bad_module: str | None = None
    bad_module_kind: str | None = None
    bad_weights: list[str] = field(default_factory=list)
    bad_gradients: list[str] = field(default_factory=list)
    bad_positions: list[int] = field(default_factory=list)

    @property
    def reproduced(self) -> bool:
        """Whether an embedding, a loss or a gradient was not finite again."""
        bad_loss = any(not math.isfinite(value) for value in self.losses.values())
        return bool(bad_loss or self.bad_gradients or self.bad_positions)

    @property
    def bad_samples(self) -> list[str]:
        """Keys of the samples at `bad_positions`."""
        return [self.fault.keys[position] for position in self.bad_positions]


class _BadEmbeddings(Exception):
    """Nothing behind them would be finite."""


class _Notes:
    """Finite checks that note what they are told, and stop at embeddings alone."""

    gate: Tensor | None = None

    def __init__(self, found: Replayed) -> None:
        self._found = found

    def begin(self, step: int) -> None:
        """Nothing to note."""

    def embeddings(self, z: Tensor, whole: Tensor) -> None:
        finite = finite_rows(z)
        if not bool(finite.all()):
            # As in the run: a norm over the batch spreads one bad image to every embedding.
            good = finite if bool(whole.all()) else whole.bool()
            self._found.bad_positions = (~good).nonzero().flatten().tolist()
            raise _BadEmbeddings

    def loss(self, loss: Tensor, reach: str) -> None:
        """The pass gives its losses by name."""

    def gradients(self, parts: Mapping[str, Sequence[Tensor]], reach: str) -> None:
        """The backend notes them by name."""

    def settle(self) -> None:
        """Nothing is open."""

    def end(self) -> None:
        """Nothing is open."""

    def finish(self) -> None:
        """Nothing is open."""


class _StillBackend(PlainBackend):
    """Runs passes, notes bad gradients by the names of their parameters, and moves nothing."""

    def __init__(self, modules: Mapping[str, nn.Module], found: Replayed, device: torch.device) -> None:
        super().__init__(modules, {}, {}, device=device, precision=cast(Precision, found.precision))
        self.checks = _Notes(found)
        self.scaler = None  # what overflows by its scale alone is no fault
        self._found = found

    def step(self, names: Sequence[str], reach: str) -> None:
        for part in names:
            for name, parameter in self.modules[part].named_parameters():
                if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                    self._found.bad_gradients.append(f"{part}.{name}")


def replay(
    folder: Path, *, device: str | None = None, precision: str | None = None, trust_components: bool = False
) -> Replayed:
    """Repeat the failing pass of a dump.

    Args:
        folder: RUN/faults/step-N.
        device: "cpu" or "cuda"; by default the run's, or the CPU where there is no CUDA.
        precision: "fp32", "bf16" or "fp16"; by default the run's.
        trust_components: Run code from outside this library, if its configuration names some.
    Raises:
        DataError: The dump is damaged.
        ConfigError: Its parts cannot be built here, they need `trust_components`, or the precision does not go with the
            device.
    """
    dump = read_dump(folder)
    fault = dump.fault
    where = fault.device if device is None and torch.cuda.is_available() else device or "cpu"
    if where.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("`--device` is cuda, but torch sees no CUDA device. Use cpu.")
    config = embedding_config(folder / CONFIG, ["distributed.shard_classes=false"])
    check_components(config, folder, trusted=trust_components, whole=True)
    found = Replayed(fault, precision or fault.precision, where)
    modules = _modules(config, dump, torch.device(where), folder)
    found.bad_weights = _bad_weights(modules)
    backend = _StillBackend(modules, found, torch.device(where))
    step = TrainingStep(backend, step_settings(config), ranks=ONE)
    with _outputs_watched(modules, found), suppress(_BadEmbeddings):
        losses = _pass(step, dump, config, torch.device(where))
        found.losses = {name: float(value) for name, value in losses.items()}
    return found


def _modules(config: Config, dump: StepDump, device: torch.device, folder: Path) -> dict[str, nn.Module]:
    modules = build_modules(config, dump.fault.num_training_classes, load_weights=False)
    for name, module in modules.items():
        try:
            module.load_state_dict(dump.parts.get(name, {}))
        except RuntimeError as error:
            found = " ".join(str(error).split()).rstrip(" .")
            raise ConfigError(
                f"Part `{name}` of the dump `{folder}` does not fit what its configuration makes: {found}. Replay it "
                "with the version of gcahng, and of components of your own, that the run had."
            ) from error
        module.to(device).train()
    cast(Embedder, modules["metric_model"]).set_warm_up(dump.fault.warm_up)
    return modules


def _pass(step: TrainingStep, dump: StepDump, config: Config, device: torch.device) -> dict[str, Tensor]:
    """The losses of the pass that failed."""
    fault, batch = dump.fault, {name: tensor.to(device) for name, tensor in dump.batch.items()}
    averages = EpochAverages()
    averages.metric_loss, averages.generation_loss = fault.metric_loss, fault.generation_loss
    labels = dump.batch["labels"]
    if fault.reach == METRIC:
        inputs = normalise(batch["images"], image_transform(config.data.transform))
        torch.manual_seed(model_seed(config.seed, fault.step, 0))
        return step.metric_pass(inputs, labels, averages, step=fault.step)[1]
    begun = step.batch_of(batch["embeddings"], batch.get("features"), batch["labels"], averages, fault.step)
    passes: dict[str, Callable[..., dict[str, Tensor]]] = {
        CLASSIFIER: step.classifier_pass,
        GENERATION: step.generation_pass,
    }
    return passes[fault.reach](begun)


def _bad_weights(modules: Mapping[str, nn.Module]) -> list[str]:
    return [
        f"{part}.{name}"
        for part, module in modules.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if not _finite(tensor)
    ]


@contextmanager
def _outputs_watched(modules: Mapping[str, nn.Module], found: Replayed) -> Iterator[None]:
    """Within it, the first module whose output is not finite is noted; a module is done before what it is part of."""

    def watch(name: str, module: nn.Module, output: Any) -> None:
        if found.bad_module is None and not all(_finite(tensor) for tensor in _tensors(output)):
            found.bad_module, found.bad_module_kind = name, type(module).__name__

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: watch(name, module, output)

    with ExitStack() as stack:
        for part, module in modules.items():
            for name, inner in module.named_modules():
                handle = inner.register_forward_hook(hook(f"{part}.{name}" if name else part))
                stack.callback(handle.remove)
        yield


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module gives."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output):
        for entry in fields(output):
            yield from _tensors(getattr(output, entry.name))
