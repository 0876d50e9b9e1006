"""What a step changes of the parts besides parameters, kept so that it can be put back.

Those are buffers (running statistics, the queue of a memory of earlier batches) and what else a part's state
dictionary holds: plain attributes of a metric loss, the extra state of a module of one's own.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class KeptState:
    """Everything but the parameters, as it was when last taken; its memory is used again."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """
        Args:
            modules: Parts by name.
        """
        self._modules = dict(modules)
        self._with_more = [name for name, module in self._modules.items() if _more(module)]
        self._places: list[tuple[nn.Module, str, Tensor | None]] = []
        self._copies: list[Tensor] = []
        self._more: dict[str, dict[str, Any]] = {}

    def take(self) -> None:
        """Keep what is there now; nothing is waited for."""
        self._places = [
            (owner, name, buffer)
            for module in self._modules.values()
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
        ]
        tensors = self._tensors()
        if [_form(copied) for copied in self._copies] != [_form(tensor) for tensor in tensors]:
            self._copies = [torch.empty_like(tensor) for tensor in tensors]
        _copy(tensors, self._copies)
        self._more = {name: copy.deepcopy(_more(self._modules[name])) for name in self._with_more}

    @torch.no_grad()
    def put_back(self) -> None:
        """Make it as it was; buffers that were made or replaced since are gone."""
        for owner, name, buffer in self._places:
            owner._buffers[name] = buffer
        _copy(self._copies, self._tensors())
        for name, more in self._more.items():
            module = self._modules[name]
            # With all the rest, as it is: a module may ask for it beside its own.
            module.load_state_dict({**module.state_dict(), **copy.deepcopy(more)}, strict=False)

    def _tensors(self) -> list[Tensor]:
        return [buffer for _, _, buffer in self._places if buffer is not None]


def _more(module: nn.Module) -> dict[str, Any]:
    """What a state dictionary holds beside parameters and buffers."""
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in module.state_dict().items() if name not in known}


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy many small tensors, in few operations on CUDA."""
    by_kind: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        found = by_kind.setdefault((source.dtype, source.device), ([], []))
        found[0].append(source)
        found[1].append(target)
    with torch.no_grad():
        for of_kind, to in by_kind.values():
            torch._foreach_copy_(to, of_kind)
