"""Dealing tars to ranks and workers: every sample once, whatever the numbers."""

from itertools import product

import pytest

from gcahng.data.tars.deal import Piece, deal_pieces
from gcahng.data.tars.locations import TarPlace

SAMPLES = 13


def samples(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.number, p) for piece in pieces for p in range(SAMPLES) if p % piece.parts == piece.part]


def tars(count: int) -> list[Piece]:
    return [Piece(number, TarPlace("d", f"{number}.tar", f"d/{number}.tar")) for number in range(count)]


@pytest.mark.parametrize(("num_tars", "world_size"), list(product([0, 1, 2, 3, 5, 8], [1, 2, 3, 7])))
def test_every_sample_once(num_tars: int, world_size: int) -> None:
    """Also where the ranks have other numbers of workers."""
    found = []
    for rank in range(world_size):
        share = deal_pieces(tars(num_tars), rank, world_size)
        num_workers = (1, 4, 3)[rank % 3]
        shares = [deal_pieces(share, worker, num_workers) for worker in range(num_workers)]
        assert sorted(sum(map(samples, shares), [])) == sorted(samples(share))
        found += samples(share)
    assert sorted(found) == [(number, p) for number in range(num_tars) for p in range(SAMPLES)]


def test_whole_tars_while_there_are_enough() -> None:
    shares = [deal_pieces(tars(7), reader, 3) for reader in range(3)]
    assert [[(p.number, p.part, p.parts) for p in share] for share in shares] == [
        [(0, 0, 1), (3, 0, 1), (6, 0, 1)],
        [(1, 0, 1), (4, 0, 1)],
        [(2, 0, 1), (5, 0, 1)],
    ]


def test_fewer_tars_than_readers_are_shared_and_nobody_is_idle() -> None:
    shares = [deal_pieces(tars(2), reader, 5) for reader in range(5)]
    assert [[(p.number, p.part, p.parts) for p in share] for share in shares] == [
        [(0, 0, 3)],
        [(1, 0, 2)],
        [(0, 1, 3)],
        [(1, 1, 2)],
        [(0, 2, 3)],
    ]
