"""Made-up embeddings with the sizes, class sizes and recall of real test sets.

Shapes: n items, D channels, C classes.
"""

import torch
from torch import Tensor

# Stanford Online Products' test set: 60,502 images of 11,316 products, 2 to 12 each.
SMALLEST_CLASS, LARGEST_CLASS = 2, 12
MEAN_CLASS = 60_502 / 11_316
# The yardsticks look at 1000 neighbours, which have to hold all references of a query.
LARGEST_TAIL_CLASS = 1000
STRUCTURES = ("trained", "none")
# Weight of a superclass's centre beside a class's own, length of the noise around both at 512 channels, and how much
# that length differs from item to item: R@1, 10, 100, 1000 of about 0.75, 0.86, 0.93, 0.98 at SOP's size.
SUPERCLASSES, SUPERCLASS_WEIGHT, NOISE, NOISE_SPREAD = 12, 0.6, 2.4, 0.5
# Length of what all embeddings of an untrained network share, noise having length 1: cosines of about 0.9.
COMMON = 3.0
_ROWS = 1 << 16


def class_sizes(num_items: int, *, tail: bool, generator: torch.Generator) -> Tensor:
    """Sizes of the classes, at least two items each, that add up to `num_items`.

    Args:
        num_items: At least 4.
        tail: Sizes that fall like a power of their rank, up to 1000, in place of SOP's 2 to 12.
        generator: Of the draws.

    Returns:
        (C,) int64.
    """
    count = max(2, round(num_items / MEAN_CLASS))
    if tail:
        largest = min(LARGEST_TAIL_CLASS, num_items // 2)
        weights = torch.arange(1, count + 1, dtype=torch.float64) ** -0.9
        sizes = (weights * num_items / weights.sum()).round().long().clamp(SMALLEST_CLASS, largest)
    else:
        largest = LARGEST_CLASS
        # Falling: a class of 12 is a quarter as frequent as one of 2.
        choices = 0.87 ** torch.arange(LARGEST_CLASS - SMALLEST_CLASS + 1, dtype=torch.float64)
        sizes = SMALLEST_CLASS + torch.multinomial(choices, count, replacement=True, generator=generator)
    while missing := num_items - int(sizes.sum()):
        room = (sizes < largest) if missing > 0 else (sizes > SMALLEST_CLASS)
        open_classes = room.nonzero().flatten()
        chosen = open_classes[torch.randperm(len(open_classes), generator=generator)[: abs(missing)]]
        sizes[chosen] += 1 if missing > 0 else -1
    return sizes


def make_problem(
    num_items: int, dim: int, *, structure: str = "trained", tail: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Embeddings and labels in random order, drawn on the CPU.

    `trained`: classes around centres, those around the centres of superclasses, each item with a noise of its own
    strength. `none`: what an untrained network gives, one direction that all share and noise that knows no classes.

    Returns:
        (n, D) float32 and (n,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = class_sizes(num_items, tail=tail, generator=generator)
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)[torch.randperm(num_items, generator=generator)]
    scale = dim**-0.5
    # The fewer the channels, the nearer the nearest of unrelated items: less noise keeps recall alike.
    noise = NOISE * (dim / 512) ** 0.25
    if structure == "trained":
        supers = torch.randn(SUPERCLASSES, dim, generator=generator) * scale
        own = torch.randn(len(sizes), dim, generator=generator) * scale
        of_class = torch.randint(SUPERCLASSES, (len(sizes),), generator=generator)
        centres = SUPERCLASS_WEIGHT * supers[of_class] + own
    else:
        common = torch.randn(dim, generator=generator)
        common = common * (COMMON / common.norm())
    embeddings = torch.empty(num_items, dim)
    for rows, of_rows in zip(embeddings.split(_ROWS), labels.split(_ROWS), strict=True):
        rows.normal_(generator=generator).mul_(scale)
        if structure == "trained":
            strength = torch.randn(len(rows), 1, generator=generator).mul_(NOISE_SPREAD).exp_().mul_(noise)
            rows.mul_(strength).add_(centres[of_rows])
        else:
            rows.add_(common)
    return embeddings, labels
