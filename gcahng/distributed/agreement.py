"""What ranks do and know alike before they train: one error for all of them, or none.

A rank that stops alone leaves the others waiting. So whatever may fail on some ranks only (files of their machine, a
full disk) runs inside `agreed`; and what must be the same everywhere is compared by `check_same` before a gradient
could mix it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from gcahng.distributed.ranks import Ranks
from gcahng.errors import ConfigError, DataError, InputError, Interrupted, TrainingError

Result = TypeVar("Result")

# Of an error the most special of these travels; everything else comes to the other ranks as the last.
_KINDS: tuple[type[Exception], ...] = (Interrupted, ConfigError, DataError, InputError, TrainingError)

# Attribute of other errors that all ranks were told of.
_TOLD = "told_to_all_ranks"


def agreed(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Do `action` on every rank and return what it returned here; if it failed anywhere, it fails everywhere.

    Args:
        ranks: All of them; each calls this with an action of the same purpose.
        action: Takes no part in collectives: a rank that failed would leave the others in them.
    Raises:
        InputError, TrainingError: The error of the lowest rank that has one, with "rank r: " in front if not all
            ranks had it. A rank whose action failed for a reason of no such kind raises that itself, the others a
            TrainingError.
    """
    if ranks.size == 1:
        return action()
    result: list[Result] = []
    error: Exception | None = None
    try:
        result.append(action())
    except Exception as caught:
        error = caught
    said = ranks.all_of(None if error is None else _told(error))
    failed = [rank for rank, words in enumerate(said) if words is not None]
    if not failed:
        return result[0]
    if error is not None and not isinstance(error, _KINDS):
        error.__dict__[_TOLD] = True
        raise error
    first = said[failed[0]]
    assert first is not None
    kind, text = first
    raise _KINDS[kind](text if all(words == first for words in said) else f"rank {failed[0]}: {text}") from error


def raised_by_all(error: BaseException) -> bool:
    """Whether every rank raises at this place: `agreed` did, or all met the same fault of their common input."""
    return isinstance(error, _KINDS) or _TOLD in vars(error)


def _told(error: Exception) -> tuple[int, str]:
    """Place in `_KINDS`, and the message."""
    for place, kind in enumerate(_KINDS):
        if isinstance(error, kind):
            return place, str(error)
    return len(_KINDS) - 1, f"{type(error).__name__}: {error}"


def check_same(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Compare what all ranks must have alike; one checksum goes around unless something differs.

    Args:
        ranks: All of them.
        facts: What it is, in words for a person, and its value or checksum.
    Raises:
        ConfigError: On every rank, with everything that differs, and on which ranks.
    """
    if ranks.size == 1:
        return
    digest = hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()
    if len(set(ranks.all_of(digest))) == 1:
        return
    known = ranks.all_of(dict(facts))
    names = list(dict.fromkeys(name for of_rank in known for name in of_rank))
    lines = []
    for name in names:
        values = [of_rank.get(name, "nothing") for of_rank in known]
        if len(set(values)) > 1:
            lines.append(f"\n  {name}: {_by_value(values)}")
    raise ConfigError(
        f"The {ranks.size} ranks must be started alike: expected the same everywhere, got{''.join(lines)}\n"
        "Start every rank with one command, one configuration, one installed version and one copy of the data."
    )


def _by_value(values: Sequence[str]) -> str:
    """For instance "4 on ranks 0-2, 5 on rank 3"."""
    return ", ".join(
        f"{value} on {rank_list([rank for rank, other in enumerate(values) if other == value])}"
        for value in dict.fromkeys(values)
    )


def rank_list(ranks: Sequence[int]) -> str:
    """For instance "rank 3" or "ranks 0-2, 5"; `ranks` are increasing, at least one."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
