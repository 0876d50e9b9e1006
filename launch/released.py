"""Checkpoints of the authors' released code (GCA-HNG, SCT): into a run folder of ours, and back.

  python launch/released.py --import FILE.pth --config configs/cub_resnet50.yaml --out runs/NAME [section.key=value ...]
  python launch/released.py --run runs/NAME --out FILE.pth [--which last|best|best_test]
  python launch/released.py --checkpoint runs/NAME/step-N --out FILE.pth

To evaluate a file alone: launch/evaluate.py --released FILE.pth --config configs/cub_resnet50.yaml
"""

import argparse
from pathlib import Path

from gcahng.compat import export_released, import_released
from gcahng.errors import ConfigError
from gcahng.training.launched import require_one_process
from gcahng.training.output_files import check_output
from launch.checkpoints import add_released_options, chosen_path, released_with_config
from launch.cli import run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/released.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_released_options(parser, "--import")
    parser.add_argument("--out", type=Path, required=True, help="run folder to make, or with --run the .pth file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="setting of --config to replace, with --import"
    )
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    require_one_process("launch/released.py")
    released = released_with_config(options, "--import")
    if released is not None:
        folder = import_released(*released, options.out, options.overrides)
        print(f"{folder}: use it as --run {options.out}, or as train.init_from={folder}")
        return 0
    if options.overrides:
        raise ConfigError(f"{options.overrides[0]!r}: settings go with --import. Leave them out.")
    check_output("--out", options.out)
    left_out = export_released(chosen_path(options), options.out)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")
    if left_out:
        print(f"left out, since the authors' code has no place for it: {', '.join(left_out)}")
    return 0


if __name__ == "__main__":
    run(main)
