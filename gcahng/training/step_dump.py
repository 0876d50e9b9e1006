"""A step that met numbers that are not finite, as files: RUN/faults/step-N, which `launch/replay.py` repeats.

The folder holds `fault.json`, `config.yaml`, `batch.safetensors` (the global batch) and one safetensors file of each
part as it was when the failing pass began; nothing in it is pickled. It is written as `step-N.partial` and renamed.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gcahng.errors import DataError

FOLDER = "faults"
FAULT, CONFIG, BATCH = "fault.json", "config.yaml", "batch"
VERSION = 1
_CHOICES = {
    "reach": ("metric", "classifier", "generation"),
    "precision": ("fp32", "bf16", "fp16"),
    "device": ("cpu", "cuda"),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What `fault.json` says.

    Attributes:
        step: Global step; N of the folder.
        message: The error, as the run told it.
        what: "embedding", "loss" or "gradient".
        reach: The pass: "metric", "classifier" or "generation".
        part: Whose gradient.
        positions: Of samples with bad embeddings in the global batch.
        keys: (B,) sample keys of the batch, group-major.
        class_counts: (W,) classes of each rank.
        num_training_classes: N.
        metric_loss, generation_loss: Means of the epoch before, as the step took them.
        warm_up: Whether the head alone was trained.
        precision, device: Of the run.
        version: Of the format.
    """

    step: int
    message: str
    what: str
    reach: str
    part: str | None
    positions: tuple[int, ...]
    keys: tuple[str, ...]
    class_counts: tuple[int, ...]
    num_training_classes: int
    metric_loss: float
    generation_loss: float
    warm_up: bool
    precision: str
    device: str
    version: int = VERSION


@dataclass(frozen=True)
class StepDump:
    """A step as it was.

    Attributes:
        fault: What was met.
        config_yaml: Resolved configuration.
        batch: "images" (B, 3, H, W) uint8, "labels" and "rows" (B,) int64, all group-major; "embeddings" (B, D) where
            a later pass failed, with a generator also "features" (B, C).
        parts: State of each part.
    """

    fault: Fault
    config_yaml: str
    batch: dict[str, Tensor]
    parts: dict[str, dict[str, Tensor]]


def dump_folder(run_dir: Path, step: int) -> Path:
    """Where the dump of a step lies."""
    return run_dir / FOLDER / f"step-{step}"


def has_room(run_dir: Path, step: int, most: int) -> bool:
    """Whether there are fewer than `most` dumps of other steps."""
    others = {path.name for path in (run_dir / FOLDER).glob("step-*") if path.suffix == ""}
    return len(others - {f"step-{step}"}) < most


def write_dump(run_dir: Path, dump: StepDump) -> Path | None:
    """Write the folder, whole or not at all: None if it cannot be written, which is logged and no more."""
    target = dump_folder(run_dir, dump.fault.step)
    partial = target.with_name(f"{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / CONFIG).write_text(dump.config_yaml, encoding="utf-8")
        for name, tensors in {BATCH: dump.batch, **dump.parts}.items():
            # Copies: safetensors refuses tensors that share memory.
            copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            if copies:
                save_file(copies, partial / f"{name}.safetensors")
        (partial / FAULT).write_text(json.dumps(asdict(dump.fault), indent=1) + "\n", encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except Exception as error:  # whatever it is: the fault itself is what must be told
        shutil.rmtree(partial, ignore_errors=True)
        log.error("Step %d cannot be written to %s (%s): it cannot be replayed.", dump.fault.step, target, error)
        return None
    return target


def read_dump(folder: Path) -> StepDump:
    """Read what `write_dump` wrote.

    Raises:
        DataError: There is no such folder, or a file of it is damaged or of another version.
    """
    if not (folder / FAULT).is_file():
        raise DataError(f"`{folder}` is no dump: expected a folder with {FAULT}. Give RUN/{FOLDER}/step-N of a run.")
    try:
        values: dict[str, Any] = json.loads((folder / FAULT).read_text(encoding="utf-8"))
        if values.get("version") != VERSION:
            raise DataError(
                f"`{folder}` is of version {values.get('version')}: expected {VERSION}. Replay it with the version of "
                "gcahng that wrote it."
            )
        lists = ("positions", "keys", "class_counts")
        values |= {key: tuple(values[key]) for key in lists}
        fault = Fault(**values)
        _check_fault(fault)
        parts = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
        batch = parts.pop(BATCH)
        _check_batch(fault, batch)
        return StepDump(fault, (folder / CONFIG).read_text(encoding="utf-8"), batch, parts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The dump `{folder}` is damaged ({error}). It cannot be replayed; use another one.") from error


def _check_fault(fault: Fault) -> None:
    for name, choices in _CHOICES.items():
        if getattr(fault, name) not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}: got {getattr(fault, name)!r}")
    for name in ("step", "metric_loss", "generation_loss", "num_training_classes"):
        if not isinstance(getattr(fault, name), int | float):
            raise ValueError(f"`{name}` must be a number: got {getattr(fault, name)!r}")


def _check_batch(fault: Fault, batch: Mapping[str, Tensor]) -> None:
    size = len(fault.keys)
    wanted = ["images", "labels", "rows"] + ([] if fault.reach == "metric" else ["embeddings"])
    for name in wanted:
        if name not in batch or batch[name].shape[:1] != (size,):
            got = tuple(batch[name].shape) if name in batch else "nothing"
            raise ValueError(f"`{name}` must have {size} rows: got {got}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
