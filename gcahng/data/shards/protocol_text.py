"""What a manifest says of the published protocol, for people."""

from collections.abc import Mapping
from typing import Any

Counts = dict[str, dict[str, int]]
"""Split -> {"classes": count, "images": count}."""


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
        line += "as published" if published else "no counts are checked"
    else:
        line += "\n".join(["NOT as published", *(counts_table(published, found) if published else ())])
    if protocol.get("test_in_train"):
        lacking = protocol["test_classes_not_in_train"]
        told = f"{lacking} test classes are not in train" if lacking else "all test classes are in train"
        line += f"\nprotocol: tests on classes of train: {told}; no image is in two splits by name"
    return line


def counts_table(wanted: Counts, found: Counts) -> list[str]:
    """Lines of a table: published, found and difference, for each split.

    Args:
        wanted: Published counts.
        found: What is there.
    """
    rows = [("split", "of", "published", "found", "difference")]
    for split in {**wanted, **found}:
        for kind in ("classes", "images"):
            expected, got = (counts.get(split, {}).get(kind, 0) for counts in (wanted, found))
            rows.append((split, kind, str(expected), str(got), f"{got - expected:+d}" if got != expected else "none"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
