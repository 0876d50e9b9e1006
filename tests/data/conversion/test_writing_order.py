"""The order of writing, and names that come twice, compared with plain loops."""

import random

import pytest

from gcahng.data.conversion.writing_order import without_repeated_names, writing_order
from gcahng.data.sources.source import Listing, SourceItem, seeded_order


def listed(seed: int, num_names: int) -> list[SourceItem]:
    chance = random.Random(seed)
    splits = {f"class {i}": chance.choice(["train", "query", "gallery"]) for i in range(8)}
    classes = [chance.choice(list(splits)) for _ in range(60)]
    return [SourceItem(name, splits[name], f"image {chance.randrange(num_names)}") for name in classes]


@pytest.mark.parametrize("seed", range(5))
def test_train_first_then_class_by_class(seed: int) -> None:
    items = listed(seed, 10**9)
    order = writing_order(Listing(items), seed)
    assert sorted(i.source for i in order) == sorted(i.source for i in items)
    splits = list(dict.fromkeys(i.split for i in order))
    assert splits == ["train", *(s for s in dict.fromkeys(i.split for i in items) if s != "train")]
    for split in splits:
        of_split = [i for i in order if i.split == split]
        names = list(dict.fromkeys(i.class_name for i in of_split))
        assert names == seeded_order(names, seed, "order")
        assert of_split == [i for name in names for i in items if i.class_name == name]
        assert [i.split for i in order].index(split) + len(of_split) <= len(order)


@pytest.mark.parametrize(("seed", "num_names"), [(0, 20), (1, 50), (2, 500), (3, 10**9)])
def test_the_first_of_a_name_counts(seed: int, num_names: int) -> None:
    items = listed(seed, num_names)
    kept, faults = without_repeated_names(items)
    seen: set[str] = set()
    expected_kept, expected_faults = [], []
    for item in items:
        (expected_faults if item.source in seen else expected_kept).append(item)
        seen.add(item.source)
    assert list(kept) == expected_kept
    assert [fault.source for fault in faults] == [item.source for item in expected_faults]
    assert len(kept) + len(faults) == len(items)


def test_the_same_item_object_twice_is_listed_twice() -> None:
    item = SourceItem("owl", "train", "1")
    kept, faults = without_repeated_names([item, item])
    assert list(kept) == [item]
    assert [fault.source for fault in faults] == ["1"]
