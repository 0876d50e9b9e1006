"""Parts of a batch for any number of ranks."""

import pytest

from gcahng.data.ranks import rank_classes, rank_sizes
from gcahng.errors import InputError


def test_parts_make_up_the_batch_and_differ_by_at_most_one():
    for num_classes in range(1, 30):
        for world_size in range(1, num_classes + 1):
            sizes = rank_sizes(num_classes, world_size)
            parts = [list(range(num_classes))[rank_classes(num_classes, r, world_size)] for r in range(world_size)]
            assert sum(parts, []) == list(range(num_classes))
            assert tuple(map(len, parts)) == sizes
            assert set(sizes) <= {num_classes // world_size, -(-num_classes // world_size)}
            assert list(sizes) == sorted(sizes, reverse=True)


def test_seven_classes():
    assert rank_sizes(7, 3) == (3, 2, 2) and rank_sizes(7, 2) == (4, 3)
    assert [rank_classes(7, rank, 3) for rank in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 0, 4), r"`num_classes` .* at least the number of ranks: expected 4 or more, got 3"),
        ((3, 0, 0), r"`world_size` must be at least 1, got 0"),
        ((3, 3, 3), r"`rank` must be from 0 to 2, got 3"),
        ((3, -1, 3), r"`rank` must be from 0 to 2, got -1"),
    ],
)
def test_impossible_ranks_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        rank_classes(*arguments)
