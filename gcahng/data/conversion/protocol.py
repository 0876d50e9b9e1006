"""Compares what was found with what the authors of a data set published."""

from collections.abc import Iterable, Sequence
from typing import Any

from gcahng.data.shards.protocol_text import Counts, counts_table
from gcahng.data.sources.source import TRAIN, Listing, Published, SourceItem
from gcahng.errors import DataError


def count_items(items: Sequence[SourceItem]) -> Counts:
    """Classes and images of each split."""
    classes: dict[str, set[str]] = {}
    images: dict[str, int] = {}
    for item in items:
        classes.setdefault(item.split, set()).add(item.class_name)
        images[item.split] = images.get(item.split, 0) + 1
    return {split: {"classes": len(classes[split]), "images": images[split]} for split in images}


def unseen_test_classes(class_splits: Iterable[tuple[str, str]]) -> list[str]:
    """Classes of other splits that train lacks, in alphabetical order.

    Args:
        class_splits: Names of classes, each with a split that it is in.
    """
    train, others = set[str](), set[str]()
    for name, split in class_splits:
        (train if split == TRAIN else others).add(name)
    return sorted(others - train)


def classes_shared_with_train(listing: Listing, *, allow_mismatch: bool) -> int:
    """How many classes are in train and in another split, where the protocol tests on unseen classes; else 0.

    Args:
        listing: What is to be converted.
        allow_mismatch: Go on where there are some.
    Raises:
        DataError: There are some.
    """
    if listing.published and listing.published.test_in_train:
        return 0
    train = {item.class_name for item in listing.items if item.split == TRAIN}
    shared: dict[str, str] = {}
    for item in listing.items:
        if item.split != TRAIN and item.class_name in train:
            shared.setdefault(item.class_name, item.split)
    if shared and not allow_mismatch:
        first = min(shared)
        more = f" (and {len(shared) - 1} more)" if len(shared) > 1 else ""
        raise DataError(
            f"Class {first!r}{more} is in {TRAIN} and in {shared[first]}: expected training classes that no other "
            "split has, because retrieval is evaluated on unseen classes. Remove or rename one of them, give one "
            "folder of classes and let the seed split it, or pass --allow-mismatch to go on all the same."
        )
    return len(shared)


def check_protocol(
    published: Published | None,
    found: Counts,
    unseen: Sequence[str],
    *,
    allow_mismatch: bool,
    stage: str,
) -> dict[str, Any] | None:
    """Compare counts with the published ones.

    Args:
        published: The protocol; None compares nothing.
        found: What is there.
        unseen: Test classes that train lacks; they count where the protocol tests on training classes.
        allow_mismatch: Go on in spite of a difference.
        stage: Completes "... differs from what its authors published", such as "as listed".
    Returns:
        What `Manifest.extra["protocol"]` says; None without a protocol.
    Raises:
        DataError: There is a difference; the message has it as a table.
    """
    if published is None:
        return None
    wanted = {split: {"classes": classes, "images": images} for split, (classes, images) in published.counts.items()}
    lacking = list(unseen) if published.test_in_train else []
    matches = (not wanted or found == wanted) and not lacking
    result: dict[str, Any] = {"name": published.name, "published": wanted, "found": found, "matches": matches}
    if published.test_in_train:
        result["test_in_train"] = True
        result["test_classes_not_in_train"] = len(lacking)
    if not matches and not allow_mismatch:
        message = _describe(published, wanted, found, lacking, stage)
        raise DataError(f"{message}\nComplete the data set, or pass --allow-mismatch to go on all the same.")
    return result


def _describe(published: Published, wanted: Counts, found: Counts, lacking: Sequence[str], stage: str) -> str:
    lines = [f"{published.name} {stage} differs from what its authors published:"]
    if wanted:
        lines += counts_table(wanted, found)
    if lacking:
        names = ", ".join(repr(name) for name in lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        lines.append(f"  test classes that train lacks: expected none, got {len(lacking)} ({names})")
    return "\n".join(lines)
