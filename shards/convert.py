"""Convert images to tar shards: `python -m shards.convert {glyphs,folder,custom} --out DIR ...`.

Examples:
    python -m shards.convert glyphs --out data/glyphs --classes 400 --size 32
    python -m shards.convert folder --source photos --out data/photos --on-error skip
    python -m shards.convert custom --source-class mine.module:Name --source DIR --out DIR
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from gcahng.data.conversion.convert import DEFAULT_SHARD_BYTES, convert, summary
from gcahng.data.sources.folder import Folder
from gcahng.data.sources.glyphs import Glyphs
from gcahng.data.sources.source import Source, load_source
from gcahng.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    # Ends like an exception, so that the partial folder is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        manifest = convert(
            _source(args),
            args.out,
            seed=args.seed,
            workers=args.workers,
            on_error=args.on_error,
            shard_bytes=args.shard_bytes,
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    print(summary(manifest, args.out))
    return 0


def _source(args: argparse.Namespace) -> Source:
    if args.kind == "folder":
        return Folder(args.source, seed=args.seed, test_share=args.test_share)
    if args.kind == "custom":
        return load_source(args.source_class, args.source, args.seed, dict(args.option))
    return Glyphs(
        args.source,
        seed=args.seed,
        classes=args.classes,
        size=args.size,
        min_faces=args.min_faces,
        test_share=args.test_share,
        identical=args.identical,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(dest="kind", required=True)
    glyphs = kinds.add_parser("glyphs", help="characters drawn from the fonts inside matplotlib")
    glyphs.add_argument("--source", type=Path, help="folder of fonts (default: matplotlib's)")
    glyphs.add_argument("--classes", type=int, help="how many classes (default: all)")
    glyphs.add_argument("--size", type=int, default=64, help="pixels per side")
    glyphs.add_argument("--min-faces", type=int, default=2, help="fewest faces of a class")
    glyphs.add_argument(
        "--identical",
        choices=("keep", "drop"),
        default="keep",
        help="pictures of a class that two faces draw alike (default: keep)",
    )
    folder = kinds.add_parser("folder", help="DIR/<class>/* or DIR/{train,test}/<class>/*")
    folder.add_argument("--source", type=Path, required=True, help="the folder")
    custom = kinds.add_parser("custom", help="a source of your own, by dotted path")
    custom.add_argument("--source-class", required=True, help="package.module:Name")
    custom.add_argument("--source", type=Path, required=True, help="passed to it")
    custom.add_argument("--option", type=_option, action="append", default=[], help="key=value, passed to it")
    for kind in (glyphs, folder):
        kind.add_argument("--test-share", type=float, default=0.5, help="share of test classes")
    for kind in (glyphs, folder, custom):
        _add_common(kind)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="shard folder to create")
    parser.add_argument("--seed", type=int, default=0, help="splits, choices and class order")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="unreadable images and empty classes: stop, or leave out and list (default: fail)",
    )
    parser.add_argument("--shard-bytes", type=int, default=DEFAULT_SHARD_BYTES, help="start a new tar beyond this")
    parser.add_argument("--overwrite", action="store_true", help="replace a shard folder at OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    return key, value


if __name__ == "__main__":
    sys.exit(main())
