"""What a rank takes of things that all ranks know: computed by each, without a word between them."""

from gcahng.errors import InputError


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank that cannot be.

    Args:
        rank: Of this process, 0..W-1.
        world_size: W, number of ranks.
    Raises:
        InputError: There are no ranks, or there is no such rank.
    """
    if world_size < 1:
        raise InputError(f"`world_size` must be at least 1, got {world_size}. Pass the number of ranks.")
    if not 0 <= rank < world_size:
        raise InputError(f"`rank` must be from 0 to {world_size - 1}, got {rank}. Count ranks from 0.")


def rank_part(count: int, rank: int, world_size: int) -> slice:
    """A rank's contiguous part of `count` things; the parts of all ranks, one after another, are all of them.

    The first `count` mod W ranks take ceil(count / W), the others floor(count / W).

    Args:
        count: How many things there are; may be fewer than ranks.
        rank: Of this process, 0..W-1.
        world_size: W, number of ranks.
    Raises:
        InputError: There are no ranks, or there is no such rank.
    """
    check_rank(rank, world_size)
    whole, more = divmod(count, world_size)
    start = rank * whole + min(rank, more)
    return slice(start, start + whole + (rank < more))


def rank_sizes(num_classes: int, world_size: int) -> tuple[int, ...]:
    """Classes of a batch that each rank holds.

    Args:
        num_classes: P, classes per batch.
        world_size: W, number of ranks.
    Raises:
        InputError: There are more ranks than classes, or fewer than one rank.
    """
    check_rank(0, world_size)
    if num_classes < world_size:
        raise InputError(
            f"`num_classes` (classes per batch) must be at least the number of ranks: expected {world_size} or "
            f"more, got {num_classes}. Raise it or use fewer ranks; a rank holds whole classes."
        )
    parts = (rank_part(num_classes, rank, world_size) for rank in range(world_size))
    return tuple(part.stop - part.start for part in parts)


def rank_classes(num_classes: int, rank: int, world_size: int) -> slice:
    """The classes of a batch that a rank holds: whole classes, floor(P / W) or ceil(P / W).

    Args:
        num_classes: P, classes per batch.
        rank: Of this process, 0..W-1.
        world_size: W, number of ranks.
    Raises:
        InputError: There are more ranks than classes, or there is no such rank.
    """
    rank_sizes(num_classes, world_size)
    return rank_part(num_classes, rank, world_size)
