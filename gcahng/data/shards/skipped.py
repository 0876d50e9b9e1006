"""What a conversion left out: the first entries in the manifest, and where these are not all, a file with all.

Every process of a run reads the manifest, and a data set of downloaded images may lack hundreds of thousands.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gcahng.data.shards.disk import disk_errors, sync

SKIPPED_NAME = "skipped.jsonl"
IN_MANIFEST = 1000
"""Entries that the manifest lists itself."""


def skipped_extra(folder: Path, entries: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What `Manifest.extra` says of entries that were left out; writes `skipped.jsonl` where they are many.

    Args:
        folder: Shard folder that is being written.
        entries: {"source", "reason"} of each.

    Returns:
        {"skipped": the first entries}, and where that is not all {"skipped_file": {"name", "sha256", "count"}}.

    Raises:
        DataError: The file cannot be written.
    """
    if len(entries) <= IN_MANIFEST:
        (folder / SKIPPED_NAME).unlink(missing_ok=True)  # of an interrupted attempt that left out more
        return {"skipped": list(entries)}
    content = "".join(json.dumps(dict(entry)) + "\n" for entry in entries).encode()
    with disk_errors(folder):
        (folder / SKIPPED_NAME).write_bytes(content)
        sync(folder / SKIPPED_NAME)
    file = {"name": SKIPPED_NAME, "sha256": hashlib.sha256(content).hexdigest(), "count": len(entries)}
    return {"skipped": list(entries[:IN_MANIFEST]), "skipped_file": file}


def num_skipped(extra: Mapping[str, Any]) -> int:
    """How many entries were left out, from `Manifest.extra`."""
    file, listed = extra.get("skipped_file"), extra.get("skipped")
    if isinstance(file, dict) and isinstance(file.get("count"), int):
        return int(file["count"])
    return len(listed) if isinstance(listed, list) else 0


def skipped_place(extra: Mapping[str, Any]) -> str:
    """Where all entries are listed, for messages."""
    return SKIPPED_NAME if "skipped_file" in extra else "the manifest"
