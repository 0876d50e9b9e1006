"""What `launch/train.py` does once signals are noted; importing this imports torch."""

import argparse

from gcahng.errors import Interrupted
from gcahng.training.config import load_config, settings_help
from gcahng.training.interruption import INTERRUPTED_STATUS
from gcahng.training.launched import end, launched
from gcahng.training.precheck import forecast
from gcahng.training.results import results_text
from gcahng.training.signals import Signals
from gcahng.training.trainer import Trainer


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


def train(signals: Signals) -> int:
    """Run the command; returns the exit status."""
    options = parse()
    if options.check:
        signals.obey()  # there is nothing to save
    config = load_config(options.config, options.overrides)
    started = launched(config)
    trainer = Trainer(
        config,
        launched=started,
        progress_bars=not options.quiet,
        overwrite=options.overwrite,
        signals=signals,
    )
    status = 0
    try:
        text = forecast(trainer).text() if options.check else results_text(trainer.run(), config.run.dir)
    except Interrupted as error:
        saved = "It is saved" if trainer.progress.step else "Nothing has been trained yet"
        text, status = f"{error} {saved}: start it again with train.resume=auto.", INTERRUPTED_STATUS
    if started.ranks.first:
        print(text)
    trainer.close()
    end(started)
    return status
