"""The file in which a run says that it lives and where it stands: `status.json` in its folder, for launch/status.py.

A thread writes it, so that a file system that hangs stops no training: every few seconds, and at once when told to.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcahng.monitor.process_facts import this_process

log = logging.getLogger(__name__)

STATUS_FILE = "status.json"
BEAT_SECONDS = 10.0
_END_WAIT_SECONDS = 30.0


class Heartbeat:
    """Keeps `status.json` of a run folder up to date until it is stopped."""

    def __init__(self, run_dir: Path, *, beat_seconds: float = BEAT_SECONDS, **facts: Any) -> None:
        """
        Args:
            run_dir: Run folder; it exists.
            beat_seconds: Between two writes when nothing else happens.
            facts: Plain values that the file shows.
        """
        self._path = run_dir / STATUS_FILE
        self._facts: dict[str, Any] = {**this_process(), "beat_seconds": beat_seconds, **facts}
        self._beat_seconds = beat_seconds
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped = False
        self._refused = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def note(self, **facts: Any) -> None:
        """Change what the file will show next time."""
        with self._lock:
            self._facts.update(facts)

    def now(self, **facts: Any) -> None:
        """Change it, and have it written at once."""
        self.note(**facts)
        self._wake.set()

    def stop(self, **facts: Any) -> None:
        """Write the file a last time."""
        self.note(**facts)
        self._stopped = True
        self._wake.set()
        self._thread.join(_END_WAIT_SECONDS)

    def _beat(self) -> None:
        while True:
            self._wake.clear()
            last = self._stopped
            self._write()
            if last:
                return
            self._wake.wait(self._beat_seconds)

    def _write(self) -> None:
        with self._lock:
            facts = plain({**self._facts, "time": time.time()})
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(self._path)
        except OSError as error:
            if not self._refused:
                log.warning("%s cannot be written (%s): launch/status.py will not know.", self._path, error)
            self._refused = True


def plain(value: Any) -> Any:
    """For JSON, which has no NaN or infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
