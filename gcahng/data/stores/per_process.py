"""Values that a process makes for itself: connections, threads and open files do not survive a fork."""

import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

# What a forked process inherits and must not tear down: its parent still uses those connections, and a lock inside
# of them may have been held at the moment of the fork.
_INHERITED: list[Any] = []


class PerProcess(Generic[Value]):
    """Makes its value at the first use in each process.

    Args:
        make: Makes the value; must pickle where the owner does.
        keep_inherited: A forked process leaves its parent's value alone. Without it the value is let go of.
    """

    def __init__(self, make: Callable[[], Value], keep_inherited: bool = True) -> None:
        self._make = make
        self._keep_inherited = keep_inherited
        self._made: tuple[int, Value] | None = None

    def get(self) -> Value:
        """The value of this process."""
        made = self._made
        if made is None or made[0] != os.getpid():
            if made is not None and self._keep_inherited:
                _INHERITED.append(made)
            made = self._made = (os.getpid(), self._make())
        return made[1]

    def made(self) -> Value | None:
        """The value, if this process has made it."""
        made = self._made
        return made[1] if made is not None and made[0] == os.getpid() else None

    def forget(self) -> None:
        """The next use makes a new value."""
        if self.made() is not None:
            self._made = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}
