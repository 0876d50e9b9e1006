"""Where a run stands, from the files of its folder alone: also on another machine, and while the run writes them.

What the run itself says in `status.json` counts; runs of versions without it are read from what they log and save.
Nothing here loads a tensor, and no file is read as a whole that grows with the run.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gcahng.errors import ConfigError
from gcahng.monitor.heartbeat import BEAT_SECONDS, STATUS_FILE
from gcahng.monitor.process_facts import lives
from gcahng.monitor.run_files import is_of, parse_json, read_json, read_yaml

# The files of a run, as gcahng.training writes them.
CONFIG, METRICS, RESULTS, MARKER, FAULTS = "config.yaml", "metrics.jsonl", "results.json", "PREEMPTED", "faults"
MANIFEST, STATE, DAMAGED, REPLACED = "manifest.json", "state.json", ".damaged", ".replaced"

RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"
SILENT, UNREADABLE = "stopped without a word", "unreadable"
_MISSED_BEATS = 6  # after which a process of another machine counts as gone
_FRESH_SECONDS = 300.0  # age of the newest file of a run without heartbeat that counts as running
_TAIL_BYTES = 1 << 17
_DEPTH = 4  # how far below a folder runs are looked for
_SLOW_STEPS, _SLOW_SECONDS = 20, 120.0  # a step is late after so many usual ones, and so many seconds


@dataclass
class RunStatus:
    """Where a run stands; what is not known is None or empty.

    Attributes:
        run: Its folder.
        state: RUNNING, FINISHED, INTERRUPTED, FAILED, SILENT, or UNREADABLE.
        activity: Of a running one: training, evaluating.
        sign_age: Seconds since the run's last sign of life.
        step_age: Seconds since its last step.
        epoch: Epochs finished.
        epochs: Epochs of the whole run.
        step: Steps done.
        planned_steps: Steps of the whole run.
        step_seconds: Of a step, lately.
        images_per_second: On all ranks together.
        data_wait_share: Share of a step that waits for data.
        seconds_left: Until its end, evaluations included.
        losses: Of the last logged step, by name.
        logged_step: That step.
        last: Newest evaluation's row by split.
        best: Best evaluation's row by split.
        checkpoint: Name of the newest checkpoint that seems whole.
        checkpoint_age: Its age in seconds.
        dropped: Steps left out for numbers that are not finite.
        skipped: Unreadable images replaced.
        repaired: Draws of the sampler that gave way to others.
        failed_saves: Saves that failed since the last start.
        host: Machine of rank 0.
        pid: Process of rank 0.
        ranks: Number of processes.
        error: What ended a failed run.
        warnings: What somebody should look at.
    """

    run: str
    state: str = SILENT
    activity: str | None = None
    sign_age: float | None = None
    step_age: float | None = None
    epoch: int = 0
    epochs: int | None = None
    step: int = 0
    planned_steps: int | None = None
    step_seconds: float | None = None
    images_per_second: float | None = None
    data_wait_share: float | None = None
    seconds_left: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    logged_step: int | None = None
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoint: str | None = None
    checkpoint_age: float | None = None
    dropped: int = 0
    skipped: int = 0
    repaired: int = 0
    failed_saves: int = 0
    host: str | None = None
    pid: int | None = None
    ranks: int | None = None
    error: str | None = None
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return asdict(self)


def find_runs(path: Path) -> list[Path]:
    """The run that `path` is, or all runs below it, by name.

    Raises:
        ConfigError: There is none.
    """
    if not path.is_dir():
        raise ConfigError(f"`{path}` is no folder: expected a run folder (run.dir), or a folder of runs.")
    runs = [path] if is_run(path) else sorted(_below(path, _DEPTH))
    if not runs:
        raise ConfigError(
            f"`{path}` holds no run: expected {CONFIG} with {STATUS_FILE}, {METRICS} or a checkpoint step-N, here or "
            f"in folders up to {_DEPTH} levels below. Give the run.dir of a run that has started."
        )
    return runs


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, and not one of its checkpoints."""
    if not (folder / CONFIG).is_file() or (folder / MANIFEST).is_file():
        return False
    return (folder / STATUS_FILE).is_file() or (folder / METRICS).is_file() or bool(_checkpoints(folder))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = [Path(entry) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for entry in entries:
        if is_run(entry):
            yield entry
        elif depth > 1:
            yield from _below(entry, depth - 1)


def read_status(run: Path) -> RunStatus:
    """Where a run stands; `run` is one of `find_runs`. A file that is damaged or missing is a warning, no error."""
    try:
        status = _read(run)
        for entry in fields(status):
            value = getattr(status, entry.name)
            if not is_of(value, entry.type):
                raise TypeError(f"{entry.name} is {value!r:.80}")
        return status
    except (OSError, TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        fault = f"its files cannot be understood ({type(error).__name__}: {error})"
        return RunStatus(str(run), state=UNREADABLE, warnings=[fault])


def _read(run: Path) -> RunStatus:
    now, status = time.time(), RunStatus(str(run))
    beat = _json(run / STATUS_FILE, status.warnings)
    facts = _from_files(run, status.warnings) | {key: value for key, value in beat.items() if value is not None}
    _take_counters(status, facts)
    _take_pace(status, facts)
    status.checkpoint, status.checkpoint_age = _newest_checkpoint(run, now, status.warnings)
    status.host, status.pid, status.ranks = (facts.get(name) for name in ("host", "pid", "ranks"))
    status.sign_age = _age(beat.get("time", facts["changed"]), now)
    status.step_age = _age(facts.get("step_time"), now)
    status.state = _state(run, beat, status)
    if status.state == RUNNING:
        status.activity = facts.get("activity")
    status.error = beat.get("error") if status.state == FAILED else None
    if status.state not in (RUNNING, INTERRUPTED):
        status.seconds_left = None
    status.warnings += _warnings(run, status, beat)
    return status


def _age(moment: Any, now: float) -> float | None:
    # Never negative: clocks of machines differ.
    return max(0.0, now - moment) if isinstance(moment, int | float) else None


def _state(run: Path, beat: Mapping[str, Any], status: RunStatus) -> str:
    age = math.inf if status.sign_age is None else status.sign_age
    if beat.get("state", RUNNING) != RUNNING:
        return str(beat["state"])
    if beat:
        there = lives(beat)
        if there or (there is None and age < _MISSED_BEATS * beat.get("beat_seconds", BEAT_SECONDS)):
            return RUNNING
    if _json(run / RESULTS, status.warnings).get("steps", -1) >= status.step:
        return FINISHED
    if (run / MARKER).is_file():
        return INTERRUPTED
    return RUNNING if not beat and age < _FRESH_SECONDS else SILENT


def _from_files(run: Path, warnings: list[str]) -> dict[str, Any]:
    """What configuration, log and newest checkpoint say, under the names of the heartbeat."""
    config = _yaml(run / CONFIG, warnings)
    train, batch, evaluation = (config.get(name) or {} for name in ("train", "batch", "eval"))
    facts: dict[str, Any] = {"epochs": train.get("epochs"), "evaluate_every_epochs": evaluation.get("every_epochs")}
    if {"num_classes", "num_samples"} <= batch.keys():
        facts["images_per_step"] = batch["num_classes"] * batch["num_samples"]
    newest = _checkpoints(run)
    progress = (_json(newest[-1] / STATE, warnings) if newest else {}).get("progress", {})
    facts |= progress
    if progress.get("epoch") and not progress.get("batch"):
        facts["steps_per_epoch"] = progress["step"] / progress["epoch"]
    facts["last"], facts["best"] = dict(progress.get("last", {})), dict(progress.get("best", {}))
    changed = [(run / CONFIG).stat().st_mtime]
    if newest:
        changed.append(newest[-1].stat().st_mtime)
    if (run / METRICS).is_file():
        changed.append((run / METRICS).stat().st_mtime)
        facts["step_time"] = changed[-1]
        for row in _last_rows(run / METRICS):
            facts |= _of_row(row, facts["last"])
    return facts | {"changed": max(changed)}


def _of_row(row: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    if row.get("kind") == "evaluation":
        last[str(row.get("split", "test"))] = {name: row[name] for name in row if name not in ("kind", "step")}
        epoch = row.get("epoch", 0)
        return {"step": row["step"], "epoch": epoch} | ({"steps_per_epoch": row["step"] / epoch} if epoch else {})
    if row.get("kind") != "step":
        return {}
    found = {"step": row["step"], "logged_step": row["step"], "epoch": row.get("epoch", 0)}
    found["losses"] = {name: value for name, value in row.items() if name.endswith("_loss")}
    times = {"dropped": "dropped_steps", "skipped": "skipped_images", "repaired": "repaired_draws"}
    times |= {name: name for name in ("step_seconds", "data_seconds")}
    return found | {name: row[key] for name, key in times.items() if key in row}


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """Whole rows at the end of a file that may be of any size, and is being written to."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read(_TAIL_BYTES).split(b"\n")
    rows = []
    for line in lines[size > _TAIL_BYTES :]:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _take_counters(status: RunStatus, facts: Mapping[str, Any]) -> None:
    for name in ("epoch", "step", "dropped", "skipped", "repaired", "failed_saves"):
        setattr(status, name, facts.get(name) or 0)
    status.epochs, status.logged_step = facts.get("epochs"), facts.get("logged_step")
    status.losses = dict(facts.get("losses", {}))
    status.last, status.best = dict(facts["last"]), dict(facts["best"])


def _take_pace(status: RunStatus, facts: Mapping[str, Any]) -> None:
    seconds, per_epoch = facts.get("step_seconds"), facts.get("steps_per_epoch")
    if per_epoch and status.epochs:
        status.planned_steps = round(per_epoch * status.epochs)
    if not seconds:
        return
    status.step_seconds = seconds
    status.data_wait_share = facts.get("data_seconds", 0.0) / seconds
    if facts.get("images_per_step"):
        status.images_per_second = facts["images_per_step"] / seconds
    if status.planned_steps is not None and status.epochs is not None:
        every = facts.get("evaluate_every_epochs") or math.inf
        # Every so many epochs, and after the last one.
        coming = status.epochs // every - status.epoch // every
        coming += status.epochs > status.epoch and status.epochs % every != 0
        left = max(0, status.planned_steps - status.step)
        status.seconds_left = left * seconds + coming * facts.get("evaluation_seconds", 0.0)


def _checkpoints(run: Path) -> list[Path]:
    """Folders step-N by N, those that are replaced at this moment included."""
    found = []
    for folder in run.glob("step-*"):
        digits = folder.name.removesuffix(REPLACED).removeprefix("step-")
        if digits.isascii() and digits.isdigit():
            found.append((int(digits), folder.suffix == "", folder))
    return [folder for _, _, folder in sorted(found)]


def _newest_checkpoint(run: Path, now: float, warnings: list[str]) -> tuple[str | None, float | None]:
    """Name and age of the newest checkpoint whose files have the sizes that its manifest says."""
    for folder in reversed(_checkpoints(run)):
        try:
            listing = read_json(folder / MANIFEST)
            wrong = [name for name, entry in listing.items() if (folder / name).stat().st_size != entry["bytes"]]
            changed = (folder / MANIFEST).stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if folder.is_dir():  # else it was removed meanwhile
                warnings.append(f"checkpoint {folder.name} is damaged ({error})")
            continue
        if not wrong:
            return folder.name, _age(changed, now)
        warnings.append(f"checkpoint {folder.name} is damaged ({', '.join(wrong)} of another size than written)")
    return None, None


def _warnings(run: Path, status: RunStatus, beat: Mapping[str, Any]) -> list[str]:
    found = []
    if (run / MARKER).is_file() and status.state == INTERRUPTED:
        found.append(f"{MARKER}: asked to end and saved; go on with train.resume=auto")
    found += [f"{folder.name}: was set aside as damaged" for folder in sorted(run.glob(f"step-*{DAMAGED}"))]
    if dumps := sum(folder.suffix == "" for folder in (run / FAULTS).glob("step-*")):  # not those half written
        found.append(f"{FAULTS}/: {dumps} dumped {'step' if dumps == 1 else 'steps'}, see launch/replay.py")
    if beat.get("save_error"):
        found.append(f"the last save failed: {beat['save_error']}")
    if status.state == SILENT:
        found.append("it did not say that it ends: killed, out of memory, or its machine is gone; see its output")
    silence = status.sign_age or 0.0
    if status.state == RUNNING and beat and silence > _MISSED_BEATS * beat.get("beat_seconds", BEAT_SECONDS):
        found.append(f"its process is there, but gave no sign for {round(silence)} seconds: it hangs, or is stopped")
    late = max(_SLOW_SECONDS, _SLOW_STEPS * (status.step_seconds or 0.0))
    if status.state == RUNNING and beat and status.activity != "evaluating" and (status.step_age or 0.0) > late:
        found.append(f"no step for {round(status.step_age or 0.0)} seconds")
    return found


def _json(path: Path, warnings: list[str]) -> dict[str, Any]:
    """A JSON object; empty where there is none, with a warning where it cannot be read."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.append(f"{path.name} cannot be read ({error})")
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path, warnings: list[str]) -> dict[str, Any]:
    try:
        found = read_yaml(path)
    except Exception as error:  # beside ValueError: what PyYAML lets out of dates, `!!bool x` and others
        warnings.append(f"{path.name} cannot be read ({error!s:.200})")
        return {}
    return found if isinstance(found, dict) else {}
