"""How long steps take where the device works on while the host goes ahead."""

import statistics


class StepClock:
    """Seconds of each step, and how much of them was waiting for data.

    A step on CUDA returns before the device has done it, so single times say little. Their sum is right wherever the
    host has waited for the device: `settle` then gives each step since the last such place the mean.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[float, float]] = []
        self._settled = 0

    def __bool__(self) -> bool:
        return bool(self._steps)

    def add(self, seconds: float, waited: float) -> None:
        """Count a step: its seconds, and those of them that it waited for data."""
        self._steps.append((seconds, waited))

    def settle(self, extra: float = 0.0) -> None:
        """The device has caught up, `extra` seconds after the last step: share the time out among the open steps."""
        count = len(self._steps) - self._settled
        if count:
            mean = (sum(seconds for seconds, _ in self._steps[self._settled :]) + extra) / count
            self._steps[self._settled :] = [(mean, waited) for _, waited in self._steps[self._settled :]]
            self._settled = len(self._steps)

    def recent(self, count: int) -> tuple[float, float]:
        """Mean seconds and mean waiting of the last `count` steps, of which there is at least one."""
        steps = self._steps[-count:]
        return statistics.mean(seconds for seconds, _ in steps), statistics.mean(waited for _, waited in steps)

    def steady(self) -> float | None:
        """Median seconds, the first tenth of the steps left out; None without steps."""
        steady = [seconds for seconds, _ in self._steps[len(self._steps) // 10 :]]
        return statistics.median(steady) if steady else None
