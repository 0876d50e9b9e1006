"""What can be converted to shards: a source lists its images and loads them one by one.

A source of one's own is any class with the two methods of `Source`; the command line takes it by
dotted path and calls `Class(directory, seed=seed, **options)`. Its objects travel to worker
processes, so they must be picklable and `load` must not depend on what was read before. A killed conversion goes on
with the same source only: its name, its listing and its plain attributes (numbers, text) are compared. An option that
decides what `load` returns, such as a size in pixels, must be one of these.
"""

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gcahng.components import load_component
from gcahng.errors import ConfigError, DataError, InputError

TRAIN = "train"
TEST = "test"
QUERY = "query"
GALLERY = "gallery"


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One image of a source.

    Attributes:
        class_name: Class, by a name that is unique in the source.
        split: "train", "test" or another split.
        source: Name of the image inside of the source, unique; written beside the image.
        columns: Whatever else is known of this image; written beside it.
    """

    class_name: str
    split: str
    source: str
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """Something of a source that cannot be converted.

    Attributes:
        source: Which image or folder.
        reason: What is wrong with it and how to repair it, as a sentence.
    """

    source: str
    reason: str


@dataclass(frozen=True)
class Published:
    """What the authors of a data set say of it, to be compared with what was found.

    Attributes:
        name: The data set, as its authors call it.
        counts: Split -> (classes, images); empty where nothing is published.
        test_in_train: The protocol tests on classes of the training split (other images of them),
            instead of on classes that training never sees.
    """

    name: str
    counts: Mapping[str, tuple[int, int]]
    test_in_train: bool = False


@dataclass(frozen=True)
class Listing:
    """Everything that a source has.

    Attributes:
        items: All images, in any order; images of a class keep theirs in the shards.
        faults: Found while listing, for example empty class folders.
        extra: JSON values for `Manifest.extra`.
        class_columns: Class name -> what else is known of the class, such as its super class.
        published: The protocol to check, for data sets that have one.
    """

    items: Sequence[SourceItem]
    faults: Sequence[Fault] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    class_columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    published: Published | None = None


class Source(Protocol):
    """Where images come from."""

    name: str
    """Short name, written to the manifest."""

    def listing(self) -> Listing:
        """List all images. Called once, in the main process."""

    def load(self, item: SourceItem) -> bytes:
        """The encoded image (JPEG, PNG or WebP). Called in worker processes.

        Raises:
            OSError, DataError: The image cannot be read; skipped or fatal as the user chose.
        """


def load_source(path: str, directory: Path, seed: int, options: dict[str, str]) -> Source:
    """Build a source of the user's own.

    Args:
        path: Its class, as `package.module:Name`.
        directory: Passed on as first argument.
        seed: Passed on by name.
        options: Passed on by name, as text.

    Raises:
        ConfigError: The class cannot be imported, is not a source, or takes other arguments.
    """
    component = load_component(path)
    missing = [name for name in ("name", "listing", "load") if not hasattr(component, name)]
    if missing:
        raise ConfigError(
            f"Source {path!r} is not a source: expected the attributes name, listing and load "
            f"(see gcahng.data.sources.Source), {', '.join(missing)} missing."
        )
    try:
        inspect.signature(component).bind(directory, seed=seed, **options)
    except TypeError as error:
        raise ConfigError(
            f"Source {path!r} cannot be called with (directory, seed=..."
            f"{''.join(f', {name}=...' for name in options)}): {error}. Check --option."
        ) from None
    source: Source = component(directory, seed=seed, **options)
    return source


def seeded_order(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Names in an order that depends on the seed, the purpose and the names alone.

    Sorted by a hash of each name instead of a generator's permutation: it is the same on every
    platform and version, and a name that is added or removed leaves the order of the others.
    """

    def draw(name: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode(errors="replace")).digest()

    return sorted(names, key=lambda name: (draw(name), name))


def class_disjoint_split(class_names: Iterable[str], seed: int, test_share: float = 0.5) -> dict[str, str]:
    """Class name -> "train" or "test"; `round(test_share * classes)` of them, at least 1, test.

    Args:
        class_names: All classes.
        seed: Which of them go to test.
        test_share: Share of the classes that training never sees, in (0, 1).

    Raises:
        InputError: The share is not in (0, 1).
        DataError: There are fewer than 2 classes.
    """
    if not 0 < test_share < 1:
        raise InputError(
            f"`test_share` must be a share of the classes: expected more than 0 and less than 1, got {test_share}."
        )
    order = seeded_order(class_names, seed, "split")
    if len(order) < 2:
        raise DataError(
            f"Train and test take different classes: expected at least 2 classes, got "
            f"{len(order)} ({', '.join(order) or 'none'}). Add class folders."
        )
    num_test = min(max(round(test_share * len(order)), 1), len(order) - 1)
    return {name: TEST if i < num_test else TRAIN for i, name in enumerate(order)}
