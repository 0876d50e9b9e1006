"""Replay golden files in float64: `python tests/check_golden.py FILE...`.

Prints one line per quantity with its error; exits with 1 if an error is beyond 1e-9, with 2 for a file that cannot
be replayed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from golden_replay import TOLERANCE, replay


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    failed = 0
    for path in paths:
        try:
            rows = replay(Path(path))
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        for name, error in rows:
            bad = not error <= TOLERANCE
            failed += bad
            print(f"{'FAIL' if bad else 'ok  '} {error:9.2e}  {Path(path).name}  {name}")
        print(f"{path}: {len(rows)} quantities, largest error {max(e for _, e in rows):.2e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
