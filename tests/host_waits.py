"""Finds, on the CPU, what would make the host wait for a CUDA device.

On the CPU nothing waits, so operations are watched instead: those whose result the host needs before it can go on
(`item`, data-dependent shapes), and those that carry numbers between host and device.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read numbers of a device: one number, or as many as the shape of their result needs.
READING = frozenset(
    {
        "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select",
        "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "allclose", "bincount",
        "histc",
    }
)  # fmt: skip
# A tensor made of the host's numbers (torch.tensor, new_tensor): on CUDA a copy that is waited for.
WRITING = frozenset({"lift_fresh", "lift_fresh_copy"})
# What Python calls on a tensor without an operator of its own.
METHODS = frozenset({"tolist", "numpy", "item", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__"})
# Where the host may read: tensors there lie on the CPU in any run.
HOST_CODE = {
    ("gcahng.training.step", "require_group_major"),  # labels as the loader gives them
    ("gcahng.training.finite_checks", "host_numbers"),  # findings that have arrived
    ("gcahng.metrics.spread", "effective_rank"),  # of a matrix that has arrived
    ("gcahng.random", "mixing_weights"),  # drawn on the CPU
    ("gcahng.generation.synthesis", "_holds_whole_classes"),  # looks at plans on the CPU alone
    ("gcahng.generation.generation_loss", "_check_values"),  # looks at labels on the CPU alone
    ("gcahng.distributed.class_shards", "_check_values"),  # the same
}


@contextmanager
def noted() -> Iterator[list[str]]:
    """Every wait of the code under it, as "operation at file:line"."""
    found: list[str] = []

    def note(name: str) -> None:
        frame, place = sys._getframe(1), ""
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if (module, frame.f_code.co_name) in HOST_CODE:
                return
            if not place and module.startswith("gcahng."):
                place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back
        found.append(f"{name} at {place}")

    with _Methods(note), _Operators(note):
        yield found


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith(("index", "_unsafe_index", "_index_put")) and _has_mask(args)
        if name in READING | WRITING or masked or (name == "repeat_interleave" and "output_size" not in (kwargs or {})):
            self.note(name)
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    """Whether one of the indices is a mask, whose True entries must be counted first."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Methods(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS:
            self.note(name)
        return func(*args, **(kwargs or {}))
