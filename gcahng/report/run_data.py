"""What a report reads of a run folder."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gcahng.errors import ConfigError
from gcahng.training import checkpoint
from gcahng.training.checkpoint_files import read_object
from gcahng.training.config import Config, load_config
from gcahng.training.run_log import HARDNESS_FILE, METRICS_FILE, read_rows


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        folder: Run folder.
        name: Short, unique among the runs of a report.
        config: Of the run.
        rows: All rows of `metrics.jsonl`.
        hardness: All rows of `hardness.jsonl`, see `gcahng.training.hardness`; empty where none was recorded.
        results: `results.json`; None where the run is not finished.
        trust_components: Run code from outside this library, if the configuration names some.
    """

    folder: Path
    name: str
    config: Config
    rows: list[dict[str, Any]]
    hardness: list[dict[str, Any]]
    results: dict[str, Any] | None
    trust_components: bool = False

    @cached_property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint; None where there is none yet."""
        path = self.folder / "last"
        return path if path.exists() else None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl` of one kind ("step" or "evaluation")."""
        return [row for row in self.rows if row.get("kind") == kind]


def read_run(folder: Path, name: str, *, trust_components: bool = False) -> RunData:
    """Read a run folder.

    Args:
        folder: Run folder.
        name: Shown in the report.
        trust_components: See `RunData`.
    Raises:
        ConfigError: It is no run folder, or its configuration cannot be used.
        DataError: Its results are damaged.
    """
    config_file = folder / checkpoint.CONFIG
    if not config_file.is_file():
        raise ConfigError(
            f"`{folder}` is no run folder: expected it to hold {checkpoint.CONFIG}. Name the folder that a training "
            "run wrote (run.dir)."
        )
    results = folder / "results.json"
    return RunData(
        folder=folder,
        name=name,
        config=load_config(config_file),
        rows=read_rows(folder / METRICS_FILE),
        hardness=read_rows(folder / HARDNESS_FILE),
        results=read_object(results) if results.is_file() else None,
        trust_components=trust_components,
    )
