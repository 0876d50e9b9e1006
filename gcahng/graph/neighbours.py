"""The sparse graph: the block pairs of nearest classes, for batches too large for every pair.

Each anchor chooses its k nearest classes among the others. Two classes are connected if any sample of the one chose the
other; connected classes keep all K x K edges in both directions, so that a synthetic negative is still fused from all
samples of its class. Every class is connected with itself. With k = P - 1 the graph is the dense one.

The choice is a function of the embeddings' values alone: no gradient flows through it.

Shapes: B = P * K samples group-major, P classes of K samples, D channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.errors import InputError
from gcahng.graph.pairs import PairPlan, chunked

# Similarities held at once: rows of anchors against the whole batch.
SIMILARITIES_PER_CHUNK = {"cpu": 1 << 22}
SIMILARITIES_PER_CHUNK_ELSEWHERE = 1 << 25


def nearest_classes(z: Tensor, num_samples: int, k: int, *, low: torch.dtype | None = None) -> Tensor:
    """The k nearest other classes of every sample.

    A class is as near as its nearest sample: one hard negative is enough for the class to matter to the anchor, however
    far its other samples lie. Nearness is the cosine of the embeddings, by which retrieval ranks and which the edges
    are made of; a Euclidean distance would let long embeddings, which cosine retrieval does not see, choose the graph.
    Equally near classes are taken in the order of their numbers, so the set does not depend on how a device sorts.

    Args:
        z: (B, D), group-major. An embedding that is not finite counts as the zero vector.
        num_samples: K.
        k: Classes per sample, 1 or more; above P - 1 it means all others.
        low: Dtype to round the unit vectors to before their products, which a GPU computes faster so; None for none.
    Returns:
        (B, min(k, P - 1)) int64 class numbers, increasing in each row. Class p holds the samples p, P + p, 2 P + p, ...
    Raises:
        InputError: The batch does not consist of K groups of at least two classes, or k is below 1.
    """
    num_classes = _count_classes(z, num_samples, k)
    k = min(k, num_classes - 1)
    unit = _unit(z, low)
    bound = SIMILARITIES_PER_CHUNK.get(z.device.type, SIMILARITIES_PER_CHUNK_ELSEWHERE)
    found = []
    for samples in torch.arange(z.shape[0], device=z.device).split(max(1, bound // z.shape[0])):
        nearness = _products(unit[samples], unit).view(-1, num_samples, num_classes).amax(1)
        nearness.scatter_(1, samples[:, None] % num_classes, -torch.inf)
        found.append(_largest(nearness, k))
    return torch.cat(found)


def neighbour_plan(
    z: Tensor,
    num_samples: int,
    k: int,
    *,
    share: tuple[int, int] = (0, 1),
    low: torch.dtype | None = None,
    edges_per_chunk: int | None = None,
) -> PairPlan:
    """The sparse graph of a batch: a node block is a class, a block pair two connected classes.

    Takes one transfer to the host (how many pairs there are). Processes that pass the same z make the same choice;
    each lists its share of the pairs.

    Args:
        z, num_samples, k, low: As in `nearest_classes`; z of the global batch.
        share: (process, number of processes): every process takes each n-th pair.
        edges_per_chunk: As in `pair_plan`.
    Raises:
        InputError: As in `nearest_classes`.
    """
    chosen = nearest_classes(z, num_samples, k, low=low)
    num_classes = z.shape[0] // num_samples
    first, second = connected_classes(chosen, num_classes)
    classes = torch.arange(num_classes, device=z.device)
    # Integer counts: the order in which a device adds them does not matter.
    connected = 1 + torch.bincount(torch.cat([first, second]), minlength=num_classes)
    rank, ranks = share
    # Dealt as in `pair_plan`.
    chunks = chunked(
        classes[ranks - 1 - rank :: ranks], first[rank::ranks], second[rank::ranks], num_samples, edges_per_chunk
    )
    return PairPlan(
        batch_size=z.shape[0],
        block_size=num_samples,
        order=torch.arange(z.shape[0], device=z.device).view(num_samples, num_classes).T.reshape(-1),
        valid=None,
        chunks=chunks,
        share=share,
        edge_count=num_samples**2 * (num_classes + 2 * first.numel()),
        degree=(num_samples * connected).repeat(num_samples),
    )


def connected_classes(chosen: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The unordered pairs of classes of which either has a sample that chose the other.

    Args:
        chosen: (B, k) class numbers as `nearest_classes` gives them.
        num_classes: P.
    Returns:
        Two (n,) int64 class numbers, first < second, each pair once, in lexicographic order.
    """
    own = (torch.arange(chosen.shape[0], device=chosen.device) % num_classes)[:, None]
    codes = torch.minimum(own, chosen).mul_(num_classes).add_(torch.maximum(own, chosen))
    codes = torch.unique(codes)
    return codes // num_classes, codes % num_classes


def _count_classes(z: Tensor, num_samples: int, k: int) -> int:
    if z.dim() != 2 or num_samples < 1 or z.shape[0] % num_samples or z.shape[0] < 2 * num_samples:
        raise InputError(
            f"`z` must hold K = {num_samples} samples of each of two or more classes: got shape {tuple(z.shape)}."
        )
    if k < 1:
        raise InputError(f"`k`, the neighbour classes of a sample, must be at least 1: got {k}.")
    return z.shape[0] // num_samples


def _unit(z: Tensor, low: torch.dtype | None) -> Tensor:
    z = z.detach()
    unit = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1, eps=1e-12)
    # A NaN would compare with nothing and choose no class at all.
    unit = unit.nan_to_num_(nan=0.0)
    return unit if low is None else unit.to(low)


def _products(rows: Tensor, unit: Tensor) -> Tensor:
    """(R, B) similarities. Operands may be low, results never: rounding them would make ties of near classes."""
    with torch.autocast(unit.device.type, enabled=False):
        if unit.dtype in (torch.float32, torch.float64):
            return rows @ unit.t()
        if unit.device.type == "cuda":
            return torch.mm(rows, unit.t(), out_dtype=torch.float32)
        return rows.float() @ unit.float().t()


def _largest(values: Tensor, k: int) -> Tensor:
    """Columns of the k largest values of each row, increasing; of equal values the first columns.

    torch.topk leaves open which of the values that equal the k-th it takes, so those are looked up in order.

    Args:
        values: (R, P) without NaN.
        k: At most P.
    """
    top, columns = values.topk(k, dim=1, sorted=True)
    smallest = top[:, -1:]
    above = (top > smallest).sum(1, keepdim=True)
    ties_so_far = (values == smallest).cumsum(1, dtype=torch.int32)
    tie = torch.arange(1, k + 1, device=values.device) - above
    of_tie = torch.searchsorted(ties_so_far, tie.clamp_min(1).to(torch.int32))
    return torch.where(tie > 0, of_tie, columns).sort(1).values
