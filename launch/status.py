"""Where runs stand.

  python launch/status.py runs/NAME                 all that is known of a run
  python launch/status.py runs                      a line for each run below a folder; several names likewise
  python launch/status.py runs/NAME --watch 10      again every 10 seconds, until Ctrl-C
  python launch/status.py runs --json               a list of objects

Reads the run folders alone: it works on any machine that sees them, beside the run and after its end. Exit status 2: a
folder is not that of a run.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from gcahng.errors import InputError
from gcahng.monitor.heartbeat import plain
from gcahng.monitor.run_folder import find_runs, read_status
from gcahng.monitor.status_text import block, table

# Not launch/cli.py: it imports torch, which takes seconds.
INPUT_FAULT = 2
_CLEAR = "\033[H\033[2J"


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="launch/status.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a folder of runs")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--watch", type=_seconds, metavar="SECONDS", help="print again every so often")
    return parser.parse_args(arguments)


def report(options: argparse.Namespace) -> str:
    """What is printed.

    Raises:
        ConfigError: A folder holds no run.
    """
    runs = [run for path in options.runs for run in find_runs(path)]
    found = [read_status(run) for run in dict.fromkeys(runs)]
    if options.json:
        return json.dumps(plain([status.as_json() for status in found]), indent=1, allow_nan=False)
    return block(found[0]) if len(found) == 1 and found[0].run == str(options.runs[0]) else table(found)


def main() -> int:
    """Run the command; returns the exit status."""
    options = parse()
    try:
        print(report(options), flush=True)
        while options.watch is not None:
            time.sleep(options.watch)
            text = report(options)
            print((_CLEAR if sys.stdout.isatty() else "\n") + text, flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_FAULT
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
