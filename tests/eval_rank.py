"""One rank of an evaluation, as a program: prints what its loaders gave. `python eval_rank.py RANK WORLD_SIZE TARS`."""

import json
import sys
from typing import Any

import numpy as np
from tar_cases import picture

from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transforms import transform_settings
from gcahng.data.tars.loader import tar_loader

SETTINGS = transform_settings("gca_hng", image_size=16)
ROWS = np.array([5, 3, 11, 0, 7, 2, 9, 8, 1, 10, 4, 6, 5])


class Pictures:
    """Twelve images of four classes, in shards of five rows; notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[list[int], list[int]]] = []

    def class_ids(self, rows: Any) -> Any:
        return np.asarray(rows) // 3

    def shard_of(self, rows: Any) -> Any:
        return (np.asarray(rows) // 5).astype(np.int32)

    def expect(self, present: list[int], following: list[int]) -> None:
        self.told.append((present, following))

    def read(self, row: int) -> bytes:
        return picture(row)

    def key(self, row: int) -> str:
        return str(row)


def load(rank: int, world_size: int, num_workers: int, tars: str) -> dict[str, list[Any]]:
    """Rows, class ids and pixel sums of the rows; places, keys, labels and pixel sums of the tars' images."""
    ranks = {"num_workers": num_workers, "rank": rank, "world_size": world_size}
    rows: list[list[int]] = []
    for images, class_ids, numbers in eval_loader(Pictures(), ROWS, transform=SETTINGS, batch_size=2, **ranks):
        sums = images.long().sum((1, 2, 3)).tolist()
        rows += [list(row) for row in zip(numbers.tolist(), class_ids.tolist(), sums, strict=True)]
    samples: list[list[Any]] = []
    for batch in tar_loader(tars, SETTINGS, 2, **ranks):
        sums = batch.images.long().sum((1, 2, 3)).tolist()
        samples += [list(s) for s in zip(batch.order.tolist(), batch.keys, batch.labels, sums, strict=True)]
    return {"rows": rows, "samples": samples}


if __name__ == "__main__":
    print(json.dumps([load(int(sys.argv[1]), int(sys.argv[2]), workers, sys.argv[3]) for workers in (0, 2)]))
