"""How hard the negatives of a batch are, before and after interpolation: what `hardness.jsonl` records.

Logged steps have signals of a collapse besides (`gcahng.training.collapse`), which `metrics.jsonl` holds.

All of it is of the global batch, the same on any number of ranks: each rank counts the edges of its own block pairs,
and the counts are added up. Distances are those of the interpolation (`gcahng.generation.interpolation`), in the
distance space of its rule. *Edges* are the ordered pairs of an anchor and a negative of another class; a sparse graph
(`graph.neighbours`) has those that it keeps. The coefficients, of the generation pass, are those behind dropout.

Nothing here moves a parameter or draws a number, and nothing waits for the device before `HardnessRecord.row`.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels; chunks of n block pairs of b x b
nodes, m = b / K classes per block, as in `gcahng.generation.pair_synthesis`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gcahng.generation import ConstantClassifier, Synthesis
from gcahng.generation.interpolation import Interpolation, distance, positive_distances
from gcahng.generation.pair_synthesis import ChunkSynthesis, Way
from gcahng.generation.synthesis import PlacedBatch, place
from gcahng.graph import Coefficients, PairPlan, UnitCoefficients
from gcahng.graph.pairs import ends
from gcahng.losses import select_triplets
from gcahng.metrics.spread import effective_rank, scatter_matrix
from gcahng.training.collapse import embedding_signals, synthetic_signals
from gcahng.training.edge_chunks import other_class, pulls_by_chunk

# Distances: 16 bins per octave, what lies outside counts in the first or last one. The scale of embeddings is free.
FIRST_OCTAVE, LAST_OCTAVE, BINS_PER_OCTAVE = -6, 10, 16
DISTANCE_EDGES = tuple(
    2.0 ** (FIRST_OCTAVE + k / BINS_PER_OCTAVE) for k in range((LAST_OCTAVE - FIRST_OCTAVE) * BINS_PER_OCTAVE + 1)
)
COEFFICIENT_BINS = 50
COEFFICIENT_EDGES = tuple(k / COEFFICIENT_BINS for k in range(COEFFICIENT_BINS + 1))
# Deviations of coefficients over channels, for their quantiles: at most 1/2, known to 2 %.
FIRST_SPREAD_OCTAVE, SPREAD_BINS_PER_OCTAVE = -20, 32
SPREAD_BINS = (-1 - FIRST_SPREAD_OCTAVE) * SPREAD_BINS_PER_OCTAVE
QUANTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75}
NEVER = float("-inf")
DIGITS = 9

Reduce = Callable[[Tensor], Tensor]


def hard_negative_ratio(z: Tensor, labels: Tensor) -> Tensor:
    """Share of anchors whose most similar sample of another class is more similar than that of their own: a scalar.

    The triplets are those of the losses `hn` and `sct` (`gcahng.losses.select_triplets`), whatever the metric loss:
    anchors without a positive or a negative do not count; NaN if none counts.

    Args:
        z: (B, D) embeddings.
        labels: (B,) in any order.
    """
    triplets = select_triplets(z.detach(), labels, check_values=False)
    return triplets.hard.sum(dtype=torch.float64) / triplets.valid.sum()


class HardnessRecord:
    """What is measured in one step; filled by the step, read once.

    Args:
        edges: Measure all edges, a row of `hardness.jsonl`; False: the hard-negative ratio and the signals alone.
        reduce: Sum over ranks; ranks that call it pass the same argument `edges`.
    """

    def __init__(self, *, edges: bool, reduce: Reduce) -> None:
        self.edges = edges
        self._reduce = reduce
        self._found: dict[str, Tensor] = {}
        self._scatter: Tensor | None = None

    @torch.no_grad()
    def take_batch(
        self, z: Tensor, labels: Tensor, plan: PairPlan, rule: Interpolation, num_samples: int
    ) -> dict[str, Tensor]:
        """Take the embeddings: (B, D) and labels (B,) of the global batch, group-major.

        Args:
            z, labels: See above.
            plan: Block pairs of this rank, of whole classes.
            rule: Says where distances are measured.
            num_samples: K.
        Returns:
            Scalars: "hard_negative_ratio", and those of `gcahng.training.collapse.embedding_signals`.
        """
        with torch.autocast(z.device.type, enabled=False):
            ratio = hard_negative_ratio(z, labels)
            self._found["hard_negative_ratio"] = ratio
            self._scatter = scatter_matrix(z.detach())
            signals = embedding_signals(z, plan, rule, num_samples, self._reduce)
            if self.edges:
                near = positive_distances(rule.distance_space(z.detach()), num_samples)
                counts = _Distances(near)
                counts.add(near, torch.ones_like(near, dtype=torch.bool))
                self._found |= {"d_positive": counts.histogram, "sum_d_positive": counts.sum}
        return {"hard_negative_ratio": ratio} | signals

    @torch.no_grad()
    def take_candidates(self, z: Tensor, coefficients: Coefficients, synthesis: Synthesis) -> dict[str, Tensor]:
        """Scalars of the synthetic negatives of the metric pass: `gcahng.training.collapse.synthetic_signals`."""
        with torch.autocast(z.device.type, enabled=False):
            return synthetic_signals(z, coefficients, synthesis, self._reduce)

    @torch.no_grad()
    def take_negatives(self, z: Tensor, plan: PairPlan, rule: Interpolation, num_samples: int) -> None:
        """Take the edges of a step that makes no synthetic negatives; arguments as elsewhere in this class.

        Args:
            z: (B, D).
            plan: Block pairs of this rank, of whole classes.
            rule, num_samples: As in `take_batch`.
        """
        if not self.edges:
            return
        points = plan.positions(rule.distance_space(z.detach()))
        before = _Distances(points)
        for chunk in plan.chunks:
            other = other_class(plan, chunk, num_samples)
            first, second = ends(points, chunk)
            gap = first[:, :, None] - second[:, None, :]
            for sign in (1, -1) if chunk.mirrored else (1,):
                before.add(distance(sign * gap), other)
        self._add_up({"d_negative": before.histogram, "sum_d_negative": before.sum})

    @torch.no_grad()
    def take_synthetic(
        self,
        z: Tensor,
        coefficients: Coefficients,
        synthesis: Synthesis,
        classifier: ConstantClassifier,
        class_labels: Tensor,
    ) -> None:
        """Take the edges of a step with their coefficients and synthetic negatives, as the generation pass has them.

        Args:
            z: (B, D), group-major.
            coefficients: Of the pass; they are left as they are.
            synthesis: The pass's.
            classifier: Says which class a synthetic negative looks like.
            class_labels: (P,) training labels of the batch's classes.
        """
        if not self.edges:
            return
        with torch.autocast(z.device.type, enabled=False):
            batch = place(z.detach(), coefficients.plan, synthesis)
            sums = _SyntheticSums(batch, synthesis.rule, classifier.lowered(), class_labels)
            for part, pulls in pulls_by_chunk(coefficients):
                sums.add(ChunkSynthesis(batch, part.chunk, pulls))
            self._add_up(sums.found(not isinstance(coefficients, UnitCoefficients)))

    def _add_up(self, partial: dict[str, Tensor]) -> None:
        """Add up over ranks, in one go."""
        total = self._reduce(torch.cat([value.flatten() for value in partial.values()]))
        parts = total.split([value.numel() for value in partial.values()])
        self._found |= {name: part.view_as(partial[name]) for name, part in zip(partial, parts, strict=True)}

    @property
    def unread(self) -> Tensor | None:
        """What `late_signals` takes: to be brought to the host together with the step's losses."""
        return self._scatter

    @staticmethod
    def late_signals(scatter: Tensor) -> dict[str, float]:
        """ "effective_rank" (`gcahng.metrics.spread`), from `unread` on the CPU."""
        return {"effective_rank": effective_rank(scatter)}

    def row(self) -> dict[str, Any]:
        """What was found, as plain numbers; waits for the device, once.

        "anchors" samples and "pairs" edges; "distance_edges" with the counts "d_positive" (of anchors), "d_negative"
        and "d_synthetic" (of edges, before and after interpolation), and their means; "coefficient_edges" with the
        counts "coefficients" (of edges and channels); "coefficient_channel_std": of the standard deviations over the
        channels of an edge's coefficients the quartiles, read off a histogram to 2 %, least and largest;
        "synthetic_own_class_share": share of the fused synthetic negatives, of other classes than the anchor's, whose
        largest score is their class's; "hard_negative_ratio". Left out is what the run does not have.
        """
        numbers = torch.cat([value.double().flatten() for value in self._found.values()]).tolist()
        values: dict[str, list[float]] = {}
        for name, value in self._found.items():
            values[name], numbers = numbers[: value.numel()], numbers[value.numel() :]
        return _row(values)


def _row(values: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ratio = values["hard_negative_ratio"][0]
    kinds = [name for name in ("d_positive", "d_negative", "d_synthetic") if name in values]
    counts = {name: [int(count) for count in values[name]] for name in kinds}
    found["anchors"], found["pairs"] = sum(counts["d_positive"]), sum(counts["d_negative"])
    found["distance_edges"] = [_short(edge) for edge in DISTANCE_EDGES]
    for name in kinds:
        found[name] = counts[name]
        found[f"mean_{name}"] = _share(values[f"sum_{name}"][0], sum(counts[name]))
    if "coefficients" in values:
        found["coefficient_edges"] = list(COEFFICIENT_EDGES)
        found["coefficients"] = [int(count) for count in values["coefficients"]]
        found["coefficient_channel_std"] = _spread(values["spread"], values["spread_range"])
    if "synthetic" in values:
        own, all_of_them = values["synthetic"]
        found["synthetic_own_class_share"] = _share(own, all_of_them)
    return found | {"hard_negative_ratio": None if math.isnan(ratio) else ratio}


def _spread(counts: list[float], ranges: list[float]) -> dict[str, float]:
    """Least, quartiles and largest from a histogram and the (W, 2) least and largest of each rank."""
    least, largest = min(ranges[::2]), max(ranges[1::2])
    found = {"min": _short(least)}
    for name, share in QUANTILES.items():
        rank, below = share * sum(counts), 0.0
        number = 0
        while number < len(counts) - 1 and below + counts[number] < rank:
            below += counts[number]
            number += 1
        inside = (rank - below) / max(counts[number], 1.0)
        value = 2.0 ** (FIRST_SPREAD_OCTAVE + (number + inside) / SPREAD_BINS_PER_OCTAVE)
        found[name] = _short(min(max(value, least), largest))
    return found | {"max": _short(largest)}


def _share(part: float, whole: float) -> float | None:
    return _short(part / whole) if whole else None


def _short(value: float) -> float:
    """Without the last digits, in which sums of another order differ."""
    return float(f"{value:.{DIGITS}g}")


def _exponential_bins(first_octave: int, per_octave: int, bins: int, like: Tensor) -> Tensor:
    """(bins - 1,) what separates them, made on the device."""
    steps = torch.arange(1, bins, device=like.device, dtype=like.dtype)
    return torch.exp2(steps / per_octave + first_octave)


def _count(histogram: Tensor, bins: Tensor, weights: Tensor) -> None:
    """Add whole numbers `weights` of values in `bins`, int64 of one shape, to a histogram."""
    histogram.index_add_(0, bins.flatten(), weights.expand_as(bins).reshape(-1).to(histogram.dtype))


class _Distances:
    """Histogram and sum of distances, in float64: whole numbers up to 2^53 are exact, in any order of adding."""

    def __init__(self, like: Tensor) -> None:
        bins = len(DISTANCE_EDGES) - 1
        self._boundaries = _exponential_bins(FIRST_OCTAVE, BINS_PER_OCTAVE, bins, like)
        self.histogram = torch.zeros(bins, dtype=torch.float64, device=like.device)
        self.sum = torch.zeros((), dtype=torch.float64, device=like.device)

    def add(self, values: Tensor, counted: Tensor) -> None:
        """Take those of `values` where `counted`, bool that broadcasts to them, is True."""
        _count(self.histogram, torch.bucketize(values, self._boundaries, right=True), counted)
        self.sum += torch.where(counted, values, 0.0).sum(dtype=torch.float64)


class _SyntheticSums:
    """Sums over the edges and entries of this rank."""

    def __init__(
        self, batch: PlacedBatch, rule: Interpolation, classifier: ConstantClassifier, class_labels: Tensor
    ) -> None:
        self._batch, self._rule = batch, rule
        self._classifier, self._class_labels = classifier, class_labels
        self._before, self._after = _Distances(batch.z), _Distances(batch.z)
        self._coefficients = torch.zeros(COEFFICIENT_BINS, dtype=torch.float64, device=batch.z.device)
        self._spread = self._coefficients.new_zeros(SPREAD_BINS)
        self._spread_bins = _exponential_bins(FIRST_SPREAD_OCTAVE, SPREAD_BINS_PER_OCTAVE, SPREAD_BINS, batch.z)
        self._least, self._largest = batch.z.new_full((), math.inf), batch.z.new_full((), NEVER)
        self._synthetic = self._coefficients.new_zeros(2)

    def add(self, work: ChunkSynthesis) -> None:
        """Take a chunk."""
        other = other_class(self._batch.plan, work.chunk, self._batch.num_samples)
        shared = len(work.ways) == 2 and work.ways[0].coefficients is work.ways[1].coefficients
        for number, way in enumerate(work.ways):
            self._before.add(distance(-way.sign * work.gap), other)
            self._after.add(self._interpolated(work, way), other)
            self._add_entries(work, way)
            if way.coefficients is not None and not (shared and number):
                self._add_coefficients(way.coefficients, other, 2 if shared else 1)

    def _interpolated(self, work: ChunkSynthesis, way: Way) -> Tensor:
        """(n, b, b) distances of anchors and negatives after interpolation."""
        pull = 1.0 if way.coefficients is None else way.coefficients
        nearest = way.ratio[..., None]
        # From the negative to the anchor: what is left of the way.
        left = (nearest + (1 - nearest) * (self._batch.factor * pull)) * work.difference * -way.sign
        if self._batch.points is None:
            return distance(left)
        anchors = way.at_entries(way.anchors)
        return distance(self._rule.distance_space(anchors) - self._rule.distance_space(anchors - left))

    def _add_coefficients(self, values: Tensor, other: Tensor, times: int) -> None:
        bins = (values * COEFFICIENT_BINS).nan_to_num(0.0).to(torch.int64).clamp_(0, COEFFICIENT_BINS - 1)
        _count(self._coefficients, bins, times * other[..., None].to(torch.float64))
        deviation = values.std(-1, correction=0)
        _count(self._spread, torch.bucketize(deviation, self._spread_bins, right=True), times * other.to(torch.float64))
        if deviation.numel():  # a rank may have no pairs
            self._least = torch.minimum(self._least, torch.where(other, deviation, math.inf).amin())
            self._largest = torch.maximum(self._largest, torch.where(other, deviation, NEVER).amax())

    def _add_entries(self, work: ChunkSynthesis, way: Way) -> None:
        synthetic = work.negatives(way)
        labels = work.entry_labels(way, self._class_labels).expand(synthetic.shape[:-1])
        own = self._classifier.predictions(synthetic.flatten(0, 2)).view(labels.shape) == labels
        counted = work.counted(way)[1]
        if counted is None:
            self._synthetic += torch.stack([own.sum(), own.new_full((), own.numel(), dtype=torch.int64)])
        else:
            self._synthetic += torch.stack([(own * counted).sum(), counted.expand_as(labels).sum()])

    def found(self, with_coefficients: bool) -> dict[str, Tensor]:
        """By name, all float64."""
        found = {"d_negative": self._before.histogram, "sum_d_negative": self._before.sum}
        found |= {"d_synthetic": self._after.histogram, "sum_d_synthetic": self._after.sum}
        found["synthetic"] = self._synthetic
        if with_coefficients:
            rank, ranks = self._batch.plan.share
            of_ranks = self._synthetic.new_zeros(ranks, 2)
            of_ranks[rank, 0], of_ranks[rank, 1] = self._least, self._largest
            found |= {"coefficients": self._coefficients, "spread": self._spread, "spread_range": of_ranks}
        return found
