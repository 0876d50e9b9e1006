"""Trying again: which faults may pass, how long to wait, and the one error when they do not pass."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import SystemRandom
from typing import TypeVar

from gcahng.errors import ConfigError, DataError, UnreachableError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_TOLD_AFTER = 2  # failures; a single one is everyday life and passes in half a second

# Not the process's global generator: that belongs to the run and is seeded. Forked workers must not wait in step.
_JITTER = SystemRandom()


@dataclass(frozen=True)
class RetrySettings:
    """How patiently a remote place is asked.

    Attributes:
        tries: Attempts per request, the first one counted.
        first_wait_s: Wait after the first failure; doubled after each further one, each drawn from 50 to 100 %.
        longest_wait_s: Bound of a wait, also of one that the server asks for (`Retry-After`).
        connect_timeout_s: Time to reach the server.
        read_timeout_s: Time without any byte, and what an answer may take beside its bytes.
        slowest_bytes_per_s: An answer that falls behind `read_timeout_s` plus this pace is given up.
    """

    tries: int = 7
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    slowest_bytes_per_s: float = 65536.0

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ConfigError(f"`tries` must be 1 or more, got {self.tries}. Raise it.")
        for name in ("connect_timeout_s", "read_timeout_s", "slowest_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` must be more than 0, got {getattr(self, name)}. Raise it.")

    def wait_s(self, failures: int, asked_s: float | None = None) -> float:
        """Seconds to wait after so many failures, `asked_s` at least where the server asks for it."""
        wait = self.first_wait_s * 2.0 ** min(failures - 1, 30) * _JITTER.uniform(0.5, 1.0)
        return min(max(wait, asked_s or 0.0), self.longest_wait_s)

    def limit_s(self, num_bytes: int) -> float:
        """Seconds in which so many bytes must have come."""
        return self.read_timeout_s + num_bytes / self.slowest_bytes_per_s


class TemporaryFault(Exception):
    """A request failed in a way that may pass.

    Args:
        reason: What happened.
        wait_s: How long the server asks to be left alone.
    """

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_s = wait_s


class PermanentFault(Exception):
    """A request failed, and would fail again.

    Args:
        reason: What happened.
        repair: What the user can do.
    """

    def __init__(self, reason: str, repair: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.repair = repair


class Pace:
    """Notices an answer that comes too slowly, however steadily."""

    def __init__(self, settings: RetrySettings) -> None:
        self._settings = settings
        self._start = time.monotonic()

    def check(self, received: int) -> None:
        """Called whenever bytes came.

        Raises:
            TemporaryFault: Fewer came than the slowest pace.
        """
        passed = time.monotonic() - self._start
        if passed > self._settings.limit_s(received):
            raise TemporaryFault(f"too slow: {received} bytes in {passed:.3g} s")


def with_retries(
    attempt: Callable[[], Answer],
    what: str,
    settings: RetrySettings,
    *,
    wait: Callable[[float], object] = time.sleep,
    on_retry: Callable[[], None] = lambda: None,
) -> Answer:
    """The answer of `attempt`, called again after a `TemporaryFault`.

    Args:
        attempt: One try; an attempt may continue where the one before it stopped.
        what: What is asked for and where, for the message.
        settings: How often and how patiently.
        wait: Sleeps so many seconds; may raise to end the tries.
        on_retry: Called before each further try.
    Raises:
        DataError: A fault that does not pass.
        UnreachableError: The last try failed.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except PermanentFault as fault:
            raise DataError(f"{what} cannot be read: {fault.reason}. {fault.repair}") from None
        except TemporaryFault as fault:
            failures += 1
            if failures >= settings.tries:
                raise UnreachableError(
                    f"{what} cannot be read: {failures} {'try' if failures == 1 else 'tries'}, the last one: "
                    f"{fault.reason}. Check the server and the network, then start again."
                ) from None
            pause = settings.wait_s(failures, fault.wait_s)
            if failures == _TOLD_AFTER:
                log.warning(
                    "%s cannot be read yet: %s. Up to %d more tries.", what, fault.reason, settings.tries - failures
                )
        on_retry()
        wait(pause)
