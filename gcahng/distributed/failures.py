"""The end of a run that fails on some ranks: everybody ends, and people read the cause and not its echoes.

A rank that fails writes its words down in the store through which the ranks found each other, then ends. The others
meet closed connections or wait in vain until the groups' time limit; they look there and say in one line who failed.
Ranks that fail alike (a loss that is not finite is so everywhere) say it once, by rank 0. The launcher keeps that
store; without one rank 0 does, and takes it along when it is the one that fails.
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from gcahng.distributed.agreement import rank_list
from gcahng.distributed.store import default_store
from gcahng.errors import InputError, TrainingError

EACH_RANK = "gcahng.each_rank"
"""Logger of what concerns the rank that says it: heard from every rank, where the other loggers are rank 0's."""

# Seconds in which ranks that fail together are heard of each other.
_TOGETHER_S = 1.5
# Seconds in which ranks that waited in vain do so at about the same time.
_WAITED_S = 5.0
_POLL_S = 0.05
_COLLECTIVE = re.compile(r"gloo|nccl|c10d|connection (closed|reset)|broken pipe|collective|tcpstore", re.IGNORECASE)
_LATE = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_DETAIL = 200


@dataclass(frozen=True)
class Ending:
    """How this rank ends.

    Attributes:
        status: Exit status.
        text: For stderr; None where another rank says it.
    """

    status: int
    text: str | None


@dataclass(frozen=True)
class _Said:
    """The words of a rank that failed."""

    rank: int
    status: int
    text: str


def connected() -> bool:
    """Whether this process has a process group, alone or with others."""
    return dist.is_available() and dist.is_initialized()


def ending(error: BaseException, text: str, status: int) -> Ending:
    """What a rank that failed says, after it has told the others and heard what they said.

    Args:
        error: What it failed with.
        text: What one process alone would say of it.
        status: The exit status of that.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return Ending(status, text)
    board = _Board(rank, size)
    cause = board.first()
    if _is_echo(error) or (cause is not None and _may_be_echo(error)):
        found = _echo(board, str(error))
    else:
        found = Ending(status, _own(board, status, text))
    board.leave()
    return found


def _own(board: "_Board", status: int, text: str) -> str | None:
    """What to say of an error that this rank met itself."""
    board.say(status, text)
    others = range(1, board.size) if board.rank == 0 else range(1)
    board.await_(lambda: all(board.said(other) is not None for other in others), _TOGETHER_S)
    heard = [board.said(other) for other in others]
    alike = any(words is not None and words.text == text for words in heard)
    if board.rank == 0:
        return text if alike else f"rank 0: {text}"
    return None if alike else f"rank {board.rank}: {text}"


def _is_echo(error: BaseException) -> bool:
    """Whether a collective failed, which is about another rank."""
    if isinstance(error, dist.DistError):
        return True
    return _may_be_echo(error) and _COLLECTIVE.search(str(error)) is not None


def _may_be_echo(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and not isinstance(error, InputError | TrainingError)


def _echo(board: "_Board", message: str) -> Ending:
    late = _LATE.search(message) is not None
    board.mark()
    board.await_(lambda: board.first() is not None or not board.missing(), _WAITED_S if late else _TOGETHER_S)
    cause = board.first()
    if cause is not None:
        line = cause.text.strip().splitlines()[-1 if cause.text.startswith("Traceback") else 0]
        return Ending(cause.status, f"rank {board.rank}: ended, since rank {cause.rank} failed: {line}")
    missing = board.missing()
    if not board.reachable:
        who = "they left no word here; see what the one that ended first has said"
    else:
        who = f"no word from {rank_list(missing)}, which hangs or was killed" if missing else "all of them say so"
    if late:
        what = f"ranks waited for each other longer than `distributed.timeout_seconds`; {who}"
    else:
        what = f"the connection to other ranks broke; {who}"
    first_line = message.strip().splitlines()[0][:_DETAIL] if message.strip() else "no message"
    return Ending(1, f"rank {board.rank}: error: {what} ({first_line})")


class _Board:
    """Words that ranks leave for each other in the store of the default process group; silent where it is gone."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._store = default_store("failures", _TOGETHER_S)

    @property
    def reachable(self) -> bool:
        """Whether words can be left and read: rank 0 may have kept them, and have ended."""
        return self._store is not None

    def say(self, status: int, text: str) -> None:
        """Leave the words of this rank; the first rank's are the cause."""
        words = json.dumps({"rank": self.rank, "status": status, "text": text})
        self._write(f"said/{self.rank}", words)
        try:
            if self._store is not None and self._store.add("failures", 1) == 1:
                self._write("first", words)
        except RuntimeError:
            self._store = None

    def mark(self) -> None:
        """Note that this rank waited in vain."""
        self._write(f"waited/{self.rank}", "yes")

    def first(self) -> _Said | None:
        """The words of the rank that failed first."""
        return self._read("first")

    def said(self, rank: int) -> _Said | None:
        """The words of a rank."""
        return self._read(f"said/{rank}")

    def missing(self) -> list[int]:
        """Other ranks that have neither failed nor waited in vain, as far as is known."""
        others = (rank for rank in range(self.size) if rank != self.rank)
        return [rank for rank in others if not self._has(f"said/{rank}") and not self._has(f"waited/{rank}")]

    def leave(self) -> None:
        """This rank has heard what there was; where rank 0 keeps the store itself, it waits for those that listen."""
        self._write(f"left/{self.rank}", "yes")
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self.await_(lambda: all(self._has(f"left/{rank}") for rank in range(1, self.size)), _TOGETHER_S)

    def await_(self, condition: Callable[[], bool], seconds: float) -> None:
        """Return when the condition holds, the time is over, or nobody can be heard."""
        deadline = time.monotonic() + seconds
        while self._store is not None and time.monotonic() < deadline and not condition():
            time.sleep(_POLL_S)

    def _write(self, key: str, words: str) -> None:
        try:
            if self._store is not None:
                self._store.set(key, words)
        except RuntimeError:
            self._store = None

    def _has(self, key: str) -> bool:
        try:
            return self._store is not None and bool(self._store.check([key]))
        except RuntimeError:
            self._store = None
            return False

    def _read(self, key: str) -> _Said | None:
        try:
            if self._store is None or not self._store.check([key]):
                return None
            return _Said(**json.loads(self._store.get(key)))
        except RuntimeError:
            self._store = None
            return None
