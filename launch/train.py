"""Train: `accelerate launch launch/train.py --config configs/NAME.yaml [section.key=value ...]`.

Plain `python launch/train.py` does the same. `--check` validates the configuration, the data and a few steps,
predicts time and memory, and stops.
"""

import argparse
import os

from gcahng.errors import ConfigError
from gcahng.training.config import load_config, settings_help
from gcahng.training.precheck import forecast
from gcahng.training.results import results_text
from gcahng.training.trainer import Trainer
from launch.cli import run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/train.py",
        description="Train a metric model.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--check", action="store_true", help="try a few steps, predict cost, stop")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in run.dir")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != 1:
        raise ConfigError(
            f"launch/train.py trains on one process: got WORLD_SIZE={processes}. "
            "Launch it with `accelerate launch --num_processes 1`."
        )
    config = load_config(options.config, options.overrides)
    trainer = Trainer(config, progress_bars=not options.quiet, overwrite=options.overwrite)
    if options.check:
        print(forecast(trainer).text())
        return 0
    print(results_text(trainer.run(), config.run.dir))
    return 0


if __name__ == "__main__":
    run(main)
