"""Show what a shard folder holds: `python -m shards.info LOCATION [--json FILE]`.

Prints the source, every split with its classes, images and shards, a histogram of the images per class, the
comparison with the published protocol, duplicate images and what was skipped. Exit status: 0, or 2 for an error.
"""

import argparse
import json
import sys
from pathlib import Path

from gcahng.data.shards.info import describe, describe_text
from gcahng.data.shards.reader import ShardSet
from gcahng.errors import InputError
from shards.output import escape_unprintable


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    escape_unprintable()
    try:
        description = describe(ShardSet.open(args.location), args.location)
        if args.json:
            _write_json(args.json, description)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(describe_text(description))
    return 0


def _write_json(path: Path, description: dict[str, object]) -> None:
    try:
        path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"Cannot write {path} ({error.strerror}). Give another --json.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards.info", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("location", help="shard folder, or its URL")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
