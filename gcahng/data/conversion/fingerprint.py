"""What decides the bytes of a conversion, so that two different ones are never mixed in one folder."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import PIL

from gcahng.data.conversion.image_file import EncodeSettings
from gcahng.data.shards.manifest import MANIFEST_VERSION
from gcahng.data.sources.source import Listing, Source, SourceItem

_LISTING = "listing"
_SHOWN = 6


def fingerprint(
    source: Source,
    listing: Listing,
    items: Sequence[SourceItem],
    *,
    seed: int,
    shard_bytes: int,
    window_bytes: int,
    encode: EncodeSettings | None,
) -> dict[str, Any]:
    """A JSON object that is the same for two conversions only if they write the same bytes.

    The images' contents are not looked at: who changes them between two runs starts anew.

    Args:
        source: The source; its plain attributes (numbers, text, yes or no) count as options.
        listing: What it lists.
        items: The items in the order of writing.
        seed: As all others: see `gcahng.data.conversion.convert.convert`.
    """
    return {
        "format": MANIFEST_VERSION,
        "source": source.name,
        "seed": seed,
        "shard_bytes": shard_bytes,
        "window_bytes": window_bytes,
        "max_side": encode.max_side if encode else None,
        "quality": encode.quality if encode else None,
        "Pillow": PIL.__version__,  # it encodes what is not kept as it is
        **{f"source's {name}": value for name, value in _plain_attributes(source).items()},
        "images": len(items),
        _LISTING: _digest(listing, items),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Names what differs: "`seed` 1 instead of 0"."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    parts = [f"`{name}` {now.get(name)!r} instead of {before.get(name)!r}" for name in names if name != _LISTING]
    if not parts:
        return "a source that lists other images, classes, columns or options"
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more


def _plain_attributes(source: Source) -> dict[str, Any]:
    return {
        name: value
        for name, value in sorted(getattr(source, "__dict__", {}).items())
        if not name.startswith("_")
        and isinstance(value, bool | int | float | str | None)
        and name not in ("seed", "name")
    }


def _digest(listing: Listing, items: Sequence[SourceItem]) -> str:
    digest = hashlib.sha256()
    for item in items:
        row = [item.class_name, item.split, item.source, dict(item.columns)]
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    faults = [[fault.source, fault.reason] for fault in listing.faults]
    columns = {name: dict(values) for name, values in listing.class_columns.items()}
    digest.update(json.dumps([faults, columns, listing.extra], sort_keys=True).encode())
    return digest.hexdigest()
