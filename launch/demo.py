"""The demonstration behind `make demo`: `python -m launch.demo [--seed N] [section.key=value ...]`."""

import argparse
from pathlib import Path

from gcahng.report.demo import demonstrate
from gcahng.training.demo import NUM_CLASSES, DemoPaths
from launch.cli import run

ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.demo",
        description="Draw a data set of characters, train a metric-loss baseline and GCA-HNG on it, compare them on "
        "characters that neither has seen, and write a report of both.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of both runs")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml", help="YAML file of both runs")
    parser.add_argument("--data", type=Path, default=DemoPaths.data, help="shard folder, made if absent")
    parser.add_argument("--runs", type=Path, default=DemoPaths.runs, help="folder for the runs and their report")
    parser.add_argument("--classes", type=int, default=NUM_CLASSES, help="characters, half of them for training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="setting of both runs")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    paths = DemoPaths(options.config, ROOT / "launch" / "train.py", options.data, options.runs)
    demonstrate(paths, options.seed, options.overrides, num_classes=options.classes)
    return 0


if __name__ == "__main__":
    run(main)
