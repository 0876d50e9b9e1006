"""A word that one rank leaves for all, without a collective: in the store through which the ranks found each other."""

import time
from itertools import count

from gcahng.distributed.ranks import Ranks
from gcahng.distributed.store import default_store

_LOOK_EVERY_S = 1.0
# Words made so far: what was said in one run of a process group is not for the next.
_made = count()


class SharedWord:
    """One word by name; the first that is left stays."""

    def __init__(self, name: str, ranks: Ranks) -> None:
        """
        Args:
            name: Of the word.
            ranks: All ranks, which make their words in the same order; one alone needs no store.
        """
        self._name = f"{name}/{next(_made)}"
        self._store = None if ranks.size == 1 else default_store("words")
        self._looked = -_LOOK_EVERY_S
        self._left = False

    def leave(self, word: str) -> None:
        """Tell the others, once; a store that is gone is no error."""
        if self._store is None or self._left:
            return
        self._left = True
        try:
            self._store.set(self._name, word)
        except RuntimeError:
            self._store = None

    def heard(self) -> str | None:
        """What a rank has left, if the store could be asked; it is asked once a second at most."""
        now = time.monotonic()
        if self._store is None or now - self._looked < _LOOK_EVERY_S:
            return None
        self._looked = now
        try:
            return self._store.get(self._name).decode() if self._store.check([self._name]) else None
        except RuntimeError:
            self._store = None
            return None
