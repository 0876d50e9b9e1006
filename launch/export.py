"""Export the metric model of a run or a checkpoint for other programs, checked against the model.

python launch/export.py --run runs/NAME --output model.onnx [--which last|best|best_test]
python launch/export.py --checkpoint runs/NAME/step-N --output model.pt2 --format torch-export
"""

import argparse
from pathlib import Path

from gcahng.export import Exported, ExportSettings, export_checkpoint
from gcahng.export.check import TOLERANCE
from gcahng.export.formats import FORMATS
from gcahng.training.launched import require_one_process
from launch.checkpoints import add_checkpoint_options, add_settings, add_trust_option, chosen_path
from launch.cli import run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_options(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write: .onnx or .pt2")
    parser.add_argument("--format", default="onnx", choices=tuple(FORMATS), help="default: onnx")
    parser.add_argument("--normalise", action="store_true", help="embeddings of length 1 (L2-normalised)")
    parser.add_argument(
        "--include-preprocess",
        action="store_true",
        help="take uint8 images (batch, height, width, 3) and bring in mean and standard deviation, "
        "in place of normalised float32 (batch, 3, height, width); images are cut to size outside",
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images; by default as evaluated")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"largest difference from the model, as a share of an embedding's largest entry; default: {TOLERANCE}",
    )
    add_trust_option(parser)
    add_settings(parser)
    return parser.parse_intermixed_args(arguments)


def report(done: Exported) -> str:
    """What was written and how it compares with the model, in lines."""
    about = done.metadata
    shape = ", ".join(map(str, about["input_shape"]))
    lines = [f"{file}: {file.stat().st_size / 2**20:.1f} MiB" for file in done.files]
    lines.append(f"{about['backbone']}, {about['run']}/{about['checkpoint']}, epoch {about['epoch']}")
    lines.append(f"images ({shape}) {about['input']}")
    length = ", length 1" if about["l2_normalised"] else ""
    lines.append(f"embeddings (batch, {about['embedding_dim']}) float32{length}")
    return "\n".join([*lines, *map(str, done.agreements), *done.notes])


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    require_one_process("launch/export.py")
    settings = ExportSettings(
        format=options.format,
        preprocess=options.include_preprocess,
        l2_normalise=options.normalise,
        image_size=options.image_size,
        tolerance=options.tolerance,
    )
    done = export_checkpoint(
        chosen_path(options), options.output, settings, options.overrides, trust_components=options.trust_components
    )
    print(report(done))
    return 0


if __name__ == "__main__":
    run(main)
