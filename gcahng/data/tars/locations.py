"""From what a user types, braces and globs included, to a list of tars."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from braceexpand import braceexpand

from gcahng.data.stores.urls import redact
from gcahng.errors import DataError, InputError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_MAX_TARS = 100_000
_COMPRESSED = (".gz", ".tgz", ".zst", ".tzst", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".lz4", ".zip")


@dataclass(frozen=True)
class TarPlace:
    """Where one tar is.

    Attributes:
        folder: Path or URL of what holds it, with the user and the query of the tar's URL.
        name: Its name there.
        location: Path or URL of the tar for messages, without secrets.
    """

    folder: str
    name: str
    location: str


def find_tars(locations: str | Path | Sequence[str | Path]) -> list[TarPlace]:
    """All tars that the locations mean, in their order; those of a glob sorted by name.

    Args:
        locations: Paths or URLs, one or several. `{000..003}` and `{a,b}` stand for several; in paths also `*`, `?`
            and `[...]`.
    Raises:
        InputError: A location is a command (`pipe:`), has unbalanced braces, or is a glob of a URL.
        DataError: Nothing is there, or a tar comes twice, or is compressed.
    """
    given = [locations] if isinstance(locations, str | Path) else list(locations)
    places: list[TarPlace] = []
    first: dict[str, str] = {}
    for location in given:
        for path in _expand(str(location)):
            place = _place(path)
            same = path if _URL.match(path) else os.path.realpath(path)
            if same in first:
                raise DataError(
                    f"Tar {redact(path)} comes twice (also as {redact(first[same])}): its images would count twice. "
                    "Name every tar once."
                )
            first[same] = path
            places.append(place)
    if not places:
        raise InputError("No tars were given: expected at least one path or URL.")
    return places


def _expand(location: str) -> list[str]:
    if location.startswith("pipe:"):
        raise InputError(f"{location!r} is a command: expected a path or URL. Commands in locations are never run.")
    if location.startswith("file:"):
        location = unquote(re.sub("^file:(//(localhost)?(?=/))?", "", location))
    if not _URL.match(location) and os.path.lexists(location):
        return [location]  # whatever its name looks like
    try:
        paths = list(islice(braceexpand(location), _MAX_TARS + 1))
    except ValueError:
        raise InputError(
            f"{location!r} has unbalanced braces. Write for example 'test-{{000..003}}.tar', in quotes."
        ) from None
    if len(paths) > _MAX_TARS:
        raise InputError(f"{location!r} means more than {_MAX_TARS} tars. Check the range in braces.")
    return [found for path in paths for found in _matches(path)]


def _matches(path: str) -> list[str]:
    if _URL.match(path):
        if "*" in path:  # `?` begins a query
            raise InputError(
                f"{path!r} is a pattern of URLs, which cannot be listed. Use braces: 'test-{{000..003}}.tar'."
            )
        return [path]
    if not glob.has_magic(path) or os.path.lexists(path):
        return [path]
    found = sorted(glob.glob(path))
    if not found:
        raise DataError(f"No file matches {path!r} (in {os.getcwd()}). Check the path.")
    return found


def _place(path: str) -> TarPlace:
    bare, mark, query = path.partition("?") if path.startswith(("http://", "https://")) else (path, "", "")
    folder, _, name = bare.rpartition("/")
    if bare.lower().endswith(_COMPRESSED):
        raise DataError(f"Tar {redact(path)} is compressed: expected a plain tar. Decompress it first.")
    if _URL.match(path):
        # The store encodes names for the web, and asks for every file of a folder with the folder's query.
        name = unquote(name) if path.startswith("http") else name
        return TarPlace(folder + mark + query, name, redact(path))
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder: expected tars. Give a pattern in quotes: '{path.rstrip('/')}/*.tar'.")
    if not os.path.exists(path):
        raise DataError(f"Tar {path} does not exist (in {os.getcwd()}). Check the path.")
    return TarPlace(folder or ("/" if path.startswith("/") else "."), name, path)
