"""What a conversion made, as text."""

from pathlib import Path
from typing import Any

from gcahng.data.shards.manifest import SHARED_KEY, Manifest
from gcahng.data.shards.protocol_text import protocol_line
from gcahng.data.shards.skipped import num_skipped, skipped_place

_SHOWN = 10


def summary(manifest: Manifest, out: Path | str) -> str:
    """What a conversion made, for people."""
    lines = [
        f"{split}: {counts['classes']} classes, {counts['images']} images" for split, counts in manifest.splits.items()
    ]
    extra = manifest.extra
    if extra.get("protocol"):
        lines.append(protocol_line(extra["protocol"]))
    if extra.get(SHARED_KEY):
        lines.append(f"NOT class-disjoint: {extra[SHARED_KEY]} classes are in train and in another split")
    if extra.get("listed"):
        listed = (f"{split} {c['classes']} classes / {c['images']} images" for split, c in extra["listed"].items())
        lines.append(f"listed: {', '.join(listed)}")
    merged = extra.get("merged", {})
    if merged:
        swallowed = sum(len(members) for members in merged.values())
        lines.append(f"merged: {swallowed} characters into {len(merged)} others")
    dropped = extra.get("dropped", {})
    if dropped:
        lines.append("dropped: " + ", ".join(f"{len(v)} {k}" for k, v in dropped.items()))
    if extra.get("ignored_files"):
        lines.append(f"ignored: {extra['ignored_files']} files with other extensions")
    if extra.get("encode"):
        lines.append(_encode_line(extra["encode"]))
    if extra.get("duplicates"):
        lines += _duplicate_lines(extra["duplicates"])
    skipped = extra.get("skipped", [])
    total = num_skipped(extra)
    lines.append(f"skipped: {total}")
    lines += [f"  {entry['source']}: {entry['reason']}" for entry in skipped[:_SHOWN]]
    if total > _SHOWN:
        lines.append(f"  and {total - _SHOWN} more, all listed in {skipped_place(extra)}")
    size = sum(shard.bytes for shard in manifest.shards)
    lines.append(f"shards: {len(manifest.shards)}, {size / 1e6:.1f} MB")
    lines.append(f"path: {out}")
    return "\n".join(lines)


def _encode_line(encode: dict[str, Any]) -> str:
    which = "all" if encode["max_side"] is None else f"those with a side of more than {encode['max_side']} pixels"
    return f"encoded anew: {which}, as JPEG of quality {encode['quality']}"


def _duplicate_lines(duplicates: dict[str, Any]) -> list[str]:
    lines = [
        f"duplicates, byte by byte (all kept): {duplicates['within_class']} within a class, "
        f"{duplicates['across_classes']} across classes, {duplicates['across_splits']} across train and other splits"
    ]
    for example in duplicates["examples"]:
        first, second = (f"{image['source']} ({image['split']}, {image['class']})" for image in example["images"])
        lines.append(f"  {example['kind'].replace('_', ' ')}: {first} = {second}")
    return lines
