"""In which order images are written, and which of a listing can be written at all."""

from collections.abc import Sequence

import numpy as np

from gcahng.data.sources.source import TRAIN, Fault, Listing, SourceItem, seeded_order


def writing_order(listing: Listing, seed: int) -> list[SourceItem]:
    """Split by split (train first), class by class in seeded order; a class keeps its order."""
    groups: dict[tuple[str, str], list[SourceItem]] = {}
    for item in listing.items:
        groups.setdefault((item.split, item.class_name), []).append(item)
    splits: dict[str, list[str]] = {TRAIN: []}
    for split, class_name in groups:
        splits.setdefault(split, []).append(class_name)
    return [
        item
        for split, names in splits.items()
        for class_name in seeded_order(names, seed, "order")
        for item in groups[split, class_name]
    ]


def without_repeated_names(items: Sequence[SourceItem]) -> tuple[Sequence[SourceItem], list[Fault]]:
    """The items without those whose `source` an earlier one has, and a fault for each of these."""
    hashes = np.fromiter((hash(item.source) for item in items), dtype=np.int64, count=len(items))
    order = np.argsort(hashes, kind="stable")
    suspects = set(hashes[order[1:]][hashes[order[1:]] == hashes[order[:-1]]].tolist())
    if not suspects:
        return items, []
    first: dict[str, SourceItem] = {}
    kept, faults = [], []
    for item in items:
        if hash(item.source) in suspects:
            if item.source in first:
                faults.append(_listed_twice(item, first[item.source]))
                continue
            first[item.source] = item
        kept.append(item)
    return kept, faults


def _listed_twice(item: SourceItem, earlier: SourceItem) -> Fault:
    places = " and in ".join(f"class {i.class_name!r} of {i.split}" for i in (earlier, item))
    return Fault(item.source, f"the image is listed twice, in {places}: only the first counts. Remove one of them.")
