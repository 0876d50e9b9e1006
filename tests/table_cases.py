"""A small table on tiny shards, and its runs as launch/train.py would make them."""

from dataclasses import dataclass
from pathlib import Path

from gcahng.tables.plan import Choice, Plan, PlannedRun, make_plan
from gcahng.tables.spec import read_table
from gcahng.training.config import load_config
from gcahng.training.trainer import Trainer

SPEC = """
title: Tiny
config: tiny.yaml
data_sets: [folder]  # as its manifest calls the source
metrics: [R@1, MAP@R, train_seconds]
seeds: [0, 1]
which: last
overrides: [train.epochs=2, eval.every_epochs=1]
rows:
  - {name: Baseline, overrides: [graph.enabled=false, generation.enabled=false],
     published: {folder: [50.0±1.5, 20.0, null]}}
  - {name: Baseline + GNN, overrides: [generation.enabled=false]}
  - {name: Other people, run: false, published: {folder: [99.9, null, null]}}
"""


@dataclass(frozen=True)
class Tiny:
    """A folder with shards, `tiny.yaml`, `spec.yaml`, and the runs that `train` has made below `runs`."""

    folder: Path

    @property
    def spec(self) -> Path:
        return self.folder / "spec.yaml"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def plan(self, **choice: object) -> Plan:
        return make_plan(read_table(self.spec), Choice(**{"out": self.runs / "tables", **choice}))  # type: ignore[arg-type]

    def planned(self, row: str, seed: int) -> PlannedRun:
        (cell,) = [cell for cell in self.plan().cells if cell.row.name == row]
        return next(run for run in cell.planned if run.seed == seed)


def train(run: PlannedRun, *overrides: str) -> Path:
    """What launch/train.py does with a run's arguments, in this process; returns the run folder."""
    config = load_config(run.arguments[1], [*run.arguments[3:], *overrides])
    Trainer(config, progress_bars=False).run()
    return Path(config.run.dir)
