"""Metrics in a file, for the textfile collector of node_exporter, where nobody can scrape a job."""

import logging
from pathlib import Path

from gcahng.monitor.metrics import Labelled

log = logging.getLogger(__name__)


class Textfile:
    """A file that is rewritten as a whole; a disk that refuses is logged once, and tried again each time."""

    def __init__(self, path: Path, metrics: Labelled) -> None:
        """
        Args:
            path: NAME.prom.
            metrics: What it shows.
        """
        self.path = path
        self._metrics = metrics
        self._refused = False

    def write(self) -> None:
        """Replace the file."""
        from prometheus_client import write_to_textfile

        try:
            write_to_textfile(str(self.path), self._metrics)
        except OSError as error:
            if not self._refused:
                log.warning("`monitor.textfile` %s cannot be written (%s). Training goes on.", self.path, error)
            self._refused = True
            return
        if self._refused:
            log.info("`monitor.textfile` %s is written again.", self.path)
        self._refused = False
