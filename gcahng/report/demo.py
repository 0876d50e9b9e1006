"""The demonstration to its end: the data set, the two runs, their table, and the report on both."""

from collections.abc import Sequence
from pathlib import Path

from gcahng.report.build import build_report, check_folder, check_installed, read_runs
from gcahng.training.demo import NUM_CLASSES, SYSTEMS, DemoPaths, run_demo

RUN_NAMES = {"baseline": "baseline", "gca_hng": "GCA-HNG"}


def demonstrate(
    paths: DemoPaths, seed: int = 0, overrides: Sequence[str] = (), *, num_classes: int = NUM_CLASSES
) -> Path:
    """Convert, train both systems, print their table, write the report.

    Args:
        paths: Where things are.
        seed: Of both runs.
        overrides: `section.key=value` for both runs.
        num_classes: Characters in the data set, half of them for training.
    Returns:
        The report's page.
    Raises:
        InputError: Something is missing, or a setting cannot be used; nothing has been written.
        TrainingError: A run failed.
    """
    folder = paths.runs / f"seed-{seed}"
    check_installed()
    check_folder(folder / "report")
    run_demo(paths, seed, overrides, num_classes=num_classes)
    print("\nWriting the report ...", flush=True)
    runs = read_runs([folder / name for name in SYSTEMS], [RUN_NAMES[name] for name in SYSTEMS])
    page = build_report(runs, folder / "report")
    print(f"Results, curves, queries with what they find, and maps, on one page: {page}")
    return page
