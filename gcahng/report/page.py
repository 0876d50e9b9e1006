"""The page: one self-contained HTML file, and its pictures as files beside it."""

import base64
import importlib.metadata
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from gcahng.errors import ConfigError
from gcahng.report.facts import (
    best_test_evaluation,
    data_facts,
    data_name,
    last_evaluation,
    loss_name,
    method_name,
    num_steps,
)
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Section, Table
from gcahng.report.templates import FOLDER, environment
from gcahng.training.canvas import write_whole

PAGE = "report.html"
PICTURES = "pictures"
HEADLINE_METRICS = ("R@1", "RP", "MAP@R")
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Card:
    """The headline facts of a run: texts, by the name to print."""

    name: str
    method: str
    numbers: Sequence[tuple[str, str]]
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """A figure as the page holds it: sizes in CSS pixels, the file in base64."""

    content: str
    alt: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Block:
    """Pictures side by side, or a table, or markup."""

    pictures: Sequence[Picture] = ()
    table: Table | None = None
    markup: Markup | None = None


def write_report(runs: Sequence[RunData], out_dir: Path, sections: Sequence[Section]) -> Path:
    """Write `report.html`, and every picture to `pictures/NAME.png`.

    Files appear whole, the page last. Pictures of an earlier report that this one does not have are removed.

    Args:
        runs: At least one; the headline facts come from them.
        out_dir: Made if absent.
        sections: In order.
    Returns:
        The page.
    Raises:
        ConfigError: `out_dir` cannot be written.
        ValueError: Two pictures or sections have one name, or a name is none for a file.
    """
    _check_names([section.name for section in sections])
    figures = [part for section in sections for part in section.parts if isinstance(part, Figure)]
    _check_names([figure.name for figure in figures])
    page = render(runs, sections)
    folder = out_dir / PICTURES
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (out_dir / PAGE).is_file():
            for stale in {p.name for p in folder.glob("*.png")} - {f"{figure.name}.png" for figure in figures}:
                (folder / stale).unlink()
        for figure in figures:
            write_whole(folder / f"{figure.name}.png", figure.png)
        write_whole(out_dir / PAGE, page.encode())
    except OSError as error:
        raise ConfigError(
            f"The report cannot be written to `{out_dir}` ({error.strerror}: {error.filename}). Choose another folder."
        ) from None
    return out_dir / PAGE


def _check_names(names: Sequence[str]) -> None:
    wrong = [name for name in names if not _NAME.fullmatch(name)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if wrong or twice:
        raise ValueError(f"Names must be lower case, digits and '-', each once: wrong {wrong}, more than once {twice}.")


def render(runs: Sequence[RunData], sections: Sequence[Section]) -> str:
    """The page as text."""
    names = ", ".join(run.name for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
    shown = [{"name": s.name, "title": s.title, "intro": s.intro, "blocks": list(_blocks(s.parts))} for s in sections]
    return (
        environment()
        .get_template("page.html")
        .render(
            title=f"{names} \u2013 gcahng report",
            heading=names,
            summary=_summary(runs),
            cards=[_card(run) for run in runs],
            sections=shown,
            # Our own file: it holds no value of a run.
            css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
            version=_version(),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def _version() -> str:
    try:
        return importlib.metadata.version("gcahng")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _blocks(parts: Sequence[Figure | Table | Markup]) -> Iterator[Block]:
    """Neighbouring figures together, everything else alone."""
    pictures: list[Picture] = []
    for part in parts:
        if isinstance(part, Figure):
            pictures.append(_picture(part))
            continue
        if pictures:
            yield Block(pictures=pictures)
            pictures = []
        yield Block(table=part) if isinstance(part, Table) else Block(markup=part)
    if pictures:
        yield Block(pictures=pictures)


def _picture(figure: Figure) -> Picture:
    if figure.png[:8] != _PNG_HEAD:
        raise ValueError(f"Figure `{figure.name}` must be a PNG: got bytes {figure.png[:8]!r}.")
    pixels_wide, pixels_high = struct.unpack(">II", figure.png[16:24])
    return Picture(
        content=base64.b64encode(figure.png).decode(),
        alt=figure.alt,
        caption=figure.caption,
        width=figure.css_width,
        height=max(1, round(figure.css_width * pixels_high / pixels_wide)),
    )


def _summary(runs: Sequence[RunData]) -> str:
    """How many runs, and on which data."""
    count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{count} on {', '.join(dict.fromkeys(data_name(run) for run in runs))}"


def _card(run: RunData) -> Card:
    config = run.config
    last, best = last_evaluation(run), best_test_evaluation(run)
    numbers = []
    if last is not None:
        names = [name for name in HEADLINE_METRICS if name in last.metrics]
        numbers = [(f"{name}, %", f"{last.metrics[name]:.1f}") for name in names]
    model = config.model
    facts = [
        ("Data", f"{data_name(run)}: {data_facts(run).text}"),
        (
            "Model",
            f"{model.backbone}, {model.pooling} pooling, D\u00a0=\u00a0{model.embedding_dim}",
        ),
        ("Batch", f"{config.batch.num_classes} classes \u00d7 {config.batch.num_samples} images, seed {config.seed}"),
        ("Trained", _progress(run)),
    ]
    if last is None:
        facts.append(("Evaluated", "not yet"))
    else:
        facts.append(("Evaluated", f"after epoch {last.epoch}{_best_text(best.metrics, best.epoch) if best else ''}"))
    facts.append(("Folder", str(run.folder)))
    return Card(run.name, f"{method_name(config)}, {loss_name(config)}", numbers, facts)


def _best_text(metrics: Mapping[str, float], epoch: int) -> str:
    if "R@1" not in metrics:
        return ""
    return f"; best R@1 on the test classes {metrics['R@1']:.1f} %, epoch {epoch}"


def _progress(run: RunData) -> str:
    """Steps and epochs so far, time and memory where the run has ended."""
    steps, epochs = num_steps(run), run.config.train.epochs
    if run.results is None:
        begun = max((row["epoch"] for row in run.rows if "epoch" in row), default=0)
        return f"{steps:,} steps, in epoch {begun} of {epochs}, unfinished" if steps else "not begun"
    text = f"{run.results['steps']:,} steps, {epochs} epochs"
    if run.results["seconds_per_step"] is not None:
        text += f", {run.results['seconds_per_step']:.3f} s per step"
    return f"{text}, peak memory {run.results['peak_memory_bytes'] / 2**20:,.0f} MiB"
