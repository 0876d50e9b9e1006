"""Thousands of damaged and hostile inputs for a reader: mutations of valid ones, by seeds that hypothesis draws.

The seeds are the same in every session. A reader may refuse an input by an `InputError`, or accept it. Anything else
(another exception, more than some seconds, more memory than the limit) fails the test, which names the seed.
"""

import json
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gcahng.errors import InputError

LONGEST_S = 20.0
"""For one input, on a busy machine: valid ones take a millisecond."""
LONGEST_MESSAGE = 70_000
MEMORY_BYTES = 1 << 30
DEEP = 20_000
EVIL: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 255, 1 << 31, (1 << 32) + 1, 1 << 63, -(1 << 63), 10**30, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "x", "x" * 20_000, "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", "a\0b", "\ud800", "\u202e", "?#%"),
    *("-1", "1e9", "true", "step-0", "<script>", "$(id)", "0" * 64, "f" * 64),
    *([], {}, [[]], [None], {"": {}}, [0] * 300, {"a": [{"b": [{}]}]}, ["x"] * 3),
)
_NAMES = list(zip("abcdefgh", "bcdefghi", strict=True))
YAML_BOMBS = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in _NAMES),
    "a: &a {x: 1}\n" + "".join(f"{c}: &{c} {{<<: [{','.join(['*' + p] * 9)}], y{c}: 1}}\n" for p, c in _NAMES),
    "model:\n  backbone_args:\n    a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"    {c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in _NAMES),
    "model: &m {backbone_args: *m}\n",
    "&a [*a]\n",
    "seed: !!python/object/apply:os.system [exit]\n",
    "seed: !!bool maybe\n",
    "seed: !!int ''\n",
    "seed: !!timestamp x\n",
    "seed: 2024-13-01\n",
    "seed: 0001-01-01T00:00:00+23:59\n",
    "seed: " + "1:" * 3000 + "1\n",
    "seed: " + "1:" * 3000 + "1.5\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: " + "[" * 5000,
    "? [a, b]\n: c\n",
    "\ufeffseed: 1\n",
    "a: " + "b" * 500_000,
)


@dataclass
class Tally:
    """What became of the inputs of one reader."""

    tried: int = 0
    refused: int = 0
    seconds: float = 0.0

    def text(self, name: str) -> str:
        accepted = self.tried - self.refused
        return f"{name} {self.tried} inputs, {self.refused} refused, {accepted} accepted ({self.seconds:.1f} s CPU)"


def many(ordinary: int) -> pytest.MarkDecorator:
    """`examples`: an ordinary number of inputs, and twenty times as many in the full suite."""
    return pytest.mark.parametrize("examples", [ordinary, pytest.param(20 * ordinary, marks=pytest.mark.full)])


def fuzz(name: str, examples: int, read: Callable[[Random], object], record: Callable[[str, object], None]) -> Tally:
    """Call `read` with so many draws; it makes an input of them and reads it.

    Args:
        name: Of the reader, for the line that is printed at the end.
        examples: Inputs.
        read: Raises an `InputError` or returns.
        record: pytest's `record_property`, which also reaches the summary from other processes.
    """
    tally = Tally()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),  # another seed is another input: there is nothing to shrink
    )
    @given(st.integers(0, (1 << 64) - 1))
    def inputs(seed: int) -> None:
        tally.tried += 1
        message = ""
        try:
            with limited():
                read(Random(seed))
        except InputError as error:
            message = str(error)
            tally.refused += 1
        assert len(message) < LONGEST_MESSAGE, "an error that nobody reads"

    started = time.process_time()
    with bounded_memory():
        inputs()
    tally.seconds = time.process_time() - started
    record("fuzz", tally.text(name))
    return tally


@contextmanager
def limited() -> Iterator[None]:
    """A TimeoutError in what takes too long."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"an input took more than {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_memory(more: int = MEMORY_BYTES) -> Iterator[None]:
    """Within it, this process may take so many bytes more than it has; what wants more gets a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutate_bytes(draw: Random, content: bytes) -> bytes:
    """One to three damages: flipped bits, other bytes, cuts, insertions, repetitions, swapped parts, huge numbers."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = _damage(draw, content)
    return content


def _damage(draw: Random, content: bytes) -> bytes:
    size = len(content)
    place, kind = draw.randint(0, max(0, size - 1)), draw.randint(0, 8)
    if kind == 0 or not size:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([content[place] ^ (1 << draw.randint(0, 7))]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + bytes([draw.randint(0, 255)]) + content[place + 1 :]
    if kind == 3:
        junk = draw.choice(
            (b"\xff", b"\0", b"\xff" * 4, b"\0" * 8, b"\xed\xa0\x80", b"99999999999", b"-1", b"\n", b"{[")
        )
        return content[:place] + junk + content[place:]
    if kind == 4:
        return content[:place] + content[place + draw.randint(1, 16) :]
    other = draw.randint(0, size - 1)
    first, last = sorted((place, other))
    if kind == 5:
        return content[:last] + content[first : first + 64] + content[last:]
    if kind == 6:
        length = min(16, size - last, last - first)
        a, b = content[first : first + length], content[last : last + length]
        return content[:first] + b + content[first + length : last] + a + content[last + length :]
    number = draw.choice((0, 1, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
    packed = struct.pack(">I" if kind == 7 else "<I", number)
    return content[:place] + packed + content[place + 4 :]


def mutate_tree(draw: Random, tree: Any) -> Any:
    """One to three changes of a tree of JSON: other values, missing, further and exchanged ones."""
    tree = deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = [((), None, tree), *_places(tree, ())]
        _, holder, value = draw.choice(places)
        kind = draw.randint(0, 5)
        evil = deepcopy(draw.choice(EVIL))
        if holder is None:
            if kind == 0:
                tree = evil
            elif isinstance(tree, dict):
                tree[draw.choice(("", "x", "version", "__class__"))] = evil
            continue
        box, key = holder
        if kind <= 1:
            box[key] = evil
        elif kind == 2:
            box.pop(key)
        elif kind == 3 and type(value) is int:
            box[key] = draw.choice((value + 1, value - 1, -value, value * 1_000_003, 0.5 + value % 1000))
        elif kind == 3 and isinstance(value, str):
            box[key] = draw.choice((value + value, value[1:], value.upper(), value + "\n", list(value)))
        elif kind == 4:
            _, other, other_value = draw.choice(places)
            if other is not None:
                other[0][other[1]], box[key] = value, other_value
        elif isinstance(box, list):
            box.insert(key, value)
        else:
            box[f"{key}x"] = value
        if not isinstance(tree, dict | list):
            break
        tree = _unshared(tree)
    return tree


def _places(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """(path, (container, key), value) of everything below the top."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(entries)[:30]:
        yield (*path, key), (tree, key), value
        yield from _places(value, (*path, key))


def _unshared(tree: Any, depth: int = 0) -> Any:
    """A copy in which nothing holds itself, as exchanges may have made it."""
    if depth > 12:
        return None
    if isinstance(tree, dict):
        return {key: _unshared(value, depth + 1) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_unshared(value, depth + 1) for value in tree]
    return tree


def encode_tree(draw: Random, tree: Any) -> bytes:
    """A tree as JSON, at times with what JSON does not know: other bytes, a key twice, lists in lists in lists."""
    content = json.dumps(tree).encode()
    kind = draw.randint(0, 15)
    if kind == 0:
        return b"\xef\xbb\xbf" + content
    if kind == 1:
        return content.decode().encode("utf-16")
    if kind == 2 and content[:1] == b"{":
        return b'{"version": 1, "version": {}, ' + content[1:]
    if kind == 3:
        return content.replace(b"1", b"[" * DEEP, 1)
    if kind == 4:
        return content.replace(b'"', b'"\xff\xfe', 2)
    if kind == 5:
        return content.replace(b"1", b"1" + b"0" * 5000, 1)
    return mutate_bytes(draw, content) if kind == 6 else content
