"""Evaluate a run or a checkpoint.

`python launch/evaluate.py --run runs/NAME [--which last|best|best_test]`
`python launch/evaluate.py --checkpoint runs/NAME/step-N --data data/OTHER [section.key=value ...]`
"""

import argparse
import json
from pathlib import Path

from gcahng.errors import ConfigError
from gcahng.training.evaluate_checkpoint import evaluate_checkpoint
from gcahng.training.results import metric_columns
from launch.cli import run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Retrieval metrics.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder")
    source.add_argument("--checkpoint", type=Path, help="checkpoint folder step-N, or a file in it")
    parser.add_argument("--which", default="last", choices=("last", "best", "best_test"))
    parser.add_argument("--data", help="shard folder; by default the one of the run")
    parser.add_argument("--json", type=Path, help="write the metrics to this file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    path = options.checkpoint or options.run / options.which
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"`--json` {options.json}: the folder does not exist. Create it first.")
    overrides = list(options.overrides)
    if options.data is not None:
        overrides.append(f"data.dir={json.dumps(options.data, ensure_ascii=False)}")
    row = evaluate_checkpoint(path, overrides, progress_bars=not options.quiet)
    print("  ".join(f"{name} {value:.2f}" for name, value in metric_columns(row).items()))
    print(f"{row['num_queries']} queries, {row['num_without_reference']} without a reference")
    if options.json is not None:
        options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
