"""Few cases that hold every pair of values of any two switches, as far as rules let the two meet at all."""

import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

Values = Mapping[str, Hashable]
# Whether values do not contradict each other; also asked about some of the switches only.
Rule = Callable[[Values], bool]
Pair = frozenset[tuple[str, Hashable]]


def complete(factors: Mapping[str, Sequence[Hashable]], chosen: Values, allowed: Rule) -> dict[str, Hashable] | None:
    """A whole case that holds `chosen`, of all others the first values that can be; None if there is none."""
    if not allowed(chosen):
        return None
    missing = next((name for name in factors if name not in chosen), None)
    if missing is None:
        return {name: chosen[name] for name in factors}
    for value in factors[missing]:
        found = complete(factors, {**chosen, missing: value}, allowed)
        if found is not None:
            return found
    return None


def pairs_of(case: Values) -> set[Pair]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


def possible_pairs(factors: Mapping[str, Sequence[Hashable]], allowed: Rule) -> list[Pair]:
    """All pairs of values of two switches that some case can hold, in the order of the switches."""
    return [
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if complete(factors, {a: x, b: y}, allowed) is not None
    ]


def all_pairs(factors: Mapping[str, Sequence[Hashable]], allowed: Rule) -> list[dict[str, Hashable]]:
    """Cases that together hold every possible pair; the same ones in every call.

    Each case begins with the first pair still to be held and takes, switch by switch, the value that holds most of the
    others.
    """
    open_pairs = dict.fromkeys(possible_pairs(factors, allowed))
    cases = []
    while open_pairs:
        chosen = dict(next(iter(open_pairs)))
        for name in _widest_first(factors, chosen):
            fitting = [v for v in factors[name] if complete(factors, {**chosen, name: v}, allowed) is not None]
            gains = [_gain(open_pairs, chosen, name, value) for value in fitting]
            chosen[name] = fitting[gains.index(max(gains))]
        case = {name: chosen[name] for name in factors}
        cases.append(case)
        for pair in pairs_of(case):
            open_pairs.pop(pair, None)
    return cases


def _widest_first(factors: Mapping[str, Sequence[Hashable]], chosen: Values) -> list[str]:
    return sorted((name for name in factors if name not in chosen), key=lambda name: -len(factors[name]))


def _gain(open_pairs: Collection[Pair], chosen: Values, name: str, value: Hashable) -> int:
    """How many open pairs a value makes with those chosen already; equal ones: in how many it stands at all."""
    made = sum(frozenset({(name, value), item}) in open_pairs for item in chosen.items())
    return made * 10_000 + sum((name, value) in pair for pair in open_pairs)
