"""What a shard folder holds, for people and as JSON: splits, sizes, and how many images the classes have."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcahng.data.shards.protocol_text import protocol_line
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.skipped import num_skipped, skipped_place

_MAX_BINS = 12
_BAR = 40  # characters of the longest bar
_SHOWN = 10  # skipped entries


def describe(shards: ShardSet, location: str) -> dict[str, Any]:
    """Everything that `describe_text` prints, as JSON values.

    Args:
        shards: The opened folder.
        location: Its name in the result.
    """
    manifest = shards.manifest
    sizes = {split: class_sizes(shards, split) for split in manifest.splits}
    splits = {}
    for split, counts in sizes.items():
        infos = [info for info in manifest.shards if info.split == split]
        num_bytes = sum(info.bytes for info in infos)
        splits[split] = {
            "classes": int(np.count_nonzero(counts)),
            "images": int(counts.sum()),
            "shards": len(infos),
            "bytes": num_bytes,
            "windows": -(-num_bytes // manifest.window_bytes),
            "shared_classes": {
                other: shared
                for other in sizes
                if other != split and (shared := int(np.count_nonzero((counts > 0) & (sizes[other] > 0))))
            },
            "images_per_class": _statistics(counts[counts > 0]),
        }
    skipped = manifest.extra.get("skipped")
    return {
        "location": location,
        "version": manifest.version,
        "source": manifest.source,
        "seed": manifest.seed,
        "classes": manifest.classes.count,
        "images": len(shards),
        "shards": len(manifest.shards),
        "bytes": sum(info.bytes for info in manifest.shards),
        "window_bytes": manifest.window_bytes,
        "digest": manifest.digest(),
        "splits": splits,
        "protocol": manifest.extra.get("protocol"),
        "duplicates": manifest.extra.get("duplicates"),
        "skipped": skipped if isinstance(skipped, list) else [],
        "num_skipped": num_skipped(manifest.extra),
        "skipped_in": skipped_place(manifest.extra),
    }


def class_sizes(shards: ShardSet, split: str) -> NDArray[np.int64]:
    """(classes,) images of every class id in one split."""
    ids, _, counts = shards.class_runs(split)
    sizes: NDArray[np.int64] = np.zeros(shards.manifest.classes.count, np.int64)
    np.add.at(sizes, ids, counts)  # a class may lie in several places
    return sizes


def histogram(sizes: NDArray[np.int64]) -> list[dict[str, int]]:
    """Classes by their number of images, in bins from the smallest to the largest class.

    One bin per number where there are few, bins of one width where the largest class is at most 8 times the
    smallest, and bins that double otherwise.

    Args:
        sizes: (n,) images of each class, at least 1 of them.
    Returns:
        {"from", "to", "classes"} of each bin, both ends included; empty for no class.
    """
    if not sizes.size:
        return []
    low, high = int(sizes.min()), int(sizes.max())
    if high - low < _MAX_BINS:
        starts = list(range(low, high + 1))
    elif high <= 8 * low:
        starts = list(range(low, high + 1, -(-(high - low + 1) // _MAX_BINS)))
    else:  # 1, 2, 3-4, 5-8 and so on
        starts = [1] + [2**power + 1 for power in range(high.bit_length())]
        starts = [
            start for start, end in zip(starts, [*starts[1:], high + 1], strict=True) if end > low and start <= high
        ]
    ends = [start - 1 for start in starts[1:]] + [high]
    places = np.searchsorted(starts, sizes, side="right") - 1
    counts = np.bincount(places, minlength=len(starts)).tolist()
    return [
        {"from": start, "to": end, "classes": count} for start, end, count in zip(starts, ends, counts, strict=True)
    ]


def describe_text(description: dict[str, Any]) -> str:
    """What `describe` found, for people."""
    d = description
    lines = [
        f"{d['location']}: shard format version {d['version']}, source {d['source']}, seed {d['seed']}",
        f"{_amounts(d)}; epochs are planned in windows of {_size(d['window_bytes'])}",
    ]
    for name, split in d["splits"].items():
        lines += ["", *_split_lines(name, split)]
    lines += ["", _protocol_text(d["protocol"]), _duplicates_text(d["duplicates"])]
    skipped = d["skipped"]
    lines.append(f"skipped: {d['num_skipped']}")
    lines += [f"  {_skipped_text(entry)}" for entry in skipped[:_SHOWN]]
    if d["num_skipped"] > _SHOWN:
        lines.append(f"  and {d['num_skipped'] - _SHOWN} more, all listed in {d['skipped_in']}")
    return "\n".join(lines)


def _statistics(sizes: NDArray[np.int64]) -> dict[str, Any]:
    return {
        "min": int(sizes.min(initial=np.iinfo(np.int64).max)) if sizes.size else 0,
        "median": float(np.median(sizes)) if sizes.size else 0.0,
        "mean": float(sizes.mean()) if sizes.size else 0.0,
        "max": int(sizes.max(initial=0)),
        "classes_of_one_image": int(np.count_nonzero(sizes == 1)),
        "histogram": histogram(sizes),
    }


def _split_lines(name: str, split: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {_amounts(split)}, about {_many(split['windows'], 'window')}"]
    lines += [f"  classes that are in {other} too: {count}" for other, count in split["shared_classes"].items()]
    sizes = split["images_per_class"]
    lines.append(
        f"  images per class: min {sizes['min']}, median {sizes['median']:g}, mean {sizes['mean']:.1f}, "
        f"max {sizes['max']}; classes of 1 image: {sizes['classes_of_one_image']}"
    )
    bins = sizes["histogram"]
    labels = [str(b["from"]) if b["from"] == b["to"] else f"{b['from']}-{b['to']}" for b in bins]
    counts = [str(b["classes"]) for b in bins]
    most = max((b["classes"] for b in bins), default=0)
    left, middle = (max(map(len, texts), default=0) for texts in ([*labels, "images"], [*counts, "classes"]))
    lines.append(f"  {'images':>{left}}  {'classes':>{middle}}")
    for b, label, count in zip(bins, labels, counts, strict=True):
        bar = "#" * -(-b["classes"] * _BAR // most)  # rounded up: one class is seen
        lines.append(f"  {label:>{left}}  {count:>{middle}}  {bar}".rstrip())
    return lines


def _protocol_text(protocol: Any) -> str:
    if not protocol:
        return "protocol: none is published for this source"
    try:
        return protocol_line(protocol)
    except (KeyError, TypeError, AttributeError):  # written by another tool
        return f"protocol: {json.dumps(protocol)}"


def _duplicates_text(duplicates: Any) -> str:
    kinds = ("within_class", "across_classes", "across_splits")
    if not isinstance(duplicates, dict) or not all(isinstance(duplicates.get(kind), int) for kind in kinds):
        return "duplicates: " + ("not counted" if duplicates is None else json.dumps(duplicates))
    within, across, splits = (duplicates[kind] for kind in kinds)
    return (
        f"duplicates, byte by byte: {within} within a class, {across} across classes, "
        f"{splits} across train and other splits"
    )


def _skipped_text(entry: Any) -> str:
    if isinstance(entry, dict) and {"source", "reason"} <= entry.keys():
        return f"{entry['source']}: {entry['reason']}"
    return json.dumps(entry)


def _amounts(d: dict[str, Any]) -> str:
    amounts = [_many(d[f"{noun}s"], noun) for noun in ("image", "shard")]
    return ", ".join([_many(d["classes"], "class"), *amounts, _size(d["bytes"])])


def _many(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}{'es' if noun == 'class' else 's'}"


def _size(count: int) -> str:
    """Bytes with a decimal unit, as disks are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
