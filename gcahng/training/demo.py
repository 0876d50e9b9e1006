"""The demonstration: a metric-loss baseline and GCA-HNG on the embedded characters, side by side.

Both runs share seed, schedule, batches and initial weights of the metric model; they differ in the graph network and
the synthetic negatives alone. Each is a training command of its own, so that time and memory are its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcahng.data.conversion.convert import convert
from gcahng.data.shards.manifest import MANIFEST_NAME, MANIFEST_VERSION, Manifest, read_manifest_json
from gcahng.data.sources.glyphs import Glyphs
from gcahng.errors import ConfigError, TrainingError
from gcahng.training.config import load_config
from gcahng.training.results import metric_columns

NUM_CLASSES = 800
IMAGE_SIZE = 32
DATA_SEED = 0
BASELINE = ("graph.enabled=false", "generation.enabled=false")
SYSTEMS = {"baseline": ("metric loss alone (N-pair+)", BASELINE), "gca_hng": ("GCA-HNG", ())}
# What the two runs are to differ in, and what the demonstration finds them by.
_OWN_SETTINGS = ("seed", "data.dir", "run.dir", "graph.enabled", "generation.enabled")
_DATA_OPTIONS = ("classes", "size", "min_faces", "test_share", "identical")


@dataclass(frozen=True)
class DemoPaths:
    """Where the demonstration reads and writes.

    Attributes:
        config: The configuration of both runs.
        train_command: The training script.
        data: Shard folder, made if absent.
        runs: Folder for the runs and their report.
    """

    config: Path
    train_command: Path
    data: Path = Path("data/demo")
    runs: Path = Path("runs/demo")


def run_demo(
    paths: DemoPaths, seed: int = 0, overrides: Sequence[str] = (), *, num_classes: int = NUM_CLASSES
) -> dict[str, dict[str, Any]]:
    """Convert, train both systems, evaluate, print the table.

    Args:
        paths: Where things are.
        seed: Of both runs.
        overrides: `section.key=value` for both runs.
        num_classes: Characters in the data set, half of them for training.
    Returns:
        `results.json` of each system.
    Raises:
        InputError: Something is missing, or a setting cannot be used; nothing has been written.
        TrainingError: A run failed.
    """
    _check(paths, overrides)
    prepare_data(paths.data, num_classes)
    results = {}
    for name, (title, settings) in SYSTEMS.items():
        run_dir = paths.runs / f"seed-{seed}" / name
        print(f"Training {title}, seed {seed} ...", flush=True)
        results[name] = _train(paths, run_dir, (*overrides, f"seed={seed}", *settings))
    print(demo_table(results))
    return results


def _check(paths: DemoPaths, overrides: Sequence[str]) -> None:
    """Find what would fail after minutes of work before it begins."""
    for what, path in (("configuration", paths.config), ("training command", paths.train_command)):
        if not path.is_file():
            raise ConfigError(
                f"The demonstration's {what} `{path}` is missing: expected a file. Run it from a checkout of the "
                "project, or name the file with --config."
            )
    own = [text for text in overrides if text.partition("=")[0].strip() in _OWN_SETTINGS]
    if own:
        raise ConfigError(
            f"The demonstration sets {', '.join(_OWN_SETTINGS)} itself: got {', '.join(own)}. "
            "Use --seed, --data and --runs, or launch/train.py for a run of your own."
        )
    ks = load_config(paths.config, overrides).eval.ks
    if 1 not in ks:
        raise ConfigError(f"`eval.ks` must hold 1, which the demonstration's table shows: got {list(ks)}. Add it.")


def prepare_data(folder: Path, num_classes: int = NUM_CLASSES) -> None:
    """Make the data set of the demonstration, unless `folder` holds it already.

    Characters that were drawn with other options, or stored by an earlier release, are replaced.

    Args:
        folder: Shard folder.
        num_classes: Characters, half of them for training.
    Raises:
        ConfigError: The folder holds another data set.
        InputError: It holds a damaged one, or the fonts have fewer characters.
    """
    # Faces that draw a character alike would make some queries trivial.
    source = Glyphs(seed=DATA_SEED, classes=num_classes, size=IMAGE_SIZE, identical="drop")
    if (folder / MANIFEST_NAME).is_file() and _is_usable(folder, source):
        return
    print(f"Drawing {num_classes} characters and writing tar shards to {folder} ...", flush=True)
    # A killed attempt leaves a partial folder, which overwrite replaces.
    convert(source, folder, seed=DATA_SEED, workers=os.cpu_count() or 1, overwrite=True, progress=True)


def _is_usable(folder: Path, source: Glyphs) -> bool:
    """Whether a shard folder holds the demonstration's data set; says so if it is to be replaced.

    Raises:
        ConfigError: It holds somebody's other data set.
        DataError: It is damaged.
    """
    raw, _ = read_manifest_json(folder)
    version, name = raw.get("version"), raw.get("source")
    if name != source.name:
        raise ConfigError(
            f"`{folder}` holds a data set of source {name!r}: expected {source.name!r} or an empty "
            "folder, since the demonstration would replace it. Name another folder with --data."
        )
    if type(version) is int and 0 < version < MANIFEST_VERSION:
        print(f"{folder} was made by an earlier release and is replaced.", flush=True)
        return False
    found = Manifest.load(folder)
    wanted = {name: getattr(source, name) for name in _DATA_OPTIONS}
    if (found.seed, found.extra.get("options")) == (DATA_SEED, wanted):
        return True
    print(f"{folder} was made with other options and is replaced.", flush=True)
    return False


def _train(paths: DemoPaths, run_dir: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    command = [
        sys.executable,
        str(paths.train_command),
        "--config",
        str(paths.config),
        "--overwrite",
        *overrides,
        f"run.dir={_quoted(run_dir)}",
        f"data.dir={_quoted(paths.data)}",
    ]
    # Threads of one process wait for each other: a core shared with anything else slows them all many times over, so
    # half of the cores are left to the loader and to whatever else runs. A setting of the user's wins.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))} | os.environ
    status = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False).returncode
    if status:
        raise TrainingError(f"Training into {run_dir} failed with status {status}; its message stands above.")
    results: dict[str, Any] = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    return results


def _quoted(path: Path) -> str:
    """A path as YAML text, whatever letters it has."""
    return json.dumps(str(path), ensure_ascii=False)


def demo_table(results: dict[str, dict[str, Any]]) -> str:
    """R@1, R-Precision, MAP@R, seconds per iteration and peak memory of each system."""
    lines = [f"\n{'':28} {'R@1':>6} {'RP':>6} {'MAP@R':>6} {'s/iter':>7} {'peak MiB':>9}"]
    for name, result in results.items():
        columns = metric_columns(result["last"])
        lines.append(
            f"{SYSTEMS[name][0]:28} {columns['R@1']:6.2f} {columns['RP']:6.2f} {columns['MAP@R']:6.2f} "
            f"{result['seconds_per_step']:7.3f} {result['peak_memory_bytes'] / 2**20:9.0f}"
        )
    return "\n".join(lines)
