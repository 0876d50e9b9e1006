"""Results of a run as text."""

from collections.abc import Mapping
from typing import Any


def metric_columns(row: Mapping[str, Any]) -> dict[str, float]:
    """R@k, R-Precision and MAP@R of an evaluation row, in percent, by the name to print."""
    columns = {
        f"R@{name.removeprefix('recall_at_')}": 100 * value
        for name, value in row.items()
        if name.startswith("recall_at_")
    }
    return columns | {"RP": 100 * row["r_precision"], "MAP@R": 100 * row["map_at_r"]}


def evaluation_columns(row: Mapping[str, Any], *, coarse_label: str | None = None) -> dict[str, float]:
    """Everything that an evaluation row holds, in percent, by the name to print: also P@k, MRR and the coarser label.

    Args:
        row: See `gcahng.training.evaluation.as_row`; of several galleries the first.
        coarse_label: What the coarser label is called.
    """
    columns = metric_columns(row)
    for name, value in row.items():
        if name.startswith("precision_at_"):
            columns[f"P@{name.removeprefix('precision_at_')}"] = 100 * value
    columns["MRR"] = 100 * row["mrr"]
    for name, value in row.items():
        if name.startswith("coarse_recall_at_"):
            columns[f"{coarse_label or 'coarse'}@{name.removeprefix('coarse_recall_at_')}"] = 100 * value
    return columns


def results_text(results: Mapping[str, Any], run_dir: str) -> str:
    """Last, best by validation and best by test, as a small table."""
    lines = [f"run folder: {run_dir}"]
    names = {
        "last": "last",
        "best_validation": "best by validation",
        "best_test": "best by test R@1, as the papers choose",
    }
    for key, title in names.items():
        row = results.get(key)
        if row is None:
            continue
        shown = "  ".join(f"{name} {value:.1f}" for name, value in metric_columns(row).items())
        lines.append(f"{title:39} epoch {row['epoch']:3}  {row['split']}: {shown}")
    seconds = results["seconds_per_step"]
    if seconds is not None:
        lines.append(
            f"{results['steps']} steps, {seconds:.3f} s each, "
            f"peak memory {results['peak_memory_bytes'] / 2**20:.0f} MiB"
        )
    if results["skipped_images"]:
        lines.append(f"unreadable images replaced: {results['skipped_images']}")
    if results.get("repaired_draws"):
        lines.append(f"draws of the sampler repaired: {results['repaired_draws']}")
    return "\n".join(lines)
