"""What every command line does alike: logging, and clear errors without a traceback."""

import logging
import sys
from collections.abc import Callable

from gcahng.errors import InputError, TrainingError

INPUT_FAULT = 2
"""Exit status for input that can be repaired."""


def run(main: Callable[[], int]) -> None:
    """Run `main` and exit with its status: 2 for input that can be repaired, 1 for a run that diverged."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        status = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = INPUT_FAULT
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
