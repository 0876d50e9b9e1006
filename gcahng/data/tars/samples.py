"""Members of a tar, grouped into samples by WebDataset's rule.

A sample is what shares a key: the member's path up to the first dot of its base name. The rest, in small letters, is
the extension. Members of a sample lie together.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gcahng.data.tars.members import Kind, Member, TarMembers
from gcahng.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
READ_EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS))
"""Members with another extension are passed over unread; there is no decoder for any of them."""
MAX_LABEL_BYTES = 1 << 20
"""Limit of a member that holds a label."""

_META = re.compile(r"__[^/]*__($|/)")
"""WebDataset's names for what describes a tar and is no sample."""
_REPACK = "Repack the tar with the files themselves (tar --hard-dereference --dereference)."


@dataclass(frozen=True)
class TarSample:
    """What a tar holds under one key.

    Attributes:
        key: Unique in its tar.
        position: Counted from 0 over the samples of its tar.
        members: Extension -> content, of `READ_EXTENSIONS`.
    """

    key: str
    position: int
    members: dict[str, bytes] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member's name; None where it has no key, as hidden files and WebDataset's own members.

    `split_name("test/0001.Left.JPG") == ("test/0001", "left.jpg")`.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _META.match(name):
        return None
    return folder + slash + stem, extension.lower()


def tar_samples(
    members: TarMembers, part: int = 0, parts: int = 1, passed_over: Callable[[str], None] | None = None
) -> Iterator[TarSample]:
    """The samples of a tar whose position is `part` modulo `parts`, in order.

    The contents of other samples are not read, but all headers are checked.

    Args:
        members: The tar.
        part: From 0 to parts - 1.
        parts: How many readers share the tar.
        passed_over: Told the extension of every member that is not read, "no key" of those that belong to no sample.
    Raises:
        DataError: See `TarMembers`; or a key or a member comes twice, or a sample's members do not lie together, or
            one of them is a link or a device, or a member's path leads out of the tar.
    """
    seen: set[str] = set()
    extensions: set[str] = set()
    key: str | None = None
    position = -1
    has_position = False
    sample: TarSample | None = None
    for member in members:
        _check_path(members, member)
        if member.kind is Kind.DIRECTORY:
            continue
        name = split_name(member.name)
        if name is None:
            if passed_over is not None:
                passed_over("no key")
            continue
        if name[0] != key:
            if sample is not None:
                yield sample
            key, sample, has_position = name[0], None, False
            extensions.clear()
            if key in seen:
                raise members.fault(
                    f"has sample {key!r} twice, or its members apart: expected all of them together",
                    "Write the tar with sorted names (tar --sort=name).",
                )
            seen.add(key)
        _check_member(members, member, name[1], extensions)
        extensions.add(name[1])
        if name[1] not in READ_EXTENSIONS:
            if passed_over is not None:
                passed_over(f".{name[1]}")
            continue
        if not has_position:
            position += 1
            has_position = True
            sample = TarSample(key, position) if position % parts == part else None
        if sample is not None:
            sample.members[name[1]] = members.content(MAX_LABEL_BYTES if name[1] in LABEL_EXTENSIONS else None)
    if sample is not None:
        yield sample


def image_of(sample: TarSample, name: str) -> bytes:
    """The encoded image of a sample.

    Args:
        sample: The sample.
        name: What the error calls it.
    Raises:
        DataError: It has none or more than one.
    """
    found = [extension for extension in IMAGE_EXTENSIONS if extension in sample.members]
    if len(found) != 1:
        raise DataError(
            f"{name} must have one image: expected one member of {', '.join(IMAGE_EXTENSIONS)}, got "
            f"{', '.join(found) or 'none'} (members read: {', '.join(sorted(sample.members))}). Make the tar again."
        )
    return sample.members[found[0]]


def _check_path(members: TarMembers, member: Member) -> None:
    """Nothing is unpacked here; but who packed such a path meant to write where the reader does not expect it."""
    if member.name.startswith("/") or ".." in member.name.split("/") or "\0" in member.name:
        raise members.fault(
            f"has member {member.name[:200]!r}, whose path leads out of the tar: expected a path below its top",
            "Do not unpack it; make it again from a folder you trust.",
        )


def _check_member(members: TarMembers, member: Member, extension: str, extensions: set[str]) -> None:
    if extension in extensions:
        raise members.fault(f"has member {member.name!r} twice", "Make the tar again.")
    if member.kind is not Kind.FILE and extension in READ_EXTENSIONS:
        raise members.fault(f"has {member.name!r} as a {member.kind.value}: expected a regular file", _REPACK)
