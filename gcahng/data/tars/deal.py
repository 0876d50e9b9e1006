"""Which reader reads which part of which tar, so that all readers together read everything once.

Whole tars are dealt while there are enough of them: a byte is then fetched once. Fewer tars than readers are shared by
position, so that no reader is idle: its sharers all walk the headers of a tar, but each decodes its own images alone.
Nothing is communicated, and the readers need not be equally many on all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gcahng.data.tars.locations import TarPlace


@dataclass(frozen=True)
class Piece:
    """The samples of a tar whose position is `part` modulo `parts`.

    Attributes:
        number: The tar's place among all of them.
        tar: Where it is.
        part: From 0 to parts - 1.
        parts: In how many pieces the tar is read.
    """

    number: int
    tar: TarPlace
    part: int = 0
    parts: int = 1


def deal_pieces(pieces: Sequence[Piece], reader: int, num_readers: int) -> list[Piece]:
    """The share of one reader; the shares of all are disjoint and hold every sample.

    A share can be dealt again: to ranks first, then to the workers of each.

    Args:
        pieces: What there is to read.
        reader: From 0 to num_readers - 1.
        num_readers: How many read.
    """
    if len(pieces) >= num_readers or not pieces:
        return list(pieces[reader::num_readers])
    piece = pieces[reader % len(pieces)]
    sharers = len(range(reader % len(pieces), num_readers, len(pieces)))
    part = piece.part + piece.parts * (reader // len(pieces))
    return [replace(piece, part=part, parts=piece.parts * sharers)]
