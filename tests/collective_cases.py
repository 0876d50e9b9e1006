"""What ranks do in the tests of collectives and of the batch exchange; every rank computes the reference itself."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from maths_cases import generator
from torch import Tensor

from gcahng.distributed import Ranks
from gcahng.distributed.batch_exchange import BatchExchange
from gcahng.errors import InputError

SAMPLES = 3


def parts(ranks: Ranks, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """(W, *shape) numbers, the same on every rank; row r is rank r's."""
    return torch.randn(ranks.size, *shape, generator=generator(len(shape)), dtype=torch.float64).to(dtype)


def weights(ranks: Ranks, like: Tensor) -> Tensor:
    """(W, *shape): by what each rank's loss weighs the entries of a collective's result."""
    draw = torch.randn(ranks.size, *like.shape, generator=generator(99), dtype=torch.float64)
    return draw.to(like.dtype)


def counts_of(ranks: Ranks) -> list[tuple[int, ...]]:
    """Classes by rank: even, one more on the first, one alone on the last, all different."""
    size = ranks.size
    return [(2,) * size, (3,) + (2,) * (size - 1), (4,) * (size - 1) + (1,), tuple(range(1, size + 1))]


def sums(ranks: Ranks) -> list[str]:
    """`Ranks.sum`: values, gradients, and what it must not do."""
    problems = []
    for shape in [(), (5,), (4, 3), (0, 3), (1,)]:
        for dtype in (torch.float64, torch.float32):
            all_parts = parts(ranks, shape, dtype)
            own = all_parts[ranks.rank].clone().requires_grad_()
            before = own.detach().clone()
            total = ranks.sum(own)
            of_ranks = weights(ranks, total)
            (total * of_ranks[ranks.rank]).sum().backward()
            name = f"sum of {shape} {dtype}"
            problems += differ(f"{name}: value", total, all_parts.sum(0), 1e-14 if dtype == torch.float64 else 1e-6)
            problems += differ(
                f"{name}: gradient", own.grad, of_ranks.sum(0), 1e-14 if dtype == torch.float64 else 1e-6
            )
            problems += differ(f"{name}: the argument itself", own.detach(), before, 0)
            problems += [f"{name}: dtype {total.dtype}"] if total.dtype != dtype else []
    columns = parts(ranks, (3, 4))
    transposed = columns[ranks.rank].t().requires_grad_()
    total = ranks.sum(transposed)
    # Its gradient comes expanded, with strides of 0.
    total.sum().backward()
    problems += differ("sum of columns: value", total, columns.sum(0).t(), 1e-14)
    problems += differ("sum of columns: gradient", transposed.grad, torch.full((4, 3), float(ranks.size)), 0)
    whole = torch.arange(4) + ranks.rank
    problems += differ("sum of int64", ranks.sum(whole), ranks.size * torch.arange(4) + sum(range(ranks.size)), 0)
    if ranks.sum(columns[ranks.rank]).requires_grad:
        problems.append("sum of a constant carries a gradient")
    return problems


def gathers(ranks: Ranks) -> list[str]:
    """`Ranks.gather`: values and gradients against slices of the global batch."""
    problems = []
    for counts in counts_of(ranks):
        for tail in [(), (5,), (2, 3), (0,)]:
            for dtype in (torch.float64, torch.float32):
                problems += gathered(ranks, counts, tail, dtype, f"gather {counts} x {tail} {dtype}")
    problems += gathered(ranks, counts_of(ranks)[3], (4, 3), torch.float64, "gather of columns", swap=True)
    local, whole = global_batch(ranks, counts_of(ranks)[1], (5,), torch.float64)
    found = ranks.gather(local, counts_of(ranks)[1])
    problems += differ("gather of a constant", found, whole, 0)
    if found.requires_grad:
        problems.append("gather of a constant carries a gradient")
    return problems


def global_batch(ranks: Ranks, counts: Sequence[int], tail: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's part of a group-major batch, and all of it."""
    numbers = torch.randn(SAMPLES, sum(counts), *tail, generator=generator(3), dtype=torch.float64).to(dtype)
    own = slice(sum(counts[: ranks.rank]), sum(counts[: ranks.rank + 1]))
    return numbers[:, own].flatten(0, 1), numbers.flatten(0, 1)


def gathered(
    ranks: Ranks, counts: Sequence[int], tail: Sequence[int], dtype: torch.dtype, name: str, *, swap: bool = False
) -> list[str]:
    local, whole = global_batch(ranks, counts, tail, dtype)
    if swap:
        # The same numbers, laid out the other way round.
        local = local.transpose(0, -1).contiguous().transpose(0, -1)
    local = local.detach().requires_grad_()
    found = ranks.gather(local, counts)
    problems = differ(f"{name}: value", found, whole, 0)
    of_ranks = weights(ranks, whole)
    upstream = of_ranks[ranks.rank]
    found.backward(upstream.transpose(0, -1).contiguous().transpose(0, -1) if swap else upstream)
    by_class = of_ranks.sum(0).view(SAMPLES, sum(counts), *tail)
    own = slice(sum(counts[: ranks.rank]), sum(counts[: ranks.rank + 1]))
    want = by_class[:, own].flatten(0, 1)
    return problems + differ(f"{name}: gradient", local.grad, want, 1e-14 if dtype == torch.float64 else 1e-6)


def host_numbers(ranks: Ranks) -> list[str]:
    """What ranks tell each other on their CPUs."""
    rank, size = ranks.rank, ranks.size
    problems = differ("host_max", torch.tensor(ranks.host_max([rank, -rank, 0.1])), torch.tensor([size - 1, 0, 0.1]), 0)
    total = float(sum(range(size)))
    problems += differ("host_sum", torch.tensor(ranks.host_sum([rank, 1.0])), torch.tensor([total, float(size)]), 0)
    said = ranks.all_of({"rank": rank, "word": "x" * rank})
    if said != [{"rank": r, "word": "x" * r} for r in range(size)]:
        problems.append(f"all_of: {said}")
    ranks.wait()
    return problems


def differ(name: str, got: Tensor | None, want: Tensor, tolerance: float) -> list[str]:
    """What is wrong with a result, in words."""
    if got is None or got.shape != want.shape:
        return [f"{name}: got shape {None if got is None else tuple(got.shape)}, not {tuple(want.shape)}"]
    if not got.numel():
        return []
    error = float((got.detach().double() - want.double()).abs().max())
    return [f"{name}: off by {error}"] if not error <= tolerance * max(1.0, float(want.double().abs().max())) else []


def collectives(ranks: Ranks) -> list[str]:
    """Everything about `Ranks`; problems in words."""
    problems = [*sums(ranks), *gathers(ranks), *host_numbers(ranks)]
    other = dist.new_group(backend="gloo")
    # Tensors and numbers over groups of their own.
    apart = Ranks(ranks.rank, ranks.size, other, dist.new_group(backend="gloo"))
    return problems + [f"own groups: {p}" for p in (*sums(apart), *host_numbers(apart))]


# A rank's part of a batch: labels (rows,), shape of the images, step.
Part = tuple[Tensor, tuple[int, ...], int]


def whole_part(ranks: Ranks, counts: Sequence[int]) -> Part:
    """As planned: labels 10 p + group for class p, which no rank could make up for another."""
    bounds = [sum(counts[:n]) for n in range(len(counts) + 1)]
    first, last = list(pairwise(bounds))[ranks.rank]
    labels = torch.arange(first, last).repeat(SAMPLES) + 10 * torch.arange(SAMPLES).repeat_interleave(last - first)
    return labels, (labels.numel(), 3, 8, 8), 7


def _spoilt(change: Callable[[Part], Part]) -> Callable[[Ranks, Sequence[int]], Part]:
    """Only the last rank's part is changed."""

    def make(ranks: Ranks, counts: Sequence[int]) -> Part:
        part = whole_part(ranks, counts)
        return change(part) if ranks.rank == ranks.size - 1 else part

    return make


FAULTS: dict[str, Callable[[Ranks, Sequence[int]], Part]] = {
    "too many images": _spoilt(lambda p: (torch.arange(50), (50, *p[1][1:]), p[2])),
    "too few images": _spoilt(lambda p: (p[0][:2], (2, *p[1][1:]), p[2])),
    "no images": _spoilt(lambda p: (p[0][:0], (0, *p[1][1:]), p[2])),
    "a label too few": _spoilt(lambda p: (p[0][:-1], p[1], p[2])),
    "another image size": _spoilt(lambda p: (p[0], (*p[1][:2], 8, 9), p[2])),
    "another number of dimensions": _spoilt(lambda p: (p[0], (*p[1], 1), p[2])),
    "many dimensions": _spoilt(lambda p: (p[0], (p[1][0], 1, 2, 3, 4, 5), p[2])),
    "another step": _spoilt(lambda p: (p[0], p[1], 8)),
}


def exchanges(ranks: Ranks) -> dict[str, Any]:
    """The message of each faulty batch, and the labels that come out when all is well, before and after."""
    counts = tuple(range(1, ranks.size + 1))

    def exchanged(part: Part) -> list[int] | str:
        labels, shape, step = part
        try:
            return BatchExchange(ranks, labels, shape, counts, SAMPLES, step).labels().tolist()
        except InputError as error:
            return str(error)

    found: dict[str, Any] = {"well before": exchanged(whole_part(ranks, counts))}
    for name, part in FAULTS.items():
        found[name] = exchanged(part(ranks, counts))
        found[f"well after {name}"] = exchanged(whole_part(ranks, counts))
    labels, shape, _ = whole_part(ranks, counts)
    found["int32"] = exchanged((labels.int(), shape, 7))
    found["columns"] = exchanged((torch.stack([labels, labels], 1)[:, 0], shape, 7))
    found["sum"] = float(ranks.sum(torch.ones(())))
    return found
