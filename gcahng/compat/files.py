"""Released files: reading them without running code, and writing them."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from gcahng.compat.convert import ReleasedState, from_released, listed, to_released
from gcahng.compat.names import METRIC_MODEL
from gcahng.errors import ConfigError
from gcahng.models.weights import read_state_dict
from gcahng.training.output_files import whole_file

log = logging.getLogger(__name__)


def read_released(file: Path) -> ReleasedState:
    """Read a .pth, .pt or .safetensors file of the authors' code; a state dictionary may stand under `state_dict`.

    Raises:
        ConfigError: It is missing, damaged, holds other things than tensors, or entries that the authors' code does
            not have.
    """
    tensors, beside = read_state_dict(file, "the path")
    odd = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise ConfigError(f"`{file}` holds tensors without values of their own: {listed(odd)}. Save it on a CPU.")
    try:
        state = from_released(tensors)
    except ConfigError as error:
        raise ConfigError(f"`{file}`: {error}") from None
    if METRIC_MODEL not in state.parts:
        raise ConfigError(f"`{file}` holds no metric model: got {listed(state.parts)}. Give the file that does.")
    for what, names in (("beside the state dictionary, not read", beside), ("in no use", sorted(state.unused))):
        if names:
            log.info("%s, %s: %s.", file.name, what, listed(names))
    return state


def write_released(option: str, file: Path, state: ReleasedState) -> None:
    """Write a state dictionary under the authors' names, as their code reads it.

    Args:
        option: That names the file, for messages.
        file: To write; one that exists is replaced when the new one is whole.
        state: What to write.
    Raises:
        ConfigError: A part has entries that the authors' code does not have, or the file cannot be written.
    """
    tensors = to_released(state)
    with whole_file(option, file) as stream:
        torch.save(tensors, stream)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
