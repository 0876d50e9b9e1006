"""Which characters of the data set `glyphs` are one class.

Unicode has many characters that look the same: Latin A, Greek Alpha, Cyrillic A, the
mathematical A. A picture that stands in two classes cannot be retrieved rightly by anyone, so:

1. Characters without ink (spaces, joiners, variation selectors) are dropped.
2. Characters are visited from the one with most distinct outlines to the one with fewest, ties by
   code point. Each joins the **leader** that shares most of its outlines, if that is at least
   half of them; otherwise it becomes a leader itself. Members are compared with leaders only.
3. An outline that still stands in more than one class is dropped from all of them.
4. Classes with fewer than `min_faces` faces are dropped.

A class has one picture per face and outline, so a merged class can have more pictures than faces.

Why this rule. Outlines are compared without their position, since pictures are centred: period
and middle dot are one class. Merging whatever shares one outline makes chains: Cyrillic te has an
italic that is an m, and small capital te has the upright te, which puts m and T in one class. With
leaders every member looks like its leader in at least half of its own outlines, and step 3 takes
out the few italics where unlike characters meet (te and m, pe and n). Asking for more than half
leaves the bold and italic mathematical letters apart, whose pictures are those of the letters in
another face.

In the fonts of matplotlib 3.11: 7,407 usable characters, 61 of them without ink, 6,871 with two or
more faces (54,431 pictures). 1,308 characters join 448 leaders; 254 outlines (590 pictures) stand
in several classes and are dropped. With two or more faces 5,603 classes and 48,882 pictures remain.
Faces agree in many symbols (an arrow's oblique is its upright): one picture per outline would leave
5,151 classes with two or more pictures and 37,945 pictures. At 64 pixels 88 outlines of different
classes still give the same picture, nearly all of them Braille patterns that differ by a shift and
by one font unit.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from gcahng.data.sources.glyph_fonts import Glyph, code_text

_SHARED = 0.5  # of a character's outlines, for it to join a leader


@dataclass(frozen=True)
class GlyphClass:
    """One class: a leading character, and those that look like it.

    Attributes:
        leader: Code point.
        members: Code points of the others, ascending.
        pictures: One glyph per face and outline, by face, then code point.
    """

    leader: int
    members: tuple[int, ...]
    pictures: tuple[Glyph, ...]

    @property
    def name(self) -> str:
        """For example "U+0041 LATIN CAPITAL LETTER A"."""
        return f"{code_text(self.leader)} {unicodedata.name(chr(self.leader), '')}".rstrip()


@dataclass(frozen=True)
class Inventory:
    """Result of `group`.

    Attributes:
        classes: By leader.
        dropped: Reason -> what, as "U+0020" or, for single pictures, "DejaVuSans U+0020".
    """

    classes: tuple[GlyphClass, ...]
    dropped: dict[str, list[str]]


def group(glyphs: Iterable[Glyph], min_faces: int = 2, one_per_outline: bool = False) -> Inventory:
    """Group glyphs into classes by the rule of this module.

    Args:
        glyphs: Glyphs of all faces.
        min_faces: Fewest faces of a class.
        one_per_outline: Keep one picture of those that are identical within a class; a class then
            needs `min_faces` pictures.
    """
    by_character: dict[int, list[Glyph]] = defaultdict(list)
    for glyph in glyphs:
        by_character[glyph.code_point].append(glyph)
    without_ink = sorted(c for c, own in by_character.items() if not any(g.outline for g in own))
    outlines = {
        c: {g.outline for g in own if g.outline} for c, own in by_character.items() if any(g.outline for g in own)
    }
    members = _merge(outlines)
    owners: Counter[str] = Counter()
    for group_ in members.values():
        owners.update(set().union(*(outlines[c] for c in group_)))

    classes, few, ambiguous = [], [], []
    for leader in sorted(members):
        drawn = [g for c in members[leader] for g in by_character[c] if g.outline]
        ambiguous += [g for g in drawn if owners[g.outline] > 1]
        pictures = _pictures((g for g in drawn if owners[g.outline] == 1), one_per_outline)
        count = len(pictures) if one_per_outline else len({g.face for g in pictures})
        if count < min_faces:
            few += members[leader]
        else:
            others = tuple(sorted(set(members[leader]) - {leader}))
            classes.append(GlyphClass(leader, others, tuple(pictures)))
    dropped = {
        "without ink": [code_text(c) for c in without_ink],
        f"with fewer than {min_faces} {'outlines' if one_per_outline else 'faces'}": [
            code_text(c) for c in sorted(few)
        ],
        "pictures of several classes": [f"{g.face} {code_text(g.code_point)}" for g in ambiguous],
    }
    return Inventory(tuple(classes), dropped)


def _merge(outlines: dict[int, set[str]]) -> dict[int, list[int]]:
    """Leader -> the characters of its class, itself first."""
    leaders_of: dict[str, list[int]] = defaultdict(list)
    members: dict[int, list[int]] = {}
    for character in sorted(outlines, key=lambda c: (-len(outlines[c]), c)):
        own = outlines[character]
        shared = Counter(leader for outline in own for leader in leaders_of[outline])
        leader = min(shared, key=lambda c: (-shared[c], c), default=None)
        if leader is not None and shared[leader] >= _SHARED * len(own):
            members[leader].append(character)
            continue
        members[character] = [character]
        for outline in own:
            leaders_of[outline].append(character)
    return members


def _pictures(glyphs: Iterable[Glyph], one_per_outline: bool) -> list[Glyph]:
    chosen: dict[tuple[str, str], Glyph] = {}
    for glyph in sorted(glyphs, key=lambda g: (g.face, g.code_point)):
        key = ("" if one_per_outline else glyph.face, glyph.outline)
        chosen.setdefault(key, glyph)
    return list(chosen.values())
