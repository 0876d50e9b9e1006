"""Checkpoints: one folder per step, written whole or not at all.

`step-N/` holds `<part>.safetensors` for every module, `optimizer-<part>.pt` for every optimiser, `state.json`
(counters, averages, schedules, classes), `config.yaml`, and `manifest.json` with the size and sha256 of each file.
It is written as `step-N.partial` and renamed. Links `last`, `best` and `best_test` beside it name the folders a
reader wants. Nothing in it is unpickled without torch's `weights_only`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from gcahng.errors import ConfigError, DataError

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
CLASS_DEPENDENT = ("node_classifier.weight", "node_classifier.bias", "weight", "bias", "proxies")


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    state: Mapping[str, Any],
    config_yaml: str,
) -> Path:
    """Write `run_dir/step-N` and return it; an existing folder of that name is replaced."""
    target = run_dir / f"step-{step}"
    partial = run_dir / f"step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, module in modules.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        if tensors:
            save_file(tensors, partial / f"{name}.safetensors")
    for name, optimizer in optimizers.items():
        torch.save(optimizer.state_dict(), partial / f"optimizer-{name}.pt")
    (partial / STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (partial / CONFIG).write_text(config_yaml, encoding="utf-8")
    listing = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _sync(run_dir)
    return target


def point(run_dir: Path, name: str, target: Path) -> None:
    """Make the link `run_dir/name` name the checkpoint folder `target`, in one move."""
    temporary = run_dir / f"{name}.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(run_dir / name)


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints; folders that a link names stay."""
    kept = {link.resolve().name for link in run_dir.iterdir() if link.is_symlink()}
    folders = sorted(run_dir.glob("step-*[0-9]"), key=lambda f: int(f.name.split("-")[1]))
    for folder in folders[: max(0, len(folders) - keep_last)]:
        if folder.name not in kept:
            shutil.rmtree(folder)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: a folder, a link, or a file inside a folder.

    Raises:
        ConfigError: There is no checkpoint.
    """
    folder = path.parent if path.is_file() else path
    if not (folder / MANIFEST).is_file() or not (folder / STATE).is_file():
        raise ConfigError(
            f"`{path}` is no checkpoint: expected a folder step-N with {MANIFEST} and {STATE}. "
            "Give such a folder, or a run folder's `last` or `best`."
        )
    return folder.resolve()


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DataError: A file is missing or damaged.
    """
    try:
        listing = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        items = [(name, entry["bytes"], entry["sha256"]) for name, entry in listing.items()]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(f"{folder / MANIFEST} is unreadable ({error}). Use another checkpoint.") from error
    for name, size, digest in items:
        file = folder / name
        if not file.is_file():
            raise DataError(f"Checkpoint {folder} lacks {name}. Use another checkpoint.")
        if file.stat().st_size != size or _sha256(file) != digest:
            raise DataError(
                f"Checkpoint file {file} is damaged: expected {size} bytes with sha256 {digest[:12]}..., "
                f"got {file.stat().st_size} bytes. Use another checkpoint."
            )


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a verified checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one part; empty if the part has none."""
    file = folder / f"{name}.safetensors"
    return load_file(file) if file.is_file() else {}


def load_module(module: nn.Module, folder: Path, name: str) -> None:
    """Load one part exactly.

    Raises:
        ConfigError: Names or shapes differ; the message lists them.
    """
    saved, own = read_tensors(folder, name), module.state_dict()
    faults = [f"{key} is missing" for key in own.keys() - saved.keys()]
    faults += [f"{key} is not in the model" for key in saved.keys() - own.keys()]
    faults += [
        f"{key} has shape {tuple(saved[key].shape)}, the model {tuple(own[key].shape)}"
        for key in own.keys() & saved.keys()
        if own[key].shape != saved[key].shape
    ]
    if faults:
        raise ConfigError(
            f"Checkpoint {folder} does not fit part `{name}`: " + "; ".join(sorted(faults)[:8]) + ". "
            "Use the configuration it was trained with."
        )
    module.load_state_dict(saved)


def load_optimizer(optimizer: Optimizer, folder: Path, name: str) -> None:
    """Load one optimiser's state.

    Raises:
        DataError: The file is missing.
    """
    file = folder / f"optimizer-{name}.pt"
    if not file.is_file():
        raise DataError(f"Checkpoint {folder} lacks {file.name}: it cannot be resumed. Use train.init_from.")
    optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


def start_from(modules: Mapping[str, nn.Module], folder: Path) -> list[str]:
    """Start from a checkpoint's weights; what depends on the class set stays fresh if its shape differs.

    Args:
        modules: Parts of the new run.
        folder: Verified checkpoint.
    Returns:
        Names of entries that were left fresh.
    Raises:
        ConfigError: Anything else differs.
    """
    fresh = []
    for name, module in modules.items():
        saved, own = read_tensors(folder, name), module.state_dict()
        for key, value in own.items():
            if key in saved and saved[key].shape == value.shape:
                continue
            by_class = key in CLASS_DEPENDENT and name != "metric_model"
            if not by_class and saved:
                got = tuple(saved[key].shape) if key in saved else "nothing"
                raise ConfigError(
                    f"`train.init_from` {folder} does not fit part `{name}`: {key} expected shape "
                    f"{tuple(value.shape)}, got {got}. Use the same model and graph settings."
                )
            fresh.append(f"{name}.{key}")
        fitting = {key: saved[key] for key in own if f"{name}.{key}" not in fresh}
        module.load_state_dict(fitting, strict=False)
    return fresh


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    folders = [f for f in run_dir.glob("step-*") if f.name[5:].isdigit() and (f / MANIFEST).is_file()]
    return max(folders, key=lambda f: int(f.name[5:]), default=None)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
