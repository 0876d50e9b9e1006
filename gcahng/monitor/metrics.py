"""The metrics of one process: made by the table of `specs.py`, set by name, read by an endpoint or into a file."""

import importlib.util
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gcahng.errors import ConfigError
from gcahng.monitor.specs import SPECS, STATES, Spec

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_SPECS = {spec.name: spec for spec in SPECS}


def require_client(setting: str) -> None:
    """Refuse a setting that needs prometheus_client where that is not installed.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError(
            f"`{setting}` needs the package prometheus_client, which is not installed: pip install 'gcahng[monitor]', "
            f"or set {setting}=null."
        )


class Metrics:
    """Values by name; safe to read from other threads.

    Args:
        of_run: Export what concerns the whole run, too (rank 0); False: what concerns this process alone.
    """

    def __init__(self, *, of_run: bool) -> None:
        from prometheus_client import CollectorRegistry

        self._registry = CollectorRegistry()
        self._of_run = of_run
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()  # of what is not one operation: making a gauge
        for spec in SPECS:
            if spec.kind in ("counter", "histogram") and self._exported(spec):
                self._make(spec)

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a counter."""
        if (counter := self._find(name)) is not None:
            counter.inc(amount)

    def observe(self, name: str, seconds: float) -> None:
        """Add a value to a histogram."""
        if (histogram := self._find(name)) is not None:
            histogram.observe(seconds)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        if (gauge := self._find(name)) is not None:
            (gauge.labels(**labels) if labels else gauge).set(value)

    def measure(self, name: str, read: Callable[[], float]) -> None:
        """Have a gauge call `read` whenever it is read."""
        if (gauge := self._find(name)) is not None:
            gauge.set_function(read)

    def describe(self, name: str, /, **labels: str) -> None:
        """Set the labels of an info."""
        if (info := self._find(name)) is not None:
            info.info(labels)

    def state(self, name: str, state: str) -> None:
        """Set a gauge that has one series for each of STATES, 1 for the present one."""
        for one in STATES:
            self.set(name, float(one == state), state=one)

    def collect(self) -> Iterable["Metric"]:
        """What prometheus_client exports: without the time at which each counter was made."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric

    def restricted_registry(self, names: Iterable[str]) -> "_Selected":
        """The same of some names, as an endpoint is asked for it by `?name[]=`."""
        return _Selected(self, frozenset(names))

    def _exported(self, spec: Spec) -> bool:
        return self._of_run or spec.each_rank

    def _find(self, name: str) -> Any:
        """The metric, made when it is first used; None if this process does not export it."""
        spec = _SPECS[name]
        if not self._exported(spec):
            return None
        with self._lock:
            return self._made.get(name) or self._make(spec)

    def _make(self, spec: Spec) -> Any:
        from prometheus_client import Counter, Gauge, Histogram, Info

        common: dict[str, Any] = {"registry": self._registry}
        if spec.kind == "counter":
            made: Any = Counter(spec.name, spec.meaning, spec.labels, **common)
        elif spec.kind == "histogram":
            made = Histogram(spec.name, spec.meaning, spec.labels, buckets=spec.buckets, **common)
        elif spec.kind == "gauge":
            made = Gauge(spec.name, spec.meaning, spec.labels, **common)
        else:  # the library appends _info
            made = Info(re.sub("_info$", "", spec.name), spec.meaning, **common)
        self._made[spec.name] = made
        return made


class Labelled:
    """The same metrics with labels added to each series."""

    def __init__(self, metrics: Metrics, labels: Mapping[str, str]) -> None:
        self._metrics, self._labels = metrics, dict(labels)

    def collect(self) -> Iterable["Metric"]:
        """What prometheus_client exports."""
        for metric in self._metrics.collect():
            metric.samples = [sample._replace(labels=self._labels | sample.labels) for sample in metric.samples]
            yield metric


class _Selected:
    def __init__(self, metrics: Metrics, names: frozenset[str]) -> None:
        self._metrics, self._names = metrics, names

    def collect(self) -> Iterable["Metric"]:
        for metric in self._metrics.collect():
            metric.samples = [sample for sample in metric.samples if sample.name in self._names]
            if metric.samples:
                yield metric
