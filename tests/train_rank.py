"""One rank of a training run, as a process of its own: loads batches and writes down what was in them.

    python train_rank.py RANK WORLD_SIZE JOBS.json OUT

Each job: name, shards, num_workers, options of the loader, and the batches to load: [[epoch, first, stop], ...] where
stop may be null. A job with `after` begins where the state file of that name says. The last batch loaded is put into
the state file OUT/NAME.state.json by rank 0, as a run's checkpoint would have it.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gcahng.data.images.transform_settings import transform_settings
from gcahng.data.loader import TrainLoader
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.shards.reader import ShardSet


def load(rank: int, world_size: int, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """The job's batches: classes (n, P), rows and checksums of pixels (n, K, P), counters (n,)."""
    shards = ShardSet.open(job["shards"])
    table = ClassTable.from_shards(shards, "train", samples_per_class=2)
    transform = transform_settings("gca_hng", image_size=16)
    loader = TrainLoader(
        shards,
        table,
        transform=transform,
        rank=rank,
        world_size=world_size,
        num_workers=job["num_workers"],
        **job["options"],
    )
    parts = job["parts"]
    if "after" in job:
        state = json.loads((out / f"{job['after']}.state.json").read_text())
        parts = [[state["epoch"], state["batch"], None], *parts]
    found: dict[str, list[Any]] = {name: [] for name in ("at", "classes", "rows", "pixels", "skipped", "repaired")}
    state = {}
    for epoch, first, stop in parts:
        number = first
        for batch in loader.epoch_iterator(epoch, first):
            number += 1
            groups = (batch.num_samples, -1)
            pixels = [zlib.crc32(image.numpy().tobytes()) for image in batch.images]
            values = ((epoch, number), batch.classes.numpy(), batch.rows.numpy().reshape(groups))
            values += (np.reshape(pixels, groups), batch.skipped, batch.repaired)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
            state = {"epoch": epoch, "batch": number}
            if number == stop:
                break
    loader.close()
    if rank == 0:
        (out / f"{job['name']}.state.json").write_text(json.dumps(state))
    return {name: np.stack(values) for name, values in found.items()} | {"rank_sizes": np.array(loader.rank_sizes)}


def main() -> None:
    """Do all jobs of one rank."""
    rank, world_size, jobs, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    for job in json.loads(Path(jobs).read_text()):
        np.savez(out / f"{job['name']}.{rank}.npz", **load(rank, world_size, job, out))


if __name__ == "__main__":
    main()
