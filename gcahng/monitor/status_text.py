"""A run's status as text for the terminal."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from gcahng.monitor.run_folder import RUNNING, RunStatus

_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
_HEADINGS = ("run", "state", "epoch", "step", "s/step", "left", "loss", "R@1", "MAP@R", "saved", "")


def duration(seconds: float | None) -> str:
    """For instance 1 h 20 min; two units at most."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    left = max(0.0, seconds)
    parts: list[str] = []
    for size, name in _UNITS:
        if left >= size and len(parts) < 2:
            parts.append(f"{int(left // size)} {name}")
            left %= size
    return " ".join(parts) or "0 s"


def block(status: RunStatus) -> str:
    """All that is known of one run."""
    rows = [("state", _state(status)), ("progress", _progress(status)), ("pace", _pace(status))]
    if status.losses:
        losses = "  ".join(f"{name.removesuffix('_loss')} {_number(value)}" for name, value in status.losses.items())
        rows.append(("losses", f"{losses}  (step {status.logged_step})"))
    for kind, found in (("last", status.last), ("best", status.best)):
        rows += [(f"{kind} {split}", _evaluation(row)) for split, row in found.items()]
    saved = "none" if status.checkpoint is None else f"{status.checkpoint}, {duration(status.checkpoint_age)} old"
    rows.append(("checkpoint", saved))
    counts = {"steps left out": status.dropped, "images skipped": status.skipped, "draws repaired": status.repaired}
    counts["failed saves"] = status.failed_saves
    rows.append(("counts", "  ".join(f"{name} {count}" for name, count in counts.items())))
    if status.error:
        rows.append(("error", status.error))
    rows += [("warning", text) for text in status.warnings]
    width = max(len(name) for name, _ in rows)
    return "\n".join([printable(status.run), *(f"  {name:{width}}  {printable(text)}" for name, text in rows)])


def table(found: Sequence[RunStatus]) -> str:
    """One line for each run."""
    return _aligned([_HEADINGS, *(tuple(map(printable, _line(status))) for status in found)])


def _state(status: RunStatus) -> str:
    where = ", ".join(
        [
            *([status.host] if status.host else []),
            *([f"process {status.pid}"] if status.pid else []),
            *([f"{status.ranks} ranks"] if (status.ranks or 1) > 1 else []),
        ]
    )
    text = status.state + (f" ({status.activity})" if status.activity else "")
    return f"{text}, last sign {duration(status.sign_age)} ago" + (f"; {where}" if where else "")


def _progress(status: RunStatus) -> str:
    text = f"epoch {_of(status.epoch, status.epochs)}, step {_of(status.step, status.planned_steps)}"
    if status.planned_steps:
        text += f" ({100 * min(1.0, status.step / status.planned_steps):.1f} %)"
    return text + (f", about {duration(status.seconds_left)} left" if status.seconds_left is not None else "")


def _pace(status: RunStatus) -> str:
    if status.step_seconds is None:
        return "no step yet"
    text = f"{status.step_seconds:.3g} s/step"
    if status.images_per_second is not None:
        text += f", {status.images_per_second:.3g} images/s"
    return text + f", {100 * (status.data_wait_share or 0.0):.0f} % of it waiting for data"


def _evaluation(row: dict[str, Any]) -> str:
    shown = [(f"R@{name.removeprefix('recall_at_')}", row[name]) for name in row if name.startswith("recall_at_")]
    shown += [("MAP@R", row["map_at_r"])] if "map_at_r" in row else []
    text = "  ".join(f"{name} {_percent(value)}" for name, value in shown)
    return text + f"  (epoch {row.get('epoch', '?')})"


def _line(status: RunStatus) -> tuple[str, ...]:
    row = status.last.get("test", {})
    return (
        status.run,
        status.activity if status.state == RUNNING and status.activity else status.state,
        _of(status.epoch, status.epochs),
        _of(status.step, status.planned_steps),
        "" if status.step_seconds is None else f"{status.step_seconds:.3g}",
        "" if status.seconds_left is None else duration(status.seconds_left),
        _number(status.losses["total_loss"]) if "total_loss" in status.losses else "",
        _percent(row.get("recall_at_1")),
        _percent(row.get("map_at_r")),
        "" if status.checkpoint is None else duration(status.checkpoint_age),
        f"{len(status.warnings)} warning{'s' if len(status.warnings) > 1 else ''}" if status.warnings else "",
    )


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _of(number: int, whole: int | None) -> str:
    return f"{number}" if whole is None else f"{number}/{whole}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.2f}" if isinstance(value, int | float) else ""


def printable(text: str) -> str:
    """Without control characters: names of folders and messages may hold any, and a terminal obeys them."""
    return "".join(c if c.isprintable() else "?" for c in text)
