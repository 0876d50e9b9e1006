"""Embed images into an index folder that `launch/search.py` and other tools read.

  python launch/embed.py --run runs/NAME --out INDEX [--which last|best|best_test] [--split test]
  python launch/embed.py --checkpoint runs/NAME/step-N --out INDEX --data data/OTHER --format parquet
  accelerate launch launch/embed.py --run runs/NAME --out INDEX --tars 'DIR/*.tar' [--label-field NAME]

Killed at any moment, the same command continues where it was.
"""

import argparse
from pathlib import Path

from gcahng.errors import ConfigError
from gcahng.search.embed import embed_checkpoint
from gcahng.search.index_info import LAYOUTS
from gcahng.search.unfinished import PART_IMAGES, IndexTarget
from gcahng.training.evaluate_checkpoint import evaluation_config
from gcahng.training.launched import end, launched
from launch.checkpoints import (
    add_checkpoint_options,
    add_image_options,
    add_settings,
    add_trust_option,
    check_pattern,
    chosen_path,
    image_settings,
)
from launch.cli import run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/embed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_options(parser)
    add_image_options(parser)
    parser.add_argument("--split", help="split of the shard folder; default: eval.split of the run")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--label-field", help="field of the tars' .json members that holds the class")
    labels.add_argument("--no-labels", action="store_true", help="the tars have no classes: every label is 0")
    parser.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder to write")
    parser.add_argument("--format", default="npy", choices=tuple(LAYOUTS), help="default: npy, for memory mapping")
    parser.add_argument("--normalise", action="store_true", help="embeddings of length 1 (L2-normalised)")
    parser.add_argument("--overwrite", action="store_true", help="replace an index of another checkpoint or data")
    parser.add_argument(
        "--part-images",
        type=int,
        default=PART_IMAGES,
        metavar="N",
        help=f"images of a part, which is embedded again when a rank is killed in it; default: {PART_IMAGES}",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_trust_option(parser)
    add_settings(parser)
    return parser.parse_intermixed_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigError: Options of tars without tars, or of shard folders with them, or a pattern that was not quoted.
    """
    if options.tars is None:
        for name, given in (("--label-field", options.label_field is not None), ("--no-labels", options.no_labels)):
            if given:
                raise ConfigError(f"`{name}` goes with --tars, which is missing. Add it.")
        return
    if options.split is not None:
        raise ConfigError("`--split` is of shard folders: --tars have none. Leave it out.")
    check_pattern(options)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    check(options)
    target = IndexTarget(options.out, options.format, options.normalise, options.overwrite, options.part_images)
    target.check()
    path = chosen_path(options)
    overrides = image_settings(options)
    started = launched(evaluation_config(path, overrides), training=False)
    info = embed_checkpoint(
        path,
        target,
        started,
        overrides,
        split=options.split,
        tars=options.tars,
        label_field=options.label_field,
        labelled=not options.no_labels,
        progress_bars=not options.quiet,
        trust_components=options.trust_components,
    )
    if info is not None:
        size = sum(file.bytes for file in info.files.values())
        print(f"{info.count} embeddings of {info.dim} channels in {options.out} ({size / 2**20:.1f} MiB)")
    end(started)
    return 0


if __name__ == "__main__":
    run(main)
