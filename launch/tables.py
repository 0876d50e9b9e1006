"""Tables of the papers, and your own: `python launch/tables.py list|show|run|submit|time|collect [TABLE ...]`.

A TABLE is a name in configs/tables/ or a spec file. `show` lists its runs, `run` runs the missing ones here, `submit`
gives them to SLURM, `time` measures inference, `collect` prints what has been run beside the published numbers.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from gcahng.errors import ConfigError, InputError
from gcahng.tables.collect import Collected, collect
from gcahng.tables.listing import list_text, plan_text
from gcahng.tables.output import as_json, as_markdown, as_text
from gcahng.tables.paired import differences
from gcahng.tables.plan import DEFAULT_OUT, Choice, make_plan
from gcahng.tables.run_local import missing_runs, run_missing
from gcahng.tables.spec import WHICH, Table, find_table, read_table
from gcahng.tables.submit import submit
from gcahng.tables.timing import NUM_BATCHES, time_runs
from gcahng.training.launched import require_one_process
from launch.cli import run

ROOT = Path(__file__).resolve().parent.parent
SPECS = ROOT / "configs" / "tables"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/tables.py",
        description="Tables of the papers, and your own, as lists of runs. docs/tables.md says more.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help="names of the tables")
    show = verbs.add_parser("show", help="every run: configuration, overrides, seed, folder, whether it is done")
    here = verbs.add_parser("run", help="run what is missing, one after the other, and go on with what was interrupted")
    here.add_argument("--launcher", help='command that starts launch/train.py (default: this Python), e.g. "torchrun"')
    array = verbs.add_parser("submit", help="submit what is missing as a SLURM array (slurm/tables.sh)")
    array.add_argument("--sbatch", default="", metavar="OPTIONS", help='of sbatch, e.g. "--gpus-per-node=8"')
    array.add_argument("--at-once", type=_count, metavar="N", help="run at most N of them together")
    array.add_argument("--dry-run", action="store_true", help="print the command and write nothing")
    timing = verbs.add_parser("time", help="measure seconds per batch of inference for the finished runs (table 7)")
    timing.add_argument("--batches", type=int, default=NUM_BATCHES, metavar="N", help="batches (default: %(default)s)")
    found = verbs.add_parser("collect", help="print what has been run, beside the published numbers")
    found.add_argument("--against", metavar="ROW", help="also each row's difference from this one, over common seeds")
    found.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found to this file")
    found.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to this file")
    for verb in (here, array):
        verb.add_argument("--limit", type=_count, metavar="N", help="at most N runs")
    for verb in (show, here, array, timing, found):
        _add_choice(verb)
    return parser.parse_args(_joined(sys.argv[1:] if arguments is None else arguments))


def _joined(arguments: list[str]) -> list[str]:
    """`--sbatch --time=5` as `--sbatch=--time=5`: argparse takes a word that begins so for an option of its own."""
    joined: list[str] = []
    for word in arguments:
        if joined and joined[-1] == "--sbatch":
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on: got `{text}`")
    return number


def _add_choice(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("tables", nargs="+", metavar="TABLE", help="name in configs/tables/, or a spec file")
    verb.add_argument("--rows", nargs="+", default=(), metavar="ROW", help="these rows: names, or parts of labels")
    verb.add_argument("--data-sets", nargs="+", default=(), metavar="NAME", help="these data sets")
    verb.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these seeds in place of the table's")
    verb.add_argument("--data", nargs="+", default=(), metavar="NAME=DIR", help="where a data set lies")
    verb.add_argument("--set", nargs="+", default=(), metavar="section.key=value", help="a setting of all runs")
    verb.add_argument("--which", choices=WHICH, help="evaluation of a run that counts (default: as the table says)")
    verb.add_argument("--runs", nargs="+", type=Path, metavar="DIR", help="look for runs here (default: runs)")
    verb.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="folder of new runs")


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    require_one_process("launch/tables.py")
    if options.verb == "list":
        print(list_text([read_table(file) for file in sorted(SPECS.glob("*.yaml"))]))
        return 0
    tables = [read_table(find_table(name, SPECS)) for name in options.tables]
    collected = [_collected(table, options) for table in tables]
    if options.verb == "show":
        print("\n\n".join(map(plan_text, collected)))
    elif options.verb == "run":
        launcher = [sys.executable] if options.launcher is None else shlex.split(options.launcher)
        return _run(collected, [*launcher, str(ROOT / "launch" / "train.py")], options.limit)
    elif options.verb == "submit":
        runs = missing_runs(collected)[: options.limit]
        arguments = shlex.split(options.sbatch)
        print(
            submit(runs, options.out, arguments, at_once=options.at_once, dry_run=options.dry_run)
            if runs
            else "nothing is missing"
        )
    elif options.verb == "time":
        time_runs(collected, options.batches, print)
    else:
        _print(collected, options)
    return 0


def _collected(table: Table, options: argparse.Namespace) -> Collected:
    data = dict(_name_and_folder(text) for text in options.data)
    choice = Choice(options.rows, options.data_sets, options.seeds, data, options.set, options.out)
    absent = [str(folder) for folder in options.runs or () if not folder.is_dir()]
    if absent:
        raise ConfigError(f"--runs: there is no folder {', '.join(absent)}. Give the folders that hold run folders.")
    return collect(make_plan(table, choice), options.runs or [Path("runs")], options.which)


def _name_and_folder(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ConfigError(f"--data takes NAME=DIR: got `{text}`.")
    return name, folder


def _run(collected: list[Collected], command: list[str], limit: int | None) -> int:
    runs = missing_runs(collected)[:limit]
    failed = run_missing(runs, command, lambda line: print(line, flush=True))
    print(f"{len(runs)} missing runs, {len(failed)} failed or interrupted" if runs else "nothing is missing")
    return 1 if failed else 0


def _print(collected: list[Collected], options: argparse.Namespace) -> None:
    against = options.against or ""
    paired = [differences(found, against) if against else None for found in collected]
    both = list(zip(collected, paired, strict=True))
    print("\n\n".join(as_text(found, by_cell, against) for found, by_cell in both))
    made = {"date": time.strftime("%Y-%m-%d"), "command": f"python launch/tables.py {shlex.join(sys.argv[1:])}"}
    if options.markdown is not None:
        text = "\n".join(as_markdown(found, by_cell, against) for found, by_cell in both)
        _write(options.markdown, f"{text}\n{made['date']}: `{made['command']}`\n")
    if options.json is not None:
        tree = made | {found.plan.table.name: as_json(found, by_cell, against) for found, by_cell in both}
        _write(options.json, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}. Give the path of a file.") from None


if __name__ == "__main__":
    run(main)
