"""Time and memory of planning batches: ten million images in a million classes, and the whole glyphs set.

    python benchmarks/planning.py [--json FILE] [--images S] [--classes N] [--batches PxK ...] [--processes W]

First a shard folder of S images in N classes is written: real manifest, class list and indexes, tars of the right size
without content. On it: the time of every call that plans a batch, window by window, and what W processes hold of index
and plan together. Then the glyphs set is converted and every batch of some epochs is planned and checked.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from gcahng.data.conversion.convert import convert
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.plans.plan import coverage_epochs, make_plan
from gcahng.data.plans.uniform import UniformPlan
from gcahng.data.plans.windows import ShardGrouping, home_shards
from gcahng.data.ranks import rank_classes
from gcahng.data.shards.class_list import CLASSES_NAME, ClassInfo, encode_classes
from gcahng.data.shards.index import INDEX_DTYPE, TAR_BLOCK, encode_index
from gcahng.data.shards.manifest import MANIFEST_VERSION, ClassesFile, Manifest, ShardInfo
from gcahng.data.shards.reader import ShardSet
from gcahng.data.sources.glyphs import Glyphs

LIMIT_MS = 5.0  # planning a batch, on average
LIMIT_MB = 500.0  # index and plans of all processes of a node; MB = 10**6 bytes
SHARD_BYTES = 256 << 20
WINDOW_BYTES = 8 << 30
TRAIN = "train"


@dataclass(frozen=True)
class Batches:
    """P classes of K samples."""

    num_classes: int
    num_samples: int

    @classmethod
    def parse(cls, text: str) -> "Batches":
        """From `PxK`."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"expected a batch like 64x2, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.num_classes}x{self.num_samples}"

    def sizes(self) -> dict[str, int]:
        """As arguments of a plan."""
        return {"num_classes": self.num_classes, "num_samples": self.num_samples}


# --- a shard folder without images ----------------------------------------------------------------


def write_folder(folder: Path, images: int, classes: int) -> None:
    """A class-major shard folder; class sizes fall like a power of their rank, images take 10 to 50 kB."""
    draws = np.random.default_rng(0)
    weights = 1 / np.arange(1, classes + 1) ** 0.5
    counts = draws.permutation(1 + draws.multinomial(images - classes, weights / weights.sum()))
    order = draws.permutation(classes)
    lengths = draws.integers(10_000, 50_000, images)
    blocks = 3 + -(-lengths // TAR_BLOCK)  # headers of two members, JSON, image
    class_ends = np.cumsum(counts[order])
    bytes_before = np.concatenate([[0], np.cumsum(blocks)]) * TAR_BLOCK
    class_bytes = bytes_before[class_ends]
    shards: list[ShardInfo] = []
    first_class = first = 0
    while first_class < classes:
        # A tar ends with the class that fills it.
        last_class = int(np.searchsorted(class_bytes, bytes_before[first] + SHARD_BYTES))
        last_class = min(last_class, classes - 1)
        end = int(class_ends[last_class])
        inside = slice(first, end)
        of_tar = order[first_class : last_class + 1]
        table = np.zeros(end - first, INDEX_DTYPE)
        starts = (bytes_before[inside] - bytes_before[first]) // TAR_BLOCK
        table["key"] = np.arange(first, end)
        table["class_id"] = np.repeat(of_tar, counts[of_tar])
        table["block"], table["length"] = starts + 1, lengths[inside]
        table["meta_block"], table["meta_length"] = starts + blocks[inside] - 1, 200
        shards.append(_write_tar(folder, len(shards), table, int(bytes_before[end] - bytes_before[first])))
        first, first_class = end, last_class + 1
    listed = encode_classes(ClassInfo(i, f"class {i:07d}", TRAIN, int(count)) for i, count in enumerate(counts))
    (folder / CLASSES_NAME).write_bytes(listed)
    file = ClassesFile(CLASSES_NAME, classes, hashlib.sha256(listed).hexdigest())
    splits = {TRAIN: {"classes": classes, "images": images}}
    Manifest(MANIFEST_VERSION, "made up", 0, WINDOW_BYTES, tuple(shards), file, splits, {}).save(folder)


def _write_tar(folder: Path, number: int, table: np.ndarray, content: int) -> ShardInfo:
    """The index and an empty tar of the right size, which takes no space on the disk."""
    name, index_name = f"train-{number:05d}.tar", f"train-{number:05d}.npy"
    index = encode_index(table)  # type: ignore[arg-type]
    (folder / index_name).write_bytes(index)
    size = -(-(content + 2 * TAR_BLOCK) // 10240) * 10240
    with (folder / name).open("wb") as tar:
        tar.truncate(size)
    return ShardInfo(name, size, "0" * 64, len(table), index_name, hashlib.sha256(index).hexdigest(), TRAIN)


# --- time -----------------------------------------------------------------------------------------


def time_plan(name: str, table: ClassTable, batches: Batches, epoch: int, limit: int) -> list[dict[str, object]]:
    """Rows for one epoch: its setup, then the calls for `limit` batches in a row from the first one on."""
    started = time.perf_counter()
    plan = make_plan(table, seed=0, epoch=epoch, **batches.sizes())
    setup = time.perf_counter() - started
    seconds = []
    for index in range(min(limit, len(plan))):
        started = time.perf_counter()
        if isinstance(plan, UniformPlan):
            plan.shards(index)
        plan.batch(index)
        seconds.append(time.perf_counter() - started)
    milliseconds = 1000 * np.array(seconds)
    mean, p99, worst = milliseconds.mean(), np.percentile(milliseconds, 99), milliseconds.max()
    print(
        f"{name}: setup of an epoch {setup:.3f} s, {len(seconds)} of {len(plan)} batches planned: "
        f"mean {mean:.3f} ms, 99 % within {p99:.3f} ms, longest {worst:.1f} ms"
    )
    return [
        _row(f"planning, mean per batch, {name}", float(mean), "ms", LIMIT_MS / float(mean)),
        _row(f"planning, 99th percentile, {name}", float(p99), "ms"),
        _row(f"planning, longest call, {name}", float(worst), "ms"),
        _row(f"planning, setup of an epoch, {name}", setup, "s"),
    ]


def _row(name: str, value: float, unit: str, ratio: float | None = None) -> dict[str, object]:
    """`ratio` is the limit over the value, so above 1 is within the limit; None where there is no limit."""
    return {"name": name, "value": value, "unit": unit, "ratio": ratio}


def time_folder(folder: Path, what: str, all_batches: list[Batches], limit: int) -> list[dict[str, object]]:
    """Rows for every batch size, with windows and in one window."""
    rows = []
    for batches in all_batches:
        started = time.perf_counter()
        shards = ShardSet.open(folder)
        opened = time.perf_counter() - started
        table = ClassTable.from_shards(shards, TRAIN, samples_per_class=batches.num_samples)
        tabled = time.perf_counter() - started - opened
        print(f"{what}: {len(shards.manifest.shards)} shards opened in {opened:.2f} s, class table {tabled:.2f} s")
        # Epoch 1: images and classes go on where epoch 0 stopped, which is the longer way.
        assert table.layout is not None
        grouping = ShardGrouping(table, home_shards(table, table.layout), table.layout, batches.num_classes)
        windows = len(grouping.windows(0, 1))
        rows += time_plan(f"{what}, {batches}, {windows} windows", table, batches, 1, limit)
        rows += time_plan(f"{what}, {batches}, one window", replace(table, layout=None), batches, 1, limit)
    return rows


# --- memory ---------------------------------------------------------------------------------------


def measure_memory(folder: Path, what: str, batches: Batches, processes: int, limit: int) -> list[dict[str, object]]:
    """What all processes together hold beyond their imports: PSS, which counts shared pages once."""
    with _children(processes, ["none"]) as bare:
        base = sum(child.memory_full_info().pss for child in bare)
    with _children(processes, [str(folder), str(batches), str(limit), str(processes)]) as loaded:
        total = sum(child.memory_full_info().pss for child in loaded)
    held = (total - base) / 1e6
    print(f"{what}: {processes} processes hold {held:.0f} MB of index and plan ({base / 1e6:.0f} MB without them)")
    return [
        _row(
            f"index and plan memory of {processes} processes, {what}, {batches}",
            held,
            "MB",
            LIMIT_MB / held if held > 0 else None,
        )
    ]


@contextmanager
def _children(count: int, arguments: list[str]) -> Iterator[list[psutil.Process]]:
    """Processes that have done their work and wait."""
    command = [sys.executable, __file__, "--hold", *arguments]
    children = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(count)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            if child.stdout.readline().strip() != "ready":
                raise RuntimeError("A process that should hold a plan ended early; its message is above.")
        yield [psutil.Process(child.pid) for child in children]
    finally:
        for child in children:
            child.communicate("done\n", timeout=60)


def hold(arguments: list[str]) -> None:
    """A child: open the folder, plan as one rank does, look every planned sample up, then wait."""
    kept: list[object] = []
    if arguments[0] != "none":
        folder, batches, (limit, processes, rank) = arguments[0], Batches.parse(arguments[1]), map(int, arguments[2:])
        mine = rank_classes(batches.num_classes, rank, processes)
        shards = ShardSet.open(folder)
        table = ClassTable.from_shards(shards, TRAIN, samples_per_class=batches.num_samples)
        plan = make_plan(table, seed=0, epoch=1, **batches.sizes())
        for index in range(min(limit, len(plan))):
            for row in plan.batch(index).rows[:, mine].ravel().tolist():
                shards.record(row)
        kept = [shards, table, plan]
    print("ready", flush=True)
    sys.stdin.readline()
    assert kept or arguments[0] == "none"


# --- the glyphs set -------------------------------------------------------------------------------


def check_glyphs(folder: Path, batches: Batches, epochs: int, classes: int | None) -> list[dict[str, object]]:
    """Convert the glyphs and check all batches of some epochs against every guarantee.

    Raises:
        RuntimeError: One of them does not hold.
    """
    convert(Glyphs(classes=classes), folder, workers=1 if classes else os.cpu_count() or 1)
    shards = ShardSet.open(folder)
    table = ClassTable.from_shards(shards, TRAIN, samples_per_class=batches.num_samples)
    stated = coverage_epochs(table, **batches.sizes())
    seen = np.zeros(len(shards), bool)
    seconds = []
    for epoch in range(max(epochs, stated)):
        plan = make_plan(table, seed=0, epoch=epoch, **batches.sizes())
        visits = np.zeros(table.num_classes, np.int64)
        for index in range(len(plan)):
            started = time.perf_counter()
            batch = plan.batch(index)
            seconds.append(time.perf_counter() - started)
            _check_batch(batch.labels, batch.rows, table, batches)
            visits[batch.labels] += 1
            seen[batch.rows] = True
        even, enough = visits.max() - visits.min() <= 1, len(plan) * batches.num_classes < table.num_classes
        if not (even and (enough or visits.min() >= 1)):
            raise RuntimeError(f"Epoch {epoch} visits classes {visits.min()} to {visits.max()} times.")
    missing = int(table.num_samples - seen.sum())
    if missing:
        raise RuntimeError(f"{missing} images were not shown within the stated {stated} epochs.")
    mean = 1000 * float(np.mean(seconds))
    what = f"glyphs ({table.num_samples} images in {table.num_classes} classes), {batches}"
    print(
        f"{what}: {len(seconds)} batches of {max(epochs, stated)} epochs hold to every guarantee, every image shown "
        f"within the stated {stated}; mean {mean:.3f} ms, longest {1000 * max(seconds):.1f} ms"
    )
    return [_row(f"planning, mean per batch, {what}", mean, "ms", LIMIT_MS / mean)]


def _check_batch(labels: np.ndarray, rows: np.ndarray, table: ClassTable, batches: Batches) -> None:
    if np.unique(labels).size != batches.num_classes or rows.shape != (batches.num_samples, batches.num_classes):
        raise RuntimeError(f"A batch is not {batches} of distinct classes: {labels.tolist()}, rows {rows.shape}.")
    for place, label in enumerate(labels.tolist()):
        images, column = table.rows_of(label), rows[:, place]
        distinct = np.unique(column).size
        if not np.isin(column, images).all() or distinct != min(images.size, batches.num_samples):
            raise RuntimeError(f"Class {label} shows rows {column.tolist()} of its {images.size} images.")


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print, write the rows."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--hold"]:
        hold(arguments[1:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--images", type=int, default=10_000_000, help="images of the made-up data set")
    parser.add_argument("--classes", type=int, default=1_000_000, help="its classes")
    parser.add_argument("--batches", nargs="+", type=Batches.parse, default=[Batches(64, 2), Batches(256, 2)])
    parser.add_argument("--limit", type=int, default=5000, help="batches to plan of each epoch")
    parser.add_argument("--processes", type=int, default=8, help="processes that hold index and plan at once")
    parser.add_argument("--glyph-classes", type=int, help="classes of the glyphs set; all by default")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the glyphs set, or as many as cover it")
    options = parser.parse_args(arguments)
    most = max(batches.num_classes for batches in options.batches)
    if not most <= options.classes <= options.images:
        parser.error(f"needs P <= classes <= images: got {most}, {options.classes}, {options.images}")
    if min(options.limit, options.epochs) < 1:
        parser.error(f"--limit and --epochs must be at least 1: got {options.limit}, {options.epochs}")
    if not 1 <= options.processes <= options.batches[0].num_classes:
        parser.error(f"--processes must be from 1 to P ({options.batches[0].num_classes}): got {options.processes}")
    what = f"{options.images} images in {options.classes} classes"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "made up"
        folder.mkdir()
        write_folder(folder, options.images, options.classes)
        rows = time_folder(folder, what, options.batches, options.limit)
        rows += measure_memory(folder, what, options.batches[0], options.processes, options.limit)
        rows += check_glyphs(Path(temporary) / "glyphs", options.batches[0], options.epochs, options.glyph_classes)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
