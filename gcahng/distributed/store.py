"""The store through which the ranks found each other, for words that need no collective."""

from datetime import timedelta

from torch.distributed import distributed_c10d


def default_store(prefix: str, answer_within_s: float | None = None) -> distributed_c10d.Store | None:
    """The default process group's store under a prefix of its own; None where there is none.

    Args:
        prefix: In front of every key.
        answer_within_s: Longest wait for a key that is not there. It holds for everyone who uses the store, for ranks
            that connect a new group too: only for a run that is ending. None leaves it as it is.
    """
    try:
        # No public way leads to it.
        store = distributed_c10d.PrefixStore(f"gcahng/{prefix}", distributed_c10d._get_default_store())
        if answer_within_s is not None:
            store.set_timeout(timedelta(seconds=answer_within_s))
        return store
    except (AttributeError, RuntimeError, ValueError):
        return None
