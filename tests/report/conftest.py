"""Two finished runs, a baseline and GCA-HNG, on classes whose names are markup; shared by the tests of the report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from report_cases import HOSTILE_CLASSES, HOSTILE_RUN
from run_cases import convert_patterns, draw_patterns, train

from gcahng.report import confusion, curves, gallery, hardness, variance
from gcahng.report import map as maps
from gcahng.report.build import build_report
from gcahng.report.embedded import EmbeddedRuns, embed_runs
from gcahng.report.run_data import RunData, read_run


@pytest.fixture(scope="session")
def hostile_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 classes of 6 images; never written to."""
    folder = draw_patterns(tmp_path_factory.mktemp("hostile") / "images")
    for old, new in HOSTILE_CLASSES.items():
        (folder / old).rename(folder / new)
    return convert_patterns(folder, folder.with_name("shards"))


@pytest.fixture(scope="session")
def run_folders(hostile_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders `baseline` and `gca_hng`, two epochs each; never written to."""
    folder = tmp_path_factory.mktemp("runs")
    off = {"graph.enabled": False, "generation.enabled": False}
    for name, settings in (("baseline", off), ("gca_hng", {})):
        train(hostile_shards, folder / name, {"train.epochs": 2} | settings)
    return {name: folder / name for name in ("baseline", "gca_hng")}


@pytest.fixture(scope="session")
def report_runs(run_folders: dict[str, Path]) -> Sequence[RunData]:
    """The same, read; the second has a hostile name."""
    return [
        read_run(run_folders["baseline"], "baseline"),
        read_run(run_folders["gca_hng"], HOSTILE_RUN),
    ]


@pytest.fixture(scope="session")
def embedded_runs(report_runs: Sequence[RunData]) -> EmbeddedRuns:
    """Both runs, embedded."""
    return embed_runs(report_runs)


@pytest.fixture(scope="session")
def undrawn() -> Callable[[], AbstractContextManager[None]]:
    """Within it the sections' pictures are empty files: for tests of what surrounds them."""

    @contextmanager
    def without_pictures() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module in (confusion, curves, hardness, maps, variance):
                patch.setattr(module, "chart_png", lambda figure: b"")
            patch.setattr(gallery, "comparison_png", lambda query, found: b"")
            patch.setattr(confusion, "pairs_png", lambda pairs: b"")
            yield

    return without_pictures


@pytest.fixture(scope="session")
def report_page(report_runs: Sequence[RunData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole report of both runs and of one that has only begun (no evaluation, no checkpoint); never written to."""
    folder = tmp_path_factory.mktemp("report")
    last = report_runs[-1]
    begun = replace(last, name="begun", folder=folder / "begun", rows=last.rows[:1], hardness=[], results=None)
    return build_report([*report_runs, begun], folder / "some folder")
