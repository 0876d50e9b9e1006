"""Metrics over HTTP, for Prometheus to scrape."""

import contextlib
import logging
import socket
from typing import Any

from gcahng.monitor.metrics import Metrics

log = logging.getLogger(__name__)


class Endpoint:
    """Serves metrics in a thread of its own until it is closed."""

    def __init__(self, server: Any, thread: Any) -> None:
        self._server, self._thread = server, thread

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_port)

    def close(self) -> None:
        """End the thread and let go of the port."""
        # Loader workers are forked with the listening socket open: closing it here alone would leave a port that
        # takes connections and never answers.
        with contextlib.suppress(OSError):  # refused outside of Linux
            self._server.socket.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def open_endpoint(metrics: Metrics, address: str, port: int) -> Endpoint | None:
    """Serve `metrics` on `address`:`port`; None, with a warning, where that cannot be: a run does not end for it."""
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(port, addr=address, registry=metrics)
    except (OSError, OverflowError) as error:
        log.warning(
            "No metrics endpoint: `monitor.address` %s, port %d cannot be listened on (%s). Training goes on without; "
            "choose another monitor.port.",
            address,
            port,
            error,
        )
        return None
    log.info("Metrics: http://%s:%d/metrics", f"[{address}]" if ":" in address else address, port)
    return Endpoint(server, thread)
