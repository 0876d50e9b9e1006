"""Write the report of runs: one page that needs no network, and its pictures as PNGs.

`python launch/report.py RUN [RUN ...] [--out DIR] [--names NAME [NAME ...]] [--no-embeddings]
[--queries N] [--trust-components]`
"""

import argparse
from pathlib import Path

from gcahng.report.build import build_report, check_installed, default_folder, read_runs
from gcahng.report.gallery import NUM_QUERIES
from gcahng.training.launched import require_one_process
from launch.checkpoints import add_trust_option
from launch.cli import run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/report.py",
        description="One HTML page on one or several runs, finished or not: results beside the papers', learning "
        "curves, hardness, queries and what they find, maps of the embeddings, classes, feature variance.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; give a baseline first")
    parser.add_argument(
        "--out", type=Path, help="folder of report.html and pictures/ (default: `report` in the folder of the runs)"
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs, one name each, in order")
    parser.add_argument("--no-embeddings", action="store_true", help="logs only: no image is read, no model is run")
    parser.add_argument(
        "--queries",
        type=int,
        default=NUM_QUERIES,
        metavar="N",
        help="show so many of the worst queries, and of those on which two runs differ (default: %(default)s)",
    )
    add_trust_option(parser)
    return parser.parse_args(arguments)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    require_one_process("launch/report.py")
    check_installed()
    runs = read_runs(options.runs, options.names, trust_components=options.trust_components)
    out_dir = options.out or default_folder(options.runs)
    print(build_report(runs, out_dir, embeddings=not options.no_embeddings, num_queries=options.queries))
    return 0


if __name__ == "__main__":
    run(main)
