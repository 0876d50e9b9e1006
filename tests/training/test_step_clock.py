"""Times of steps that the device does after the host has gone on."""

import pytest

from gcahng.training.step_clock import StepClock


def test_times_stand_as_they_are_where_every_step_is_waited_for() -> None:
    clock = StepClock()
    assert not clock and clock.steady() is None
    for seconds in (9.0, 1.0, 2.0, 3.0):
        clock.add(seconds, seconds / 10)
        clock.settle()
    assert clock
    assert clock.recent(2) == pytest.approx((2.5, 0.25))
    assert clock.recent(100) == pytest.approx((3.75, 0.375))
    assert clock.steady() == 2.5


def test_steps_share_the_time_until_the_device_was_waited_for() -> None:
    clock = StepClock()
    for seconds in (0.1, 0.1, 2.8):  # the third was waited for
        clock.add(seconds, 0.05)
    clock.settle()
    assert clock.recent(1) == pytest.approx((1.0, 0.05))
    clock.add(0.2, 0.1)
    clock.add(0.2, 0.1)
    clock.settle(3.6)  # the wait came after the last step
    assert clock.recent(2) == pytest.approx((2.0, 0.1))
    assert clock.recent(5) == pytest.approx(((3 + 4) / 5, 0.07))
    clock.settle(100.0)  # nothing is open
    assert clock.recent(5)[0] == pytest.approx(7 / 5)


def test_the_first_tenth_is_left_out() -> None:
    clock = StepClock()
    for seconds in [100.0] * 2 + [1.0] * 9 + [2.0] * 9:
        clock.add(seconds, 0.0)
        clock.settle()
    assert clock.steady() == 1.5
