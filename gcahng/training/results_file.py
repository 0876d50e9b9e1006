"""`results.json` of a run folder, written at the end of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcahng.errors import TrainingError

RESULTS_FILE = "results.json"


def read_results(path: Path) -> dict[str, Any]:
    """What an earlier start of a run has left; nothing where there is no such file, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the file, whole.

    Raises:
        TrainingError: The disk refuses.
    """
    try:
        write_whole(path, json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written ({error}), but training has ended and its last checkpoint is whole. Make room, "
            "then start the run again with train.resume=auto: it writes the file and ends."
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one move: a full disk, or the end of the process, leaves what was there."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
