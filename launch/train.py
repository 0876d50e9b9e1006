"""Train: `accelerate launch launch/train.py --config configs/NAME.yaml [section.key=value ...]`.

Plain `python launch/train.py` does the same. `--check` validates the configuration, the data and a few steps,
predicts time and memory, and stops.
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping

from gcahng.errors import ConfigError
from gcahng.training.config import Config, load_config, settings_help
from gcahng.training.precheck import forecast
from gcahng.training.results import results_text
from gcahng.training.trainer import Trainer
from launch.cli import INPUT_FAULT, run


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
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in run.dir; starts anew whatever train.resume says"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def as_launched(config: Config, environment: Mapping[str, str]) -> Config:
    """The configuration with what `accelerate launch` asks for by environment variables.

    Raises:
        ConfigError: The launcher asks for another device or precision than the configuration.
    """
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t"):
        if config.train.device == "cuda":
            raise ConfigError(
                "`train.device` is cuda, but accelerate was told to use the CPU (ACCELERATE_USE_CPU). "
                "Launch without --cpu, or set train.device=cpu."
            )
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, device="cpu"))
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("", "no", config.train.precision):
        raise ConfigError(
            f"`train.precision` is {config.train.precision}, but accelerate was told {precision} "
            "(ACCELERATE_MIXED_PRECISION). Launch with --mixed_precision no, or make the two agree."
        )
    return config


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != 1:
        if os.environ.get("RANK", "0") != "0":  # rank 0 says why
            return INPUT_FAULT
        raise ConfigError(
            f"launch/train.py trains on one process: got WORLD_SIZE={processes}. "
            "Launch it with `accelerate launch --num_processes 1`."
        )
    config = as_launched(load_config(options.config, options.overrides), os.environ)
    trainer = Trainer(config, progress_bars=not options.quiet, overwrite=options.overwrite)
    if options.check:
        print(forecast(trainer).text())
        return 0
    print(results_text(trainer.run(), config.run.dir))
    return 0


if __name__ == "__main__":
    run(main)
