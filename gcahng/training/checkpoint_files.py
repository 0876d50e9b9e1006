"""Reads the files of a checkpoint, which may be anybody's: what is wrong with one is one error, and nothing runs."""

import json
import pickle
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gcahng.errors import DataError
from gcahng.models.torch_file import read_torch_file

_USE_ANOTHER = "Use another checkpoint."
_MAX_JSON_BYTES = 1 << 28


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: It is missing, damaged, too large, or holds something else.
    """
    try:
        size = file.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise DataError(
                f"{file} is too large: expected at most {_MAX_JSON_BYTES} bytes, got {size}. {_USE_ANOTHER}"
            )
        found = json.loads(file.read_text(encoding="utf-8"))
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is unreadable ({error!s:.200}). {_USE_ANOTHER}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} is unreadable (no JSON object, but {type(found).__name__}). {_USE_ANOTHER}")
    return found


def read_listing(manifest: Path) -> list[tuple[str, int, str]]:
    """Name, bytes and sha256 of every file that a checkpoint's manifest lists.

    Raises:
        DataError: The manifest is damaged, or names a file elsewhere.
    """
    items = []
    for name, entry in read_object(manifest).items():
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise DataError(f"{manifest} is unreadable (bytes and sha256 of {name[:80]!r}). {_USE_ANOTHER}")
        if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name) > 200:
            raise DataError(f"{manifest} names {name[:80]!r}: expected files of its own folder. {_USE_ANOTHER}")
        items.append((name, size, digest))
    return items


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        DataError: It is no whole safetensors file.
    """
    try:
        return load_file(file)
    # What it says of sizes, types and texts that it does not know differs from version to version.
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{file} is no whole safetensors file ({error!s:.200}). {_USE_ANOTHER}") from error


def read_optimizer_file(file: Path) -> dict[str, Any]:
    """An optimiser's state: tensors and plain values.

    Raises:
        DataError: The file is damaged, or holds other things.
    """
    try:
        state = read_torch_file(file)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file} holds more than tensors and plain values, or is damaged: it is not read, since that could run "
            "code. Use train.init_from."
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise DataError(f"{file} cannot be read ({type(error).__name__}: {error!s:.200}). {_USE_ANOTHER}") from error
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise DataError(f"{file} is no optimiser's state: expected `param_groups`. {_USE_ANOTHER}")
    return state
