"""How the classes of a batch are divided among ranks."""

from gcahng.errors import InputError


def rank_sizes(num_classes: int, world_size: int) -> tuple[int, ...]:
    """Classes of each rank: ceil(P / W) for the first P mod W ranks, floor(P / W) for the others.

    Args:
        num_classes: P, classes per batch.
        world_size: W, number of ranks.
    Raises:
        InputError: There are more ranks than classes, or fewer than one rank.
    """
    if world_size < 1:
        raise InputError(f"`world_size` must be at least 1, got {world_size}. Pass the number of ranks.")
    if num_classes < world_size:
        raise InputError(
            f"`num_classes` (classes per batch) must be at least the number of ranks: expected {world_size} or "
            f"more, got {num_classes}. Raise it or use fewer ranks; a rank holds whole classes."
        )
    whole, more = divmod(num_classes, world_size)
    return tuple(whole + (rank < more) for rank in range(world_size))


def rank_classes(num_classes: int, rank: int, world_size: int) -> slice:
    """The classes of a batch that a rank holds, a contiguous part; the parts of all ranks make up the batch.

    Args:
        num_classes: P, classes per batch.
        rank: 0..W-1.
        world_size: W, number of ranks.
    Raises:
        InputError: There are more ranks than classes, or there is no such rank.
    """
    sizes = rank_sizes(num_classes, world_size)
    if not 0 <= rank < world_size:
        raise InputError(f"`rank` must be from 0 to {world_size - 1}, got {rank}. Count ranks from 0.")
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])
