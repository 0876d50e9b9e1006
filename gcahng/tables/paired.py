"""Differences between two rows over the seeds that both have, with an interval of Student's t."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gcahng.errors import ConfigError, InputError
from gcahng.tables.collect import CellResult, Collected

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Row minus reference, over common seeds.

    Attributes:
        seeds: The common seeds.
        mean: Mean difference.
        half_width: Half of the 95 % interval; None for fewer than two seeds.
    """

    seeds: tuple[int, ...]
    mean: float
    half_width: float | None


def paired_difference(ours: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Mean difference by seed, and its interval: t(0.975, n - 1) times the standard error of the n differences.

    Args:
        ours: Value by seed.
        reference: Value by seed.
    Returns:
        None where no seed is common.
    Raises:
        InputError: scipy, which knows t, is not installed.
    """
    seeds = tuple(sorted(set(ours) & set(reference)))
    if not seeds:
        return None
    differences = [ours[seed] - reference[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) == 1:
        return Difference(seeds, mean, None)
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    return Difference(seeds, mean, _t_quantile(len(seeds) - 1) * error)


def _t_quantile(degrees: int) -> float:
    try:
        from scipy.special import stdtrit
    except ImportError:
        raise InputError(
            "Intervals of differences (--against) need scipy, which is not installed: expected it beside gcahng. "
            "Install it with `pip install scipy`."
        ) from None
    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))


def reference_of(cell: CellResult, cells: Sequence[CellResult], name: str, alone: bool) -> CellResult | None:
    """The row called `name` that a cell is compared with: of its model and loss, else the only one of that name.

    Args:
        cell: The cell.
        cells: Those of its data set.
        name: Name or label of a row.
        alone: Whether one row of the whole table is called so on this data set; the only one that `--rows` has left of
            several is nothing to compare rows of other models and losses with.
    """
    called = [other for other in cells if name in (other.cell.row.name, other.cell.row.label)]
    alike = [
        other
        for other in called
        if (other.cell.row.model, other.cell.row.loss) == (cell.cell.row.model, cell.cell.row.loss)
    ]
    found = alike or (called if alone else [])
    return found[0] if found and found[0] is not cell else None


def differences(collected: Collected, name: str) -> dict[str, dict[str, Difference]]:
    """For each cell (by its title) and metric the difference from the row called `name`.

    Raises:
        ConfigError: The table has no such row.
        InputError: scipy is not installed.
    """
    labels = [found.cell.row.label for found in collected.cells]
    if not any(name in (found.cell.row.name, found.cell.row.label) for found in collected.cells):
        listed = "; ".join(dict.fromkeys(labels))
        raise ConfigError(
            f"--against: no row of table {collected.plan.table.name} is called `{name}`. It has: {listed}."
        )
    rows = [row for row in collected.plan.table.rows if name in (row.name, row.label)]
    all_differences: dict[str, dict[str, Difference]] = {}
    for found in collected.cells:
        data_set = found.cell.data_set
        alone = sum(data_set in row.data_sets for row in rows) == 1
        reference = reference_of(found, collected.of_data_set(data_set), name, alone)
        if reference is None:
            continue
        by_metric = {}
        for metric in found.cell.metrics:
            difference = paired_difference(_by_seed(found, metric), _by_seed(reference, metric))
            if difference is not None:
                by_metric[metric] = difference
        all_differences[found.cell.title] = by_metric
    return all_differences


def _by_seed(found: CellResult, metric: str) -> dict[int, float]:
    return {result.seed: result.values[metric] for result in found.results if metric in result.values}
