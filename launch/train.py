"""Train: `accelerate launch launch/train.py --config configs/NAME.yaml [section.key=value ...]`.

Plain `python launch/train.py` and `torchrun` do the same; several processes (launch/accelerate/) train one run on one
global batch. `--check` validates the configuration, the data and a few steps, predicts time and memory, and stops.
"""

import argparse

from gcahng.errors import Interrupted
from gcahng.training.config import load_config, settings_help
from gcahng.training.interruption import INTERRUPTED_STATUS
from gcahng.training.launched import end, launched
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
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in run.dir; starts anew whatever train.resume says"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    config = load_config(options.config, options.overrides)
    started = launched(config)
    trainer = Trainer(config, launched=started, progress_bars=not options.quiet, overwrite=options.overwrite)
    status = 0
    try:
        text = forecast(trainer).text() if options.check else results_text(trainer.run(), config.run.dir)
    except Interrupted as error:
        text, status = f"{error} Saved: go on with train.resume=auto.", INTERRUPTED_STATUS
    if started.ranks.first:
        print(text)
    trainer.close()
    end(started)
    return status


if __name__ == "__main__":
    run(main)
