"""Parts of a search on the threads of one process.

A tile's product uses all threads of torch by itself, the many small operations around it do not. So each thread gets a
part of the gallery and computes alone; the parts meet as those of ranks do, but hand each other tensors.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from gcahng.metrics.exchange import Exchange

Found = TypeVar("Found")


class _Meeting:
    """Where the threads put down what the others are to see."""

    def __init__(self, parts: int) -> None:
        self.barrier = threading.Barrier(parts)
        self.seen: list[Tensor | None] = [None] * parts

    def exchange(self, part: int, own: Tensor | None) -> list[Tensor | None]:
        self.seen[part] = own
        self.barrier.wait()
        found = list(self.seen)
        self.barrier.wait()
        return found


class _ThreadExchange:
    """An `Exchange` between threads; shared tensors are one object, which nobody may change."""

    def __init__(self, part: int, parts: int, meeting: _Meeting) -> None:
        self.part, self.parts, self._meeting = part, parts, meeting

    def agree(self, action: Callable[[], Found]) -> Found:
        return action()

    def share(self, own: Tensor | None, owner: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shared = self._meeting.exchange(self.part, own)[owner]
        assert shared is not None
        return shared

    def everyone(self, own: Tensor) -> list[Tensor]:
        return [values for values in self._meeting.exchange(self.part, own) if values is not None]

    def sum(self, own: Tensor) -> Tensor:
        return torch.stack(self.everyone(own)).sum(dim=0)


def on_threads(parts: int, work: Callable[[Exchange], Found]) -> Found:
    """`work` on `parts` threads, each with an exchange with the others; what the first returned.

    Torch's threads are shared out among them meanwhile, for the whole process.

    Raises:
        Exception: Of the first part that raised.
    """
    meeting = _Meeting(parts)
    results: list[Found] = []
    errors: list[BaseException] = []

    before = torch.get_num_threads()

    def run(part: int) -> None:
        try:
            torch.set_num_threads(max(1, before // parts))  # libraries keep the number by thread
            with torch.no_grad():
                found = work(_ThreadExchange(part, parts, meeting))
            if part == 0:
                results.append(found)
        except threading.BrokenBarrierError:
            pass  # another part has raised
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    try:
        threads = [threading.Thread(target=run, args=(part,), daemon=True) for part in range(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        meeting.barrier.abort()  # an interrupted wait ends the parts
        torch.set_num_threads(before)
    if errors:
        raise errors[0]
    return results[0]
