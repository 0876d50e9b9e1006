"""Source `glyphs`: characters drawn from fonts, so that a real data set comes with no download."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from gcahng.data.sources.glyph_classes import GlyphClass, group
from gcahng.data.sources.glyph_fonts import code_text, matplotlib_fonts, read_glyphs
from gcahng.data.sources.glyph_picture import draw_glyph
from gcahng.data.sources.source import Listing, SourceItem, class_disjoint_split, seeded_order
from gcahng.errors import DataError, InputError

Identical = Literal["keep", "drop"]
_SMALLEST_SIZE = 16  # pixels; below, accents of neighbouring classes fall into one another


class Glyphs:
    """A class is a character, its images are the faces that have it, one picture each.

    Which characters and faces: `gcahng.data.sources.glyph_fonts`; which characters are one class:
    `gcahng.data.sources.glyph_classes`; how they are drawn: `gcahng.data.sources.glyph_picture`.

    Args:
        directory: Folder of TrueType fonts; the one inside of matplotlib by default.
        seed: Which classes are taken, and which of them go to test.
        classes: How many classes, chosen uniformly; all by default. Of the same seed and other
            options, a smaller choice is part of a larger one.
        size: Width and height of the pictures in pixels.
        min_faces: Fewest faces of a class.
        test_share: Share of the classes that go to test.
        identical: Faces often share the outline of a symbol. "keep" draws every face; "drop"
            draws one picture per outline.
    """

    name = "glyphs"

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        seed: int = 0,
        classes: int | None = None,
        size: int = 64,
        min_faces: int = 2,
        test_share: float = 0.5,
        identical: Identical = "keep",
    ) -> None:
        for name, value, least in (
            ("classes", classes, 2),
            ("size", size, _SMALLEST_SIZE),
            ("min_faces", min_faces, 2),
        ):
            if value is not None and value < least:
                raise InputError(f"`{name}` of glyphs must be at least {least}, got {value}.")
        if identical not in ("keep", "drop"):
            raise InputError(f"`identical` of glyphs must be keep or drop, got {identical!r}.")
        self.directory = matplotlib_fonts() if directory is None else Path(directory)
        self.seed = seed
        self.classes = classes
        self.size = size
        self.min_faces = min_faces
        self.test_share = test_share
        self.identical = identical

    def listing(self) -> Listing:
        """All pictures to draw.

        Raises:
            DataError: The fonts cannot be read or have fewer classes than asked for.
        """
        glyphs = read_glyphs(self.directory)
        inventory = group(glyphs, self.min_faces, self.identical == "drop")
        chosen = self._choose(inventory.classes)
        split = class_disjoint_split((c.name for c in chosen), self.seed, self.test_share)
        items = [
            SourceItem(c.name, split[c.name], f"{g.face} {code_text(g.code_point)}") for c in chosen for g in c.pictures
        ]
        merged = {c.name: [code_text(m) for m in c.members] for c in chosen if c.members}
        options = {
            "classes": self.classes,
            "size": self.size,
            "min_faces": self.min_faces,
            "test_share": self.test_share,
            "identical": self.identical,
        }
        extra = {"options": options, "merged": merged, "dropped": inventory.dropped}
        return Listing(items, extra=extra)

    def load(self, item: SourceItem) -> bytes:
        """Draw one picture."""
        face, _, code = item.source.rpartition(" ")
        return draw_glyph(self.directory / f"{face}.ttf", int(code.removeprefix("U+"), 16), self.size)

    def _choose(self, classes: Iterable[GlyphClass]) -> list[GlyphClass]:
        by_name = {c.name: c for c in classes}
        if self.classes is None:
            return list(by_name.values())
        if self.classes > len(by_name):
            raise DataError(
                f"The fonts in {self.directory} have {len(by_name)} classes with "
                f"{self.min_faces} or more faces: expected at least {self.classes}. Pass a "
                "smaller --classes or --min-faces."
            )
        names = seeded_order(by_name, self.seed, "choice")[: self.classes]
        return [by_name[name] for name in sorted(names)]
