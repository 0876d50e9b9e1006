"""Reading live metrics of runs: what an endpoint shows, as families, labels and values."""

import os
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from launched_here import launched_here
from prometheus_client.parser import text_string_to_metric_families
from run_cases import make_config

from gcahng.distributed import Ranks
from gcahng.training.observers import Observers, RunObserver
from gcahng.training.trainer import Trainer

ROOT = Path(__file__).parents[1]


@dataclass
class Exported:
    """What was shown.

    Attributes:
        kinds: Type by name as exported.
        labels: Names of labels by name, those of histograms' buckets left out.
        values: Last value by sample name and labels, as in `name{k="1"}` with sorted labels.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    labels: dict[str, set[str]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    def add(self, text: str) -> None:
        for family in text_string_to_metric_families(text):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            for sample in family.samples:
                self.kinds[name] = family.type
                self.labels.setdefault(name, set()).update(sample.labels.keys() - {"le"})
                shown = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
                self.values[f"{sample.name}{{{shown}}}" if shown else sample.name] = sample.value


def scraped(port: int, query: str = "") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics{query}", timeout=30) as answer:
        return str(answer.read().decode())


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that are free now."""
    while True:
        sockets = []
        try:
            with socket.socket() as first:
                first.bind(("127.0.0.1", 0))
                port = int(first.getsockname()[1])
            for number in range(port, port + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", number))
            return port
        except (OSError, OverflowError):
            continue
        finally:
            for each in sockets:
                each.close()


class Scraper(RunObserver):
    """Reads an endpoint at every event, from inside the run."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.exported = Exported()

    def look(self) -> None:
        self.exported.add(scraped(self.port))

    def begin(self, *_: Any) -> None:
        self.look()

    def logged(self, *_: Any) -> None:
        self.look()

    def evaluating(self, *_: Any) -> None:
        self.look()
        assert self.exported.values["gcahng_evaluating"] == 1

    def evaluated(self, *_: Any) -> None:
        self.look()

    def saved(self, *_: Any) -> None:
        self.look()


def watched_run(trainer: Trainer, observer: RunObserver) -> None:
    """Run with one more observer, which comes last; its failures are the test's."""
    trainer.observers = Observers([trainer.observers, observer])
    trainer.run()
    trainer.close()
    assert not getattr(trainer.observers, "_failed", []), "an observer failed"


def metrics_of_rank(ranks: Ranks, shards: Path, run_dir: Path, settings: Mapping[str, Any]) -> Exported:
    """A run on several ranks, with what this rank's endpoint showed."""
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(ranks.size), "RANK": str(ranks.rank), "LOCAL_RANK": str(ranks.rank)}
    config = make_config(shards, run_dir, settings)
    trainer = Trainer(config, launched=launched_here(ranks, config), progress_bars=False)
    assert config.monitor.port is not None
    scraper = Scraper(config.monitor.port + ranks.rank)
    watched_run(trainer, scraper)
    return scraper.exported
