"""What tensors an operation makes: how tests see that nothing of a forbidden size exists."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class TensorWatch(TorchDispatchMode):
    """Notes the shape of every tensor that torch makes while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return found

    @property
    def largest(self) -> int:
        """Entries of the largest tensor."""
        return max(torch.Size(shape).numel() for shape in self.shapes)

    def with_axes(self, sizes: Iterable[int]) -> list[tuple[int, ...]]:
        """Shapes that have all these axes, each size as often as it is given."""
        wanted = list(sizes)
        return [s for s in self.shapes if all(s.count(size) >= wanted.count(size) for size in wanted)]
