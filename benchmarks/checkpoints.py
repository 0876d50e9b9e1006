"""How long a save stops the training: written in the background against waiting for the disk.

    python benchmarks/checkpoints.py [--rounds 9] [--megabytes 0] [--folder DIR] [--json FILE] [--results FILE]

The state is that of a ResNet-50 with its embedding head and of AdamW, moments included (`--megabytes M` takes tensors
of that size in all instead). A round saves it once in the background and once without, in turns, to the same disk, with
the checkpoint's own files, checksums and fsync. Between two saves a background one is given the time to end, as steps
would, so that its pause is what training waits for; how long it takes until it is whole is a row of its own.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import Row, write_results, write_rows
from torch import Tensor, nn
from torchvision.models import resnet50

from gcahng.training.saving import CheckpointWriter, HostCopies, Saved, Snapshot

EMBEDDING_DIM = 512
MB = 10**6


def resnet_state() -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Modules and optimisers of a ResNet-50 that has taken a step."""
    model = resnet50(weights=None)
    model.fc = nn.Linear(model.fc.in_features, EMBEDDING_DIM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return {"metric_model": model.state_dict()}, {"metric_model": optimizer.state_dict()}


def plain_state(megabytes: float) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """As many bytes in a few tensors, two thirds of them the optimiser's."""
    weights = {str(number): torch.randn(int(megabytes * MB / 4 / 3 / 8) + 1) for number in range(8)}
    moments = {
        number: {"exp_avg": torch.randn_like(weight), "exp_avg_sq": torch.rand_like(weight)}
        for number, weight in enumerate(weights.values())
    }
    return {"metric_model": weights}, {"metric_model": {"state": moments, "param_groups": []}}


def size_of(state: Any) -> int:
    """Bytes of a state's tensors."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(size_of(value) for value in state.values())
    return 0


class Arm:
    """Saves one after the other, in the background or not, with the memory that it keeps for that."""

    def __init__(self, folder: Path, in_background: bool) -> None:
        self.saved: list[Saved] = []
        self.copies = HostCopies()
        self.writer = CheckpointWriter(folder, keep_last=2, in_background=in_background, told=self.saved.append)
        self.step = 0
        folder.mkdir()

    def save(self, modules: dict[str, Any], optimizers: dict[str, Any]) -> float:
        """One save; the seconds that it stops the training."""
        self.step += 1
        started = time.perf_counter()
        own_modules, own_optimizers = self.copies.of([modules, optimizers])
        self.writer.save(Snapshot(self.step, own_modules, own_optimizers, {}, {}, "", {}))
        return time.perf_counter() - started

    def settle(self) -> None:
        """Wait until it is whole; a save that failed ends the benchmark."""
        self.writer.finish()


def seconds_of(action: Callable[[], object]) -> float:
    """How long an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(folder: Path, rounds: int, modules: dict[str, Any], optimizers: dict[str, Any]) -> list[Row]:
    """Rows of `rounds` rounds after one that is not counted."""
    arms = {name: Arm(folder / name, name == "background") for name in ("background", "blocking")}
    pauses: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in list(arms.items())[:: 1 if number % 2 else -1]:
            pause = arm.save(modules, optimizers)
            arm.settle()
            if number:
                pauses[name].append(pause)
    whole = [saved.seconds for saved in arms["background"].saved[1:]]
    ratio = statistics.median(b / a for a, b in zip(pauses["background"], pauses["blocking"], strict=True))
    size = size_of(modules) + size_of(optimizers)
    copy = [seconds_of(lambda: HostCopies().of([modules, optimizers])) for _ in range(rounds)]
    what = f"{size / MB:.0f} MB"
    return [
        Row(f"pause of a save, {what}", statistics.median(pauses["background"]), "s", ratio, note="background"),
        Row(f"pause of a save that waits, {what}", statistics.median(pauses["blocking"]), "s", 1.0, note="blocking"),
        Row(f"until a background save is whole, {what}", statistics.median(whole), "s", None),
        Row(f"copy into fresh memory, {what}", statistics.median(copy), "s", None, note="the first save of a run"),
    ]


def main() -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument("--megabytes", type=float, default=0, help="size of the state; 0: ResNet-50 with AdamW")
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's temporary folder")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--results", type=Path, help="write the rows with machine and versions to this file")
    args = parser.parse_args()
    modules, optimizers = plain_state(args.megabytes) if args.megabytes else resnet_state()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(Path(folder), args.rounds, modules, optimizers)
    for row in rows:
        print(row.line())
    if args.json:
        write_rows(args.json, rows)
    if args.results:
        write_results(args.results, rows, "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
