"""The demonstration behind `make demo`: `python -m launch.demo [--seed N] [section.key=value ...]`."""

import argparse
from pathlib import Path

from gcahng.training.demo import DemoPaths, run_demo
from launch.cli import run

ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="launch/demo.py", description="Baseline against GCA-HNG.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DemoPaths.data, help="shard folder")
    parser.add_argument("--runs", type=Path, default=DemoPaths.runs, help="folder for the runs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    paths = DemoPaths(ROOT / "configs" / "demo.yaml", ROOT / "launch" / "train.py", options.data, options.runs)
    run_demo(paths, options.seed, tuple(options.overrides))
    return 0


if __name__ == "__main__":
    run(main)
