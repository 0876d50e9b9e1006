"""Checkpoints: one folder per step, written whole or not at all.

`step-N/` holds `<part>.safetensors` for every module, `optimizer-<part>.pt` for every optimiser, `ranks.safetensors`
with what each rank has for itself (random states), `state.json` (counters, averages, schedules, classes),
`config.yaml`, and `manifest.json` with the size and sha256 of each file. It is written as `step-N.partial` and renamed;
a write that fails leaves nothing behind, and a checkpoint that it was to replace stays. Links `last`, `best` and
`best_test` beside it name the folders a reader wants. Nothing in it is unpickled without torch's `weights_only`.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from gcahng.errors import ConfigError, DataError, TrainingError
from gcahng.training.checkpoint_files import read_listing, read_object, read_optimizer_file, read_safetensors
from gcahng.training.step_dump import FOLDER as FAULTS

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
LINKS = ("last", "best", "best_test")
# In the state of a checkpoint that was made of a released file: what is said of that, and whether its epoch was chosen
# by the test classes.
RELEASED, CHOSEN_ON_TEST = "released", "chosen_on_test"
RANKS = "ranks"
PARTIAL = ".partial"
REPLACED = ".replaced"  # what stood at step-N until its successor is there
DAMAGED = ".damaged"
_LISTED = 5  # differing entries of one kind that an error names


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    modules: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
    config_yaml: str,
    ranks: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `run_dir/step-N` and return it; an existing folder of that name is replaced.

    Args:
        run_dir: Run folder.
        step: N.
        modules: The parts' state by name.
        optimizers: The optimisers' state by part, as one process without wrappers has it.
        state: What `state.json` holds.
        config_yaml: Resolved configuration.
        ranks: What each rank has for itself, by `rank/name`.
    Raises:
        TrainingError: It cannot be written (a full disk, say); what stood in `run_dir` is as before.
    """
    target = run_dir / f"step-{step}"
    partial, replaced = run_dir / f"step-{step}{PARTIAL}", run_dir / f"step-{step}{REPLACED}"
    for left_over in run_dir.glob(f"step-*{PARTIAL}"):  # of a killed process
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_parts(partial, {**modules, RANKS: ranks or {}}, optimizers)
        (partial / STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (partial / CONFIG).write_text(config_yaml, encoding="utf-8")
        listing = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if target.exists():  # a folder cannot be renamed over another one: there is always one of the two
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
        _sync(run_dir)
        shutil.rmtree(replaced, ignore_errors=True)
    # Beside OSError: safetensors and torch.save have their own errors for a disk that refuses.
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise TrainingError(
            f"Checkpoint {target} cannot be written ({error}): make room or repair the disk. The newest whole "
            "checkpoint is as it was."
        ) from error
    return target


def _write_parts(
    folder: Path, modules: Mapping[str, Mapping[str, Tensor]], optimizers: Mapping[str, Mapping[str, Any]]
) -> None:
    for name, state in modules.items():
        tensors, seen = {}, set()
        for key, value in state.items():
            tensor = value.detach().cpu().contiguous()
            memory = tensor.untyped_storage()
            # safetensors refuses tensors that share memory, as tied weights of an own backbone do.
            shares = memory.data_ptr() in seen or memory.nbytes() != tensor.nbytes
            seen.add(memory.data_ptr())
            tensors[key] = tensor.clone() if shares else tensor
        if tensors:
            save_file(tensors, folder / f"{name}.safetensors")
    for name, moments in optimizers.items():
        torch.save(dict(moments), folder / f"optimizer-{name}.pt")


def point(run_dir: Path, name: str, target: Path) -> None:
    """Make the link `run_dir/name` name the checkpoint folder `target`, in one move."""
    temporary = run_dir / f"{name}{PARTIAL}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(run_dir / name)
    _sync(run_dir)  # before anything is removed that the link named until now


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints; folders that a link names stay."""
    kept = {(run_dir / name).resolve() for name in LINKS}
    folders = checkpoints(run_dir)
    for folder in folders[: max(0, len(folders) - keep_last)]:
        if folder.resolve() not in kept:
            # Not half a checkpoint under its name if the process is killed now; the next save removes the rest.
            gone = folder.with_name(folder.name.removesuffix(REPLACED) + PARTIAL)
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)  # NFS keeps what a reader holds open; the checkpoint is saved


def clear_run(run_dir: Path) -> None:
    """Remove the checkpoints and their links; other files of a run are replaced as a new one writes them."""
    for entry in run_dir.iterdir():
        if entry.is_symlink() and entry.name in LINKS:
            entry.unlink()
        elif entry.is_dir() and (_step_number(entry) is not None or entry.name in ("tensorboard", FAULTS)):
            shutil.rmtree(entry)
    (run_dir / "results.json").unlink(missing_ok=True)


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
    for name, size, digest in read_listing(folder / MANIFEST):
        file = folder / name
        if not file.is_file():
            raise DataError(f"Checkpoint {folder} lacks {name}. Use another checkpoint.")
        try:
            whole = file.stat().st_size == size and _sha256(file) == digest
        except OSError as error:
            raise DataError(f"Checkpoint file {file} is unreadable ({error}). Use another checkpoint.") from error
        if not whole:
            raise DataError(
                f"Checkpoint file {file} is damaged: expected {size} bytes with sha256 {digest[:12]}..., "
                f"got {file.stat().st_size} bytes. Use another checkpoint."
            )


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a verified checkpoint."""
    return read_object(folder / STATE)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one part; empty if the part has none."""
    file = folder / f"{name}.safetensors"
    return read_safetensors(file) if file.is_file() else {}


def load_module(module: nn.Module, folder: Path, name: str) -> None:
    """Load one part exactly.

    Raises:
        ConfigError: Names or shapes differ; the message counts them and lists the first of each kind.
    """
    saved, own = read_tensors(folder, name), module.state_dict()
    faults = _differences(saved, own)
    if faults:
        listing = "\n".join(f"  {fault}" for fault in faults)
        raise ConfigError(
            f"Checkpoint {folder} does not fit part `{name}`, expected {len(own)} entries, got {len(saved)}:\n"
            f"{listing}\nUse the configuration it was trained with, without other settings of the model."
        )
    module.load_state_dict(saved)


def _differences(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """How a checkpoint's entries differ from a module's: one line each for missing, unknown, and other shapes."""
    other = [key for key in own if key in saved and own[key].shape != saved[key].shape]
    shapes = [f"{key} has {tuple(saved[key].shape)}, the model {tuple(own[key].shape)}" for key in other]
    kinds = {
        "missing in the checkpoint": [key for key in own if key not in saved],
        "not in the model": [key for key in saved if key not in own],
        "of another shape": shapes,
    }
    lines = []
    for kind, entries in kinds.items():
        more = f", and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
        if entries:
            lines.append(f"{len(entries)} {kind}: {', '.join(entries[:_LISTED])}{more}")
    return lines


def optimizer_parts(folder: Path) -> list[str]:
    """The parts whose optimisers a checkpoint holds."""
    return sorted(file.stem.removeprefix("optimizer-") for file in folder.glob("optimizer-*.pt"))


def read_optimizer(folder: Path, name: str, like: Optimizer) -> dict[str, Any]:
    """One optimiser's state, to be loaded.

    Args:
        folder: Checkpoint.
        name: Part.
        like: The optimiser that will take it: whether it is fused stays as it is.
    Raises:
        DataError: The file is missing, or holds other things than tensors and plain values.
    """
    file = folder / f"optimizer-{name}.pt"
    if not file.is_file():
        raise DataError(f"Checkpoint {folder} lacks {file.name}: it cannot be resumed. Use train.init_from.")
    state = read_optimizer_file(file)
    for saved, own in zip(state["param_groups"], like.param_groups, strict=False):
        if "fused" in own:
            saved["fused"] = own["fused"]  # belongs to the device of this run, not to the checkpoint's
    return state


def start_from(modules: Mapping[str, nn.Module], folder: Path, *, same_classes: bool) -> list[str]:
    """Start from a checkpoint's weights; what depends on the class set stays fresh if that is another one.

    The backbone with its head and the body of the graph network must fit exactly. The classifier, the graph's node
    classifier and the metric loss (proxies) are loaded if the classes are the same and everything fits.

    Args:
        modules: Parts of the new run.
        folder: Verified checkpoint.
        same_classes: Whether label n means the same class in both runs.
    Returns:
        Names of entries that were left fresh.
    Raises:
        ConfigError: Names or shapes differ elsewhere.
    """
    fresh = []
    for name, module in modules.items():
        saved, own = read_tensors(folder, name), module.state_dict()
        loaded = {}
        for key in sorted(own.keys() | saved.keys()):
            fits = key in saved and key in own and saved[key].shape == own[key].shape
            if not saved or _is_of_classes(name, key):
                if fits and same_classes:
                    loaded[key] = saved[key]
                elif key in own:
                    fresh.append(f"{name}.{key}")
            elif fits:
                loaded[key] = saved[key]
            else:
                raise ConfigError(
                    f"`train.init_from` {folder} does not fit part `{name}`: {key} expected "
                    f"{_shape(own, key)}, got {_shape(saved, key)}. Use the same model and graph settings."
                )
        module.load_state_dict(loaded, strict=False)
    return fresh


def _is_of_classes(part: str, key: str) -> bool:
    return part in ("classifier", "metric_loss") or (part == "graph" and key.startswith("node_classifier."))


def _shape(tensors: Mapping[str, Tensor], key: str) -> str:
    return f"shape {tuple(tensors[key].shape)}" if key in tensors else "nothing"


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next((f for f in reversed(checkpoints(run_dir)) if (f / MANIFEST).is_file()), None)


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run whose files are as they were written; a warning names each newer one.

    Raises:
        DataError: There are checkpoints, and every one is damaged.
    """
    faults: list[DataError] = []
    for folder in reversed(checkpoints(run_dir)):
        try:
            verify(folder)
        except DataError as error:
            faults.append(error)
            continue
        for fault in faults:
            log.warning("%s Going back to %s.", str(fault).removesuffix(" Use another checkpoint."), folder.name)
        return folder
    if faults:
        raise DataError(
            f"All {len(faults)} checkpoints of {run_dir} are damaged, the newest: {faults[0]} Start the run anew with "
            "--overwrite, or in another run.dir."
        )
    return None


def put_in_order(run_dir: Path, folder: Path) -> None:
    """Make a run folder that of a run that stands at `folder`, which it goes on from.

    Newer checkpoints are damaged: they are renamed, and not counted. Links that name them, or nothing, go; `last` names
    `folder`. What a killed process left half renamed gets its name back.
    """
    whole = checkpoints(run_dir)
    resolved = [entry.resolve() for entry in whole]
    if folder.resolve() not in resolved:
        return
    for later in whole[resolved.index(folder.resolve()) + 1 :]:
        aside = later.with_name(later.name.removesuffix(REPLACED) + DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        later.rename(aside)
    if folder.suffix == REPLACED:
        folder = folder.rename(folder.with_suffix(""))
    for name in LINKS:
        link = run_dir / name
        if link.is_symlink() and not link.is_dir():
            link.unlink()
    point(run_dir, "last", folder)


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders step-N, by N; step-N.replaced stands before step-N."""
    found = []
    for folder in run_dir.glob("step-*"):
        number = _step_number(folder)
        if number is not None and folder.suffix in ("", REPLACED):
            found.append((number, folder.suffix == "", folder))
    return [folder for _, _, folder in sorted(found)]


def _step_number(path: Path) -> int | None:
    """N of step-N, step-N.partial and the like; None for other names."""
    name = path.name
    for suffix in (PARTIAL, REPLACED, DAMAGED):
        name = name.removesuffix(suffix)
    digits = name.removeprefix("step-")
    is_step = name.startswith("step-") and digits.isascii() and digits.isdigit()
    return int(digits) if is_step else None


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
