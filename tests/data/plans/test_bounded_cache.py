"""The cache forgets what was used longest ago."""

from gcahng.data.plans.bounded_cache import BoundedCache


def test_values_are_made_once_and_the_oldest_go_first():
    cache: BoundedCache[str] = BoundedCache(6)
    made = []

    def get(key: str, cost: int) -> str:
        return cache.get(key, lambda: made.append(key) or key.upper(), cost)

    assert [get("a", 2), get("b", 2), get("a", 2), get("c", 2)] == ["A", "B", "A", "C"]
    assert made == ["a", "b", "c"] and len(cache) == 3
    get("d", 2)  # b was used longest ago
    get("a", 2), get("c", 2), get("b", 2)
    assert made == ["a", "b", "c", "d", "b"] and len(cache) == 3


def test_a_value_beyond_the_limit_stays_alone():
    cache: BoundedCache[int] = BoundedCache(6)
    cache.get("small", lambda: 1, 1)
    assert cache.get("large", lambda: 2, 100) == 2 and len(cache) == 1
    cache.get("small", lambda: 3, 1)
    assert len(cache) == 1 and cache.get("small", lambda: 4, 1) == 3
