"""Time of a whole training step with the graph against the step of the metric loss alone, same settings in both.

    python benchmarks/train_step.py [--device cpu|cuda] [--precision fp32|bf16] [--json FILE] [--sizes PxK-Ll ...]

Both arms are built from a configuration as a training run builds them: backbone, N-pair loss, AdamW for each part,
clipping, the run's precision. The baseline has neither graph nor classifier. Images lie on the device, normalised;
loading is not timed. Steps of both arms alternate in short blocks, each without waiting between its steps.

On a GPU the backbone is ResNet-50 without weights, 224 pixels, channels last. On a CPU the default is a small network
on small images, which shows that the script runs and says nothing of a GPU.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch
from report import Row, write_results, write_rows
from torch import nn

from gcahng.distributed import ONE
from gcahng.training.averages import EpochAverages
from gcahng.training.config import config_from_mapping
from gcahng.training.launched import Launched
from gcahng.training.parts import build_modules, build_parts, build_step

DIM, TRAINING_CLASSES = 512, 100
WARM_UPS = {"cpu": 1, "cuda": 10}
REPEATS = {"cpu": 5, "cuda": 30}
STEPS_PER_BLOCK = {"cpu": 1, "cuda": 5}
BACKBONE = {"cpu": "small_conv", "cuda": "resnet50"}
PIXELS = {"cpu": 64, "cuda": 224}


@dataclass(frozen=True)
class Size:
    """P classes of K samples, L layers."""

    num_classes: int
    num_samples: int
    layers: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """From `PxK-Ll`."""
        match = re.fullmatch(r"(\d+)x(\d+)-L(\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"expected a size like 40x2-L1, got {text!r}")
        size = cls(*map(int, match.groups()))
        if size.num_samples < 2 or not 1 <= size.num_classes <= TRAINING_CLASSES or size.layers < 1:
            raise argparse.ArgumentTypeError(f"needs K >= 2, 1 <= P <= {TRAINING_CLASSES}, L >= 1: got {text!r}")
        return size

    def __str__(self) -> str:
        return f"{self.num_classes}x{self.num_samples} D{DIM} L{self.layers} N{TRAINING_CLASSES}"


@dataclass(frozen=True)
class Options:
    """What is common to all rows."""

    device: str
    precision: str
    backbone: str
    pixels: int
    repeats: int

    def settings(self, size: Size, *, graph: bool) -> dict[str, Any]:
        """The configuration of an arm."""
        return {
            "data": {"dir": "none"},
            "run": {"dir": "none"},
            "batch": {"num_classes": size.num_classes, "num_samples": size.num_samples},
            "model": {"backbone": self.backbone, "embedding_dim": DIM, "freeze_batch_norm": True},
            "graph": {"enabled": graph, "num_layers": size.layers, "num_heads": 2 * size.layers},
            "generation": {"enabled": graph, "coefficients": "channel" if graph else "single"},
            "train": {"precision": self.precision, "device": self.device},
        }

    def step(self, size: Size, *, graph: bool) -> Callable[[], dict[str, torch.Tensor]]:
        """A training step on images of its own that can be called again and again."""
        config = config_from_mapping(self.settings(size, graph=graph))
        device = torch.device(self.device)
        modules: dict[str, nn.Module] = build_modules(config, TRAINING_CLASSES)
        modules["metric_model"].to(memory_format=torch.channels_last)
        step, _ = build_step(config, build_parts(config, modules, device), Launched(ONE, device, "plain"))
        averages = EpochAverages()
        # What a run in its middle has: neither interpolation nor the trust in it is switched off.
        averages.metric_loss, averages.generation_loss = 3.0, 10.0
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(size.num_classes * size.num_samples, 3, self.pixels, self.pixels, generator=draw)
        images = images.to(device, memory_format=torch.channels_last)
        labels = torch.randperm(TRAINING_CLASSES, generator=draw)[: size.num_classes].repeat(size.num_samples)
        count = iter(range(sys.maxsize))
        return lambda: step(images, labels, averages, step=next(count))


def row_of(size: Size, options: Options) -> Row:
    """Median time of a step with the graph; the ratio says how many times as long as the baseline's it takes.

    Raises:
        RuntimeError: A loss is not finite, or an arm has other losses than it should.
    """
    arms = {name: options.step(size, graph=name == "ours") for name in ("ours", "baseline")}
    for name, step in arms.items():
        for _ in range(WARM_UPS[options.device]):
            report = step()
        check_report(name, report)
    block = STEPS_PER_BLOCK[options.device]

    def seconds(step: Callable[[], object]) -> float:
        return machine.elapsed(lambda: [step() for _ in range(block)], options.device)[0] / block

    rounds = [{name: seconds(step) for name, step in arms.items()} for _ in range(options.repeats)]
    ours, baseline = (statistics.median(each[name] for each in rounds) for name in ("ours", "baseline"))
    ratio = statistics.median(each["ours"] / each["baseline"] for each in rounds)
    precision = options.precision
    if options.device == "cpu" and precision == "bf16":
        precision += f" ({machine.bf16_instructions() or 'no instructions for it'})"
    name = (
        f"training step, {options.device} {precision} {options.backbone} {options.pixels} pixels channels_last "
        f"{size}, ours / baseline"
    )
    return Row(name, ours, "s", ratio, note=f"baseline {baseline:.4g} s")


def check_report(name: str, report: dict[str, torch.Tensor]) -> None:
    """Stop unless an arm's step computed the losses that it should, and finite ones.

    Raises:
        RuntimeError: It did not.
    """
    with_graph = {"node_loss", "synthetic_loss", "classification_loss", "similarity_loss", "diversity_loss"}
    found = with_graph & report.keys()
    if found != (with_graph if name == "ours" else set()):
        raise RuntimeError(f"The step of {name} has the losses {sorted(report)}.")
    for loss, value in report.items():
        if not bool(torch.isfinite(value).all()):
            raise RuntimeError(f"The {loss} of {name} is {float(value)}.")


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on cuda, fp32 on cpu")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--results", type=Path, help="write the rows here with machine, versions, date and command")
    parser.add_argument("--sizes", nargs="+", type=Size.parse, default=[Size(40, 2, 1), Size(27, 3, 2)])
    parser.add_argument(
        "--backbone", help="as `model.backbone` of a configuration; default: resnet50, small_conv on cpu"
    )
    parser.add_argument("--pixels", type=int, help="side of the images; default: 224, 64 on cpu")
    parser.add_argument("--repeats", type=int, help="timed blocks of each arm")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parsed = parser.parse_args(arguments)
    device = parsed.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for name in ("pixels", "repeats", "threads"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1: got {value}")
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    torch.backends.cudnn.benchmark = True
    options = Options(
        device,
        parsed.precision or ("bf16" if device == "cuda" else "fp32"),
        parsed.backbone or BACKBONE[device],
        parsed.pixels or PIXELS[device],
        parsed.repeats or REPEATS[device],
    )
    if device == "cpu" and options.backbone == BACKBONE["cpu"]:
        print(f"On a CPU: {options.backbone} at {options.pixels} pixels, a look at the script, not at a GPU's step.")
    rows = [row_of(size, options) for size in parsed.sizes]
    print(*(row.line() for row in rows), sep="\n")
    if parsed.json is not None:
        write_rows(parsed.json, rows)
    if parsed.results is not None:
        write_results(parsed.results, rows, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
