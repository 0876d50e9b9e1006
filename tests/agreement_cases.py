"""What three ranks say to each other when one of them cannot go on; each case's outcome as text."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed import distributed_c10d

from gcahng.distributed import Ranks, failures
from gcahng.distributed.agreement import agreed, check_same, raised_by_all
from gcahng.errors import ConfigError, DataError, TrainingError

GLOO_CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29551")
GLOO_LATE = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation")


def outcome(action: Callable[[], Any]) -> str:
    """What came back, or the error's kind and message."""
    try:
        return repr(action())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def failure(action: Callable[[], Any]) -> Exception:
    """What an action fails with."""
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing failed")


def raising(errors: Mapping[int, Exception], rank: int) -> Callable[[], int]:
    """Fails on some ranks; returns the rank on the others."""

    def action() -> int:
        if rank in errors:
            raise errors[rank]
        return rank

    return action


AGREED: dict[str, dict[int, Exception]] = {
    "nobody": {},
    "one": {1: DataError("shard 3 is damaged")},
    "two": {1: ConfigError("no such file"), 2: TrainingError("disk full")},
    "all alike": dict.fromkeys(range(3), ConfigError("no such key")),
    "all, with different words": {rank: ConfigError(f"{rank} is no folder") for rank in range(3)},
    "a bug": {2: KeyError("weights")},
}


def agreement(ranks: Ranks) -> dict[str, str]:
    found = {name: outcome(lambda e=errors: agreed(ranks, raising(e, ranks.rank))) for name, errors in AGREED.items()}
    bug = failure(lambda: agreed(ranks, raising(AGREED["a bug"], ranks.rank)))
    found["a bug, known to all"] = str(raised_by_all(bug))
    same = {"seed": "1", "data": "abc"}
    found["same"] = outcome(lambda: check_same(ranks, same))
    other = same | ({"seed": "2", "data": "abd"} if ranks.rank == 1 else {})
    found["rank 1 differs"] = outcome(lambda: check_same(ranks, other))
    more = same | ({"weights": "f00"} if ranks.rank < 2 else {})
    found["something is missing"] = outcome(lambda: check_same(ranks, more))
    return found


def endings(ranks: Ranks) -> dict[str, tuple[int, str | None] | None]:
    """How each rank of three ends in each case; None where it takes no part: it hangs, or goes on."""
    failures._TOGETHER_S, failures._WAITED_S = 0.8, 1.5
    data = DataError("image 7 is unreadable")
    text = f"error: {data}"
    cases: dict[str, dict[int, tuple[BaseException, str, int]]] = {
        "all alike": dict.fromkeys(range(3), (data, text, 2)),
        "rank 1 alone": {1: (data, text, 2)},
        "rank 0 alone": {0: (data, text, 2)},
        "rank 1, and its echoes": {1: (data, text, 2), 0: (GLOO_CLOSED, "", 1), 2: (GLOO_CLOSED, "", 1)},
        "a bug, and its echoes": {1: (KeyError("k"), "Traceback\n  line\nKeyError: 'k'", 1), 0: (GLOO_LATE, "", 1)},
        "an echo of another sort": {1: (data, text, 2), 0: (RuntimeError("engine is gone"), "", 1)},
        "rank 1 hangs": {0: (GLOO_LATE, "", 1), 2: (GLOO_LATE, "", 1)},
        "rank 2 is killed": {0: (GLOO_CLOSED, "", 1), 1: (GLOO_CLOSED, "", 1)},
        "an error of torch": {0: (RuntimeError("shape mismatch"), "Traceback\nRuntimeError: shape mismatch", 1)},
    }
    found: dict[str, tuple[int, str | None] | None] = {}
    for name, errors in cases.items():
        ranks.wait()
        if ranks.first:
            _clear(ranks.size)
        ranks.wait()
        found[name] = None
        if name in ("rank 1, and its echoes", "a bug, and its echoes", "an echo of another sort"):
            # What fails first is known before connections break.
            if ranks.rank == 1:
                board = failures._Board(1, 3)
                board.say(errors[1][2], errors[1][1])
            ranks.wait()
            if ranks.rank == 1:
                continue
        if ranks.rank in errors:
            end = failures.ending(*errors[ranks.rank])
            found[name] = (end.status, end.text)
    return found


def _clear(size: int) -> None:
    """Forget what was said in the case before."""
    store = distributed_c10d.PrefixStore("gcahng/failures", distributed_c10d._get_default_store())
    for key in (
        "first",
        "failures",
        *(f"{kind}/{rank}" for kind in ("said", "waited", "left") for rank in range(size)),
    ):
        store.delete_key(key)


def meeting(ranks: Ranks) -> tuple[dict[str, str], dict[str, tuple[int, str | None] | None]]:
    return agreement(ranks), endings(ranks)
