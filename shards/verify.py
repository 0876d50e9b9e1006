"""Check a shard folder: `python -m shards.verify LOCATION [--decode]`.

Reads every byte: checksums of all files, every member of every tar against its index, every sample against the
list of classes, and the counts against the manifest. All faults are listed.

Exit status: 0 whole, 1 faults were found, 2 the folder cannot be checked (no manifest, a wrong option).
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.reader import load_manifest
from gcahng.data.shards.verify import VerifyReport, open_uncached, verify
from gcahng.data.stores import ShardStore
from gcahng.errors import InputError
from shards.output import escape_unprintable


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    escape_unprintable()
    try:
        store = open_uncached(args.location)
        report = _verify(load_manifest(store), store, args)
        if args.json:
            _write_json(args.json, report)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: not everything was checked", file=sys.stderr)
        return 130
    _print(report)
    return 0 if report.is_whole else 1


def _verify(manifest: Manifest, store: ShardStore, args: argparse.Namespace) -> VerifyReport:
    total = sum(shard.bytes for shard in manifest.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=args.quiet) as bar:
        return verify(
            store.location,
            decode=args.decode,
            workers=args.workers,
            store=store,
            progress=lambda size: bar.update(size),
        )


def _write_json(path: Path, report: VerifyReport) -> None:
    try:
        path.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"Cannot write {path} ({error.strerror}). Give another --json.") from None


def _print(report: VerifyReport) -> None:
    for fault in report.faults:
        print(f"fault: {fault}")
    if report.num_faults > len(report.faults):
        print(f"fault: and {report.num_faults - len(report.faults)} more")
    for warning in report.warnings:
        print(f"warning: {warning}")
    decoded = ", all images decoded" if report.decoded else ""
    print(f"read: {report.shards} shards, {report.samples} samples, {report.bytes / 1e6:.1f} MB{decoded}")
    verdict = (
        "whole" if report.is_whole else f"DAMAGED, {report.num_faults} faults. Restore the files or convert again."
    )
    print(f"{report.location}: {verdict}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards.verify", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("location", help="shard folder, or its URL")
    parser.add_argument("--decode", action="store_true", help="decode every image too")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
