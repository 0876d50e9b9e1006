"""What a search that is split into parts needs of the others; alone, nothing is sent.

Each part holds some queries and some gallery items. The functions come in from outside, as reducers do in the graph:
`gcahng.distributed.retrieval` gives those of ranks.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")


class Exchange(Protocol):
    """Parts 0..parts - 1; every method is called by all of them, in the same order."""

    part: int
    parts: int

    def agree(self, action: Callable[[], Found]) -> Found:
        """Run `action`; where it raises in one part, it raises in all."""
        ...

    def share(self, own: Tensor | None, owner: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The owner's tensor in every part; the others pass None, and what it looks like."""
        ...

    def everyone(self, own: Tensor) -> list[Tensor]:
        """Each part's tensor, in order; they may differ in the first dimension."""
        ...

    def sum(self, own: Tensor) -> Tensor:
        """The sum of all parts' tensors of one shape."""
        ...


class Alone:
    """One part."""

    part = 0
    parts = 1

    def agree(self, action: Callable[[], Found]) -> Found:
        return action()

    def share(self, own: Tensor | None, owner: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert own is not None
        return own

    def everyone(self, own: Tensor) -> list[Tensor]:
        return [own]

    def sum(self, own: Tensor) -> Tensor:
        return own


ALONE = Alone()
