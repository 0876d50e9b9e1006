"""Weight files: read them, match them with a network, say what was left out."""

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gcahng.errors import ConfigError
from gcahng.models.torch_file import read_torch_file

_LOG = logging.getLogger(__name__)

# What published files call the parts behind the features: classifiers and auxiliary heads.
_HEAD_PREFIXES = (
    "fc.",
    "head.",
    "head_dist.",
    "heads.",
    "classifier.",
    "last_linear.",
    "aux1.",
    "aux2.",
)
# How training code wraps a state dictionary.
_WRAPPERS = ("state_dict", "model")

LOCAL_FILE_REPAIR = (
    "Without network, fetch the file elsewhere and pass model.weights=FILE (.safetensors, .pth or "
    ".pt), or set model.pretrained=false."
)

Convert = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def load_weights(network: nn.Module, source: str | Mapping[str, Tensor], *, convert: Convert | None = None) -> str:
    """Fill a network from a weight file; every tensor of the network must be in it, and fit.

    Classifier and auxiliary heads of the file that the network lacks are dropped and reported.

    Args:
        network: Its parameter names are compared with the file's as they stand.
        source: A .safetensors, .pth or .pt file, or a state dictionary.
        convert: Renames and reshapes published tensors, given (state dictionary, network).
    Returns:
        One line: the file, the number of tensors, what was dropped.
    Raises:
        ConfigError: the file is unreadable, or its tensors do not match; the message names them.
    """
    if isinstance(source, str):
        state, title = read_weight_file(Path(source)), f"`{source}`"
    else:
        state, title = dict(source), "downloaded weights"
    wanted = network.state_dict()
    if convert is not None:
        state = _converted(state, network, convert, title)
    extra = sorted(key for key in state if key not in wanted)
    dropped = [key for key in extra if key.startswith(_HEAD_PREFIXES)]
    state = {key: tensor for key, tensor in state.items() if key not in dropped}
    faults = _mismatches(state, wanted)
    if faults:
        raise ConfigError(
            f"Weights {title} do not fit the backbone: {'; '.join(faults)}. Give the file of this "
            "architecture (model.weights), or change model.backbone or model.backbone_args."
        )
    network.load_state_dict(state, strict=False)  # strict up to batch counters, checked above
    report = f"{title}: {len(state)} tensors" + (f", dropped {_some(dropped)}" if dropped else "")
    _LOG.info("Backbone weights from %s", report)
    return report


def _converted(state: dict[str, Tensor], network: nn.Module, convert: Convert, title: str) -> dict[str, Tensor]:
    try:
        return convert(state, network)
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"Weights {title} are not in a known form for this backbone: converting them raised "
            f"{type(error).__name__}: {error}. Give the file of this architecture (model.weights)."
        ) from error


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors, .pth or .pt file without running code from it; DataParallel's prefix goes.

    Raises:
        ConfigError: the file is missing, damaged, or holds other things than named tensors.
    """
    state, _ = read_state_dict(path)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def read_state_dict(path: Path, named_by: str = "model.weights") -> tuple[dict[str, Tensor], list[str]]:
    """Read a state dictionary, alone or wrapped, without running code from the file.

    Args:
        path: A .safetensors, .pth or .pt file.
        named_by: What named it, for messages.
    Returns:
        The tensors by their names in the file, and the names of what lies beside them in its wrapper (`epoch`, say).
    Raises:
        ConfigError: the file is missing, damaged, or holds other things than named tensors.
    """
    if not path.is_file():
        raise ConfigError(f"Weight file `{path}` does not exist. Correct {named_by}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path), []
        content = read_torch_file(path)
    except SafetensorError as error:
        raise ConfigError(f"Weight file `{path}` is no whole safetensors file: {error}. Fetch it again.") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"Weight file `{path}` holds other things than tensors, or is damaged; it is not read, "
            "since that could run code. Save its state dictionary alone, best as .safetensors."
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise ConfigError(
            f"Weight file `{path}` cannot be read: {type(error).__name__}: {error}. Fetch it again."
        ) from error
    return _named_tensors(content, path)


def _named_tensors(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    beside: list[str] = []
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            beside += [str(key) for key in content if key != wrapper]
            content = content[wrapper]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(tensor, Tensor) for tensor in content.values())
    ):
        raise ConfigError(
            f"Weight file `{path}` must hold a state dictionary (names to tensors), alone or under "
            f"{' or '.join(f'`{name}`' for name in _WRAPPERS)}: got {type(content).__name__}. Save "
            "model.state_dict()."
        )
    return {str(key): tensor for key, tensor in content.items()}, beside


def _mismatches(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    # Files of before PyTorch 0.4.1 have no batch counters, which nothing here reads.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"`{key}` is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    faults = []
    if missing:
        faults.append(f"missing {_some(missing)}")
    if unexpected:
        faults.append(f"unknown {_some(unexpected)}")
    if shapes:
        faults.append("; ".join(shapes[:5]) + (f"; {len(shapes) - 5} more" if shapes[5:] else ""))
    return faults


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if names[5:] else "")
