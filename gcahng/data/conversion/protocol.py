"""Compares what was found with what the authors of a data set published."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gcahng.data.sources.source import TRAIN, Published, SourceItem
from gcahng.errors import DataError

Counts = dict[str, dict[str, int]]
"""Split -> {"classes": count, "images": count}."""


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


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """The result of the check for people: one line, or a table where something differs.

    Args:
        protocol: `Manifest.extra["protocol"]`.
    """
    published, found = protocol["published"], protocol["found"]
    counts = ", ".join(
        f"{split} {count['classes']} classes / {count['images']} images" for split, count in found.items()
    )
    line = f"protocol: {protocol['name']}, {counts}: "
    if protocol["matches"]:
        line += "as published" if published else "no counts are published"
    else:
        line += "\n".join(["NOT as published", *(_table(published, found) if published else ())])
    if protocol.get("test_in_train"):
        lacking = protocol["test_classes_not_in_train"]
        told = f"{lacking} test classes are not in train" if lacking else "all test classes are in train"
        line += f"\nprotocol: tests on classes of train: {told}; no image is in two splits by name"
    return line


def _describe(published: Published, wanted: Counts, found: Counts, lacking: Sequence[str], stage: str) -> str:
    lines = [f"{published.name} {stage} differs from what its authors published:"]
    if wanted:
        lines += _table(wanted, found)
    if lacking:
        names = ", ".join(repr(name) for name in lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        lines.append(f"  test classes that train lacks: expected none, got {len(lacking)} ({names})")
    return "\n".join(lines)


def _table(wanted: Counts, found: Counts) -> list[str]:
    rows = [("split", "of", "published", "found", "difference")]
    for split in {**wanted, **found}:
        for kind in ("classes", "images"):
            expected, got = (counts.get(split, {}).get(kind, 0) for counts in (wanted, found))
            rows.append((split, kind, str(expected), str(got), f"{got - expected:+d}" if got != expected else "none"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
