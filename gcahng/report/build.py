"""The report of runs, from their folders to the page."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gcahng.errors import ConfigError, InputError, TrainingError
from gcahng.report.confusion import confusion_section
from gcahng.report.curves import curves_section
from gcahng.report.embedded import EmbeddedRuns, embed_runs
from gcahng.report.gallery import NUM_QUERIES, gallery_section
from gcahng.report.hardness import hardness_section
from gcahng.report.map import map_section
from gcahng.report.page import PICTURES, write_report
from gcahng.report.results_table import results_section
from gcahng.report.run_data import RunData, read_run
from gcahng.report.section import Section
from gcahng.report.variance import variance_section

Maker = Callable[[Sequence[RunData]], Section | None]
EmbeddedMaker = Callable[[Sequence[RunData], EmbeddedRuns], Section | None]
# Name, heading and maker, in the order of the page. A heading is used where a section cannot be made.
OF_LOGS: tuple[tuple[str, str, Maker], ...] = (
    ("results", "Results", results_section),
    ("curves", "Learning curves", curves_section),
    ("hardness", "Hardness of the negatives", hardness_section),
)
OF_EMBEDDINGS: tuple[tuple[str, str, EmbeddedMaker], ...] = (
    ("gallery", "Queries and what they find", gallery_section),
    ("map", "Maps of embeddings", map_section),
    ("classes", "Classes: accuracy and confusion", confusion_section),
    ("variance", "Feature variance", variance_section),
)


def check_installed() -> None:
    """Say at once what is missing, before minutes of work.

    Raises:
        InputError: A package of the extra `report` is missing.
    """
    missing = []
    for package, module in (("matplotlib", "matplotlib"), ("scikit-learn", "sklearn"), ("jinja2", "jinja2")):
        try:
            __import__(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise InputError(
            f"The report needs {', '.join(missing)}, which is not installed. Install it with: "
            "pip install 'gcahng[report]'"
        )


def read_runs(
    folders: Sequence[Path], names: Sequence[str] | None = None, *, trust_components: bool = False
) -> list[RunData]:
    """Read run folders.

    Args:
        folders: At least one.
        names: One per folder; None takes as much of each folder's path as tells them apart.
        trust_components: See `RunData`.
    Raises:
        ConfigError: A folder is no run or stands twice, or the names are not one for each and all different.
    """
    resolved = [folder.resolve() for folder in folders]
    twice = [str(f) for f, count in Counter(resolved).items() if count > 1]
    if twice:
        raise ConfigError(f"Every run must be named once: got {', '.join(twice)} more than once. Drop the repetition.")
    if names is None:
        names = short_names(resolved)
    if len(names) != len(folders) or len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise ConfigError(
            f"`--names` must hold one name per run, all different, none empty: expected {len(folders)}, got "
            f"{len(names)} ({', '.join(map(repr, names))})."
        )
    return [
        read_run(folder, name, trust_components=trust_components) for folder, name in zip(folders, names, strict=True)
    ]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of absolute paths, as few as tell them all apart."""
    depth = 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names
        depth += 1


def default_folder(folders: Sequence[Path]) -> Path:
    """Where the report goes: `report` in the run's folder, or in the folder that holds all the runs."""
    folder = Path(os.path.commonpath([folder.resolve() for folder in folders])) / "report"
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def build_report(
    runs: Sequence[RunData], out_dir: Path, *, embeddings: bool = True, num_queries: int = NUM_QUERIES
) -> Path:
    """Make all sections that the runs have something for, and write the page.

    A section that cannot be made says why in its place; so does the page as a whole where embeddings are wanted but
    data or checkpoint of a run are missing.

    Args:
        runs: At least one.
        out_dir: Made if absent.
        embeddings: Embed the evaluated images, for queries, maps, classes and variances; takes minutes.
        num_queries: The gallery shows so many of the worst queries, and of those on which two runs differ.
    Returns:
        The page.
    Raises:
        InputError: A package of the extra `report` is missing, the folder cannot be written, or a number is none.
    """
    if num_queries < 1:
        raise ConfigError(f"The number of queries to show must be at least 1: got {num_queries}.")
    check_installed()
    check_folder(out_dir)
    sections = [_made(name, title, partial(make, runs)) for name, title, make in OF_LOGS]
    if embeddings:
        embedded = embed_runs(runs)
        if embedded.reasons:
            sections.append(_not_embedded(embedded))
        if embedded:
            for name, title, maker in OF_EMBEDDINGS:
                arguments = {"num_queries": num_queries} if maker is gallery_section else {}
                sections.append(_made(name, title, partial(maker, runs, embedded, **arguments)))
    return write_report(runs, out_dir, [section for section in sections if section is not None])


def _made(name: str, title: str, make: Callable[[], Section | None]) -> Section | None:
    """The section; what is wrong with its input in its place."""
    try:
        return make()
    except (InputError, TrainingError) as error:
        return Section(name, title, f"Left out: {error}", [])


def _not_embedded(embedded: EmbeddedRuns) -> Section:
    reasons = "\n".join(f"{name}: {reason}" for name, reason in embedded.reasons.items())
    what = "these runs" if embedded else "any run"
    return Section(
        "not-embedded",
        "What could not be drawn",
        f"Queries, maps, classes and variances of {what} are missing, since the images could not be embedded.\n"
        f"{reasons}",
        [],
    )


def check_folder(out_dir: Path) -> None:
    """Say at once if the page has no place.

    Raises:
        ConfigError: A part of the path is no folder, or must not be written to.
    """
    folder = out_dir / PICTURES
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"The report's folder `{out_dir}` cannot be written: expected a folder that may be written to, got "
            f"{existing}. Choose another one."
        )
