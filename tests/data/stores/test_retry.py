import time

import pytest

from gcahng.data.stores.retry import Pace, PermanentFault, RetrySettings, TemporaryFault, with_retries
from gcahng.errors import ConfigError, DataError


class Flaky:
    """Raises what it is given, then answers."""

    def __init__(self, *faults: Exception) -> None:
        self.faults = list(faults)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.faults:
            raise self.faults.pop(0)
        return "answer"


def test_waits_grow_are_drawn_and_bounded() -> None:
    settings = RetrySettings(first_wait_s=1.0, longest_wait_s=10.0)
    for failures, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0)):
        waits = [settings.wait_s(failures) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
    assert 8.0 < max(settings.wait_s(5) for _ in range(50)) <= 10.0
    assert settings.wait_s(1000) == 10.0


def test_the_server_may_ask_for_a_longer_wait_within_bounds() -> None:
    settings = RetrySettings(first_wait_s=1.0, longest_wait_s=10.0)
    assert settings.wait_s(1, 7.0) == 7.0
    assert settings.wait_s(1, 3600.0) == 10.0


def test_temporary_faults_are_tried_again() -> None:
    attempt, waits, retries = Flaky(TemporaryFault("a", 0.3), TemporaryFault("b")), [], []
    settings = RetrySettings(tries=3, first_wait_s=0.01)
    answer = with_retries(attempt, "It", settings, wait=waits.append, on_retry=lambda: retries.append(1))
    assert answer == "answer"
    assert waits[0] == 0.3
    assert 0.01 <= waits[1] <= 0.02
    assert len(retries) == 2


def test_the_last_try_ends_in_one_error() -> None:
    attempt = Flaky(*(TemporaryFault(f"reason {i}") for i in range(9)))
    message = r"^The file cannot be read: 3 tries, the last one: reason 2\. Check the server and the network"
    with pytest.raises(DataError, match=message):
        with_retries(attempt, "The file", RetrySettings(tries=3), wait=lambda _: None)
    assert attempt.calls == 3


def test_a_long_wait_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    settings = RetrySettings(tries=5, first_wait_s=0.001)
    with_retries(Flaky(TemporaryFault("a")), "It", settings, wait=lambda _: None)
    assert not caplog.records
    with_retries(Flaky(*(TemporaryFault(f"reason {i}") for i in range(4))), "It", settings, wait=lambda _: None)
    assert [record.getMessage() for record in caplog.records] == [
        "It cannot be read yet: reason 1. Up to 3 more tries."
    ]


def test_one_try() -> None:
    with pytest.raises(DataError, match="1 try, the last"):
        with_retries(Flaky(TemporaryFault("a")), "It", RetrySettings(tries=1), wait=lambda _: None)


def test_permanent_faults_are_not_tried_again() -> None:
    attempt = Flaky(PermanentFault("it is gone", "Look elsewhere."))
    with pytest.raises(DataError, match=r"^The file cannot be read: it is gone\. Look elsewhere\.$"):
        with_retries(attempt, "The file", RetrySettings(), wait=lambda _: None)
    assert attempt.calls == 1


def test_a_wait_may_end_the_tries() -> None:
    def wait(_: float) -> None:
        raise KeyboardInterrupt

    attempt = Flaky(TemporaryFault("a"))
    with pytest.raises(KeyboardInterrupt):
        with_retries(attempt, "It", RetrySettings(), wait=wait)
    assert attempt.calls == 1


def test_pace() -> None:
    pace = Pace(RetrySettings(read_timeout_s=0.05, slowest_bytes_per_s=1000))
    time.sleep(0.12)
    pace.check(1_000_000)  # may take 1000 seconds, these 20 bytes 0.05 + 0.02
    with pytest.raises(TemporaryFault, match="too slow: 20 bytes in"):
        pace.check(20)


@pytest.mark.parametrize("settings", [{"tries": 0}, {"read_timeout_s": 0}, {"slowest_bytes_per_s": -1}])
def test_settings_are_checked(settings: dict) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(settings))}` must be"):
        RetrySettings(**settings)
