"""Convert images to tar shards: `python -m shards.convert SOURCE --out DIR ...`.

Examples:
    python -m shards.convert cub --source CUB_200_2011 --out data/cub
    python -m shards.convert sop --source Stanford_Online_Products --out data/sop --max-side 320
    python -m shards.convert folder --source photos --out data/photos --on-error skip
    python -m shards.convert glyphs --out data/glyphs --classes 400 --size 32
    python -m shards.convert cub --help

Stopped or killed, the same command continues. Exit status: 0 converted, 2 an error that the message explains,
130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import argparse
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gcahng.data.conversion.convert import DEFAULT_SHARD_BYTES, DEFAULT_WINDOW_BYTES, convert, summary
from gcahng.data.conversion.image_file import EncodeSettings
from gcahng.data.conversion.partial_folder import stopped_message
from gcahng.data.sources.registry import KINDS
from gcahng.errors import InputError
from shards.output import escape_unprintable

_DEFAULT_QUALITY = 90
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class _Terminated(BaseException):
    """SIGTERM came."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    escape_unprintable()
    # Ends like an exception, so that files are closed and worker processes end.
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        source = args.kind.make(vars(args))
        manifest = convert(
            source,
            args.out,
            seed=args.seed,
            workers=args.workers,
            on_error=args.on_error,
            shard_bytes=args.shard_bytes,
            window_bytes=args.window_bytes,
            overwrite=args.overwrite,
            progress=not args.quiet,
            encode=_encode_settings(args),
            allow_mismatch=args.allow_mismatch,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _Terminated) as stop:
        print(stopped_message(args.out), file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(summary(manifest, args.out))
    return 0


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _encode_settings(args: argparse.Namespace) -> EncodeSettings | None:
    if args.max_side is None and args.quality is None:
        return None
    return EncodeSettings(max_side=args.max_side, quality=_DEFAULT_QUALITY if args.quality is None else args.quality)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(metavar="SOURCE", required=True)
    for kind in KINDS:
        subparser = kinds.add_parser(
            kind.name,
            help=kind.summary,
            description=f"{kind.summary}\n\n{kind.details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        kind.add_arguments(subparser)
        _add_common(subparser)
        subparser.set_defaults(kind=kind)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="shard folder to create")
    parser.add_argument("--seed", type=int, default=0, help="splits, choices and class order (default: 0)")
    parser.add_argument("--workers", type=int, default=_num_cores(), help="processes (default: one per core)")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="unreadable or missing images: stop, or leave out, count and list (default: fail)",
    )
    parser.add_argument(
        "--allow-mismatch", action="store_true", help="go on where classes or counts are not the published ones"
    )
    parser.add_argument("--max-side", type=int, metavar="PIXELS", help="shrink images to this longer side, as JPEG")
    parser.add_argument(
        "--quality",
        type=int,
        help=f"of JPEGs encoded anew (default: {_DEFAULT_QUALITY}); without --max-side all images are",
    )
    parser.add_argument(
        "--shard-bytes",
        type=_num_bytes,
        default=DEFAULT_SHARD_BYTES,
        metavar="BYTES",
        help="start a new tar beyond this, for example 256M (default)",
    )
    parser.add_argument(
        "--window-bytes",
        type=_num_bytes,
        default=DEFAULT_WINDOW_BYTES,
        metavar="BYTES",
        help="shards that training keeps at hand at a time, for example 8G (default)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a shard folder at OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what a job or container may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _num_bytes(text: str) -> int:
    """A size such as 268435456, 256M or 8G; units are powers of 1024."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:I?B)?", text.upper(), re.ASCII)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 256M or 8G, got {text!r}")
    return int(match[1]) << _UNITS[match[2]]


if __name__ == "__main__":
    sys.exit(main())
