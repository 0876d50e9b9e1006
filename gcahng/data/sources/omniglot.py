"""Source `omniglot`: handwritten characters of many alphabets, split by alphabet."""

import io
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from gcahng.data.images.decode import FORMATS, decode_image
from gcahng.data.sources.layout import Layout
from gcahng.data.sources.read_file import MAX_FILE_BYTES, read_file
from gcahng.data.sources.source import TEST, TRAIN, Fault, Listing, Published, SourceItem
from gcahng.errors import DataError, InputError

LAYOUT = Layout(
    "Omniglot",
    "github.com/brendenlake/omniglot: python/images_background.zip, images_evaluation.zip, "
    "images_background_small1.zip, images_background_small2.zip",
    "  <alphabet>/character<number>/*.png   one drawing by each of 20 people",
)
# Characters of every alphabet: 964 of the 30 alphabets in images_background, 659 of the 20 in images_evaluation,
# 1623 in all; images_background_small1 (136) and small2 (156) are whole alphabets of images_background.
CHARACTERS = {
    **{"Alphabet_of_the_Magi": 20, "Anglo-Saxon_Futhorc": 29, "Arcadian": 26, "Armenian": 41},
    **{"Asomtavruli_(Georgian)": 40, "Balinese": 24, "Bengali": 46, "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14},
    **{"Braille": 26, "Burmese_(Myanmar)": 34, "Cyrillic": 33, "Early_Aramaic": 22, "Futurama": 26, "Grantha": 43},
    **{"Greek": 24, "Gujarati": 48, "Hebrew": 22, "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16},
    **{"Japanese_(hiragana)": 52, "Japanese_(katakana)": 47, "Korean": 40, "Latin": 26, "Malay_(Jawi_-_Arabic)": 40},
    **{"Mkhedruli_(Georgian)": 41, "N_Ko": 33, "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14, "Sanskrit": 42},
    **{"Syriac_(Estrangelo)": 23, "Tagalog": 17, "Tifinagh": 55},
    **{"Angelic": 20, "Atemayar_Qelisayer": 26, "Atlantean": 26, "Aurek-Besh": 26, "Avesta": 26, "Ge_ez": 26},
    **{"Glagolitic": 45, "Gurmukhi": 45, "Kannada": 41, "Keble": 26, "Malayalam": 47, "Manipuri": 40},
    **{"Mongolian": 30, "Old_Church_Slavonic_(Cyrillic)": 45, "Oriya": 46, "Sylheti": 28, "Syriac_(Serto)": 23},
    **{"Tengwar": 25, "Tibetan": 42, "ULOG": 26},
}
DRAWINGS = 20  # of every character, by as many people
_CHARACTER = re.compile(r"character\d+", re.ASCII)
_TURNS = {
    90: Image.Transpose.ROTATE_90,  # counter-clockwise, as in `Image.rotate`
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
_TURNED = re.compile(r"(.*\.png)@(90|180|270)", re.ASCII | re.IGNORECASE | re.DOTALL)  # the name of a turned drawing
_DEEPEST = 4  # levels that are looked at: a folder or zip above, alphabet, character, drawing


class Omniglot:
    """Omniglot (Lake, Salakhutdinov and Tenenbaum, Science 2015): the characters of some alphabets are for training,
    those of all others for testing.

    A class is a character, named ALPHABET_characterNN; its columns are `alphabet` and `rotation` (in degrees,
    counter-clockwise). With `rotations`, every training character turned by 90, 180 and 270 degrees is three further
    training classes, named ALPHABET_characterNN_rot90 and so on, as in Santoro et al. ("Meta-learning with
    memory-augmented neural networks", ICML 2016) and Vinyals et al. ("Matching networks for one shot learning", NIPS
    2016). Test characters are never turned. A character that looks the same upside down becomes two classes of one
    shape there; these papers keep them, and so does this source. Drawings keep their bytes, turned ones are written
    anew as PNG with the same pixels.

    Where every alphabet is one of Omniglot's, its characters and drawings are compared with the published counts.
    Faults are alphabets without characters, characters without drawings, folders in a wrong place or with another
    name, and drawings outside of a character's folder. Other files are counted; what begins with a dot, and the
    folder __MACOSX of an archive, are passed over.

    Args:
        directory: The folder of the alphabets or one that holds it and no other such folder, or the zip file of either.
        seed: Without effect here: the alphabets are the split.
        train_alphabets: Names of the alphabets for training.
        rotations: Whether turned training characters are classes too.

    Raises:
        InputError: No alphabet is named.
        DataError: The folder or zip file is missing, cannot be read, or has another layout.
    """

    name = "omniglot"

    def __init__(
        self, directory: Path | str, *, seed: int = 0, train_alphabets: Sequence[str], rotations: bool = False
    ) -> None:
        if not train_alphabets:
            raise InputError(
                "`train_alphabets` of omniglot names the alphabets for training: expected at least one, got none."
            )
        self.directory = Path(directory)
        self.train_alphabets = tuple(train_alphabets)
        self.rotations = rotations
        self._files: _Files = _Folder(self.directory)
        if self.directory.suffix.lower() == ".zip" and not self.directory.is_dir():
            self._files = _Zip(self.directory)
        self._root = _root(self._files.entries(), self.directory)

    def listing(self) -> Listing:
        """All drawings with their class and split.

        Raises:
            DataError: A folder cannot be read.
            InputError: A training alphabet is not there, or none is left for testing.
        """
        tree = _Tree.read(self._files.entries(), self._root)
        self._check_alphabets(sorted(tree.characters))
        items: list[SourceItem] = []
        class_columns = {}
        for alphabet, characters in sorted(tree.characters.items()):
            split = TRAIN if alphabet in self.train_alphabets else TEST
            for turn in self._turns(split):
                for character, drawings in sorted(characters.items()):
                    name = f"{alphabet}_{character}" + (f"_rot{turn}" if turn else "")
                    class_columns[name] = {"alphabet": alphabet, "rotation": str(turn)}
                    mark = f"@{turn}" if turn else ""
                    items += [SourceItem(name, split, path + mark) for path in drawings]
        extra = {
            "options": {"train_alphabets": sorted(set(self.train_alphabets)), "rotations": self.rotations},
            "ignored_files": tree.ignored,
        }
        return Listing(items, tree.faults, extra, class_columns, self._published(tree.characters))

    def load(self, item: SourceItem) -> bytes:
        """The bytes of the drawing, or of a new PNG where it is turned."""
        turned = _TURNED.fullmatch(item.source)
        if turned is None:
            return self._files.read(self._root + item.source)
        content = self._files.read(self._root + turned[1])
        decode_image(content, name="the file")  # one clear error for whatever may be wrong with the bytes
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.transpose(_TURNS[int(turned[2])]).save(buffer, format="PNG")
        return buffer.getvalue()

    def _turns(self, split: str) -> tuple[int, ...]:
        return (0, *_TURNS) if self.rotations and split == TRAIN else (0,)

    def _check_alphabets(self, found: Sequence[str]) -> None:
        unknown = [name for name in self.train_alphabets if name not in found]
        if unknown:
            raise InputError(
                f"`train_alphabets`: {', '.join(unknown)} not found in {self.directory}: expected some of "
                f"{', '.join(found)}. Spell them like this in --train-alphabets, separated by commas."
            )
        if set(found) == set(self.train_alphabets):
            raise InputError(
                f"`train_alphabets` names all of the {len(found)} alphabets in {self.directory}: expected at least one "
                "left for testing. Name fewer in --train-alphabets."
            )

    def _published(self, alphabets: Iterable[str]) -> Published | None:
        """What there must be of these alphabets; None where one is not Omniglot's."""
        counts = {TRAIN: 0, TEST: 0}
        for alphabet in alphabets:
            if alphabet not in CHARACTERS:
                return None
            split = TRAIN if alphabet in self.train_alphabets else TEST
            counts[split] += CHARACTERS[alphabet] * len(self._turns(split))
        return Published("Omniglot", {split: (count, DRAWINGS * count) for split, count in counts.items()})


class _Files(Protocol):
    """A folder, or a zip file, whose contents are named by paths with forward slashes."""

    def entries(self) -> list[str]:
        """Paths of all files, and of folders, which end in a slash; not below the deepest level."""

    def read(self, path: str) -> bytes:
        """The bytes of a file."""


class _Folder:
    """See `_Files`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self) -> list[str]:
        """See `_Files`.

        Raises:
            DataError: A folder cannot be read.
        """
        found: list[str] = []
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(self.root / folder) as entries:
                    names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
            except OSError as error:
                raise DataError(
                    f"Source folder {self.root / folder} cannot be read ({error.strerror or error}). Give as --source "
                    f"the folder or the zip file of {LAYOUT.describe()}"
                ) from None
            below = [folder + name for name in names if not name.startswith(".")]
            found += below
            waiting += [path for path in below if path.endswith("/") and path.count("/") < _DEEPEST]
        return found

    def read(self, path: str) -> bytes:
        """See `_Files`."""
        return read_file(self.root / path)


class _Zip:
    """See `_Files`. Stays open from the first use on; a process that the source travels to opens it anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_archive": None}

    def entries(self) -> list[str]:
        """See `_Files`.

        Raises:
            DataError: It cannot be read as a zip file.
        """
        names = set()
        for name in self._open().namelist():
            parts = name.split("/")
            if any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX":
                continue
            # A zip file may hold folders as entries of their own or by their files alone.
            names |= {"/".join(parts[:i]) + "/" for i in range(1, min(len(parts), _DEEPEST + 1))}
            if not name.endswith("/") and len(parts) <= _DEEPEST:
                names.add(name)
        return sorted(names)

    def read(self, path: str) -> bytes:
        """See `_Files`.

        Raises:
            DataError: The member is damaged.
        """
        try:
            with self._open().open(path) as member:
                content = member.read(MAX_FILE_BYTES + 1)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError, KeyError) as error:
            raise DataError(f"the member of {self.path} cannot be read ({error}). Fetch the zip file again.") from None
        if len(content) > MAX_FILE_BYTES:
            raise DataError(f"the member of {self.path} unpacks to more than {MAX_FILE_BYTES} bytes. Leave it out.")
        return content

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            # Beside OSError: what its parser stumbles over in a damaged file.
            except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
                reason = getattr(error, "strerror", None) or error
                raise DataError(
                    f"Source {self.path} cannot be read as a zip file ({reason}). Fetch it again, or give as "
                    f"--source the folder of {LAYOUT.describe()}"
                ) from None
        return self._archive


@dataclass
class _Tree:
    """What the folder of the alphabets holds.

    Attributes:
        characters: Alphabet -> character -> paths of its drawings below the folder of the alphabets, in order.
        faults: What cannot be converted.
        ignored: How many files are no drawings.
    """

    characters: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    ignored: int = 0

    @classmethod
    def read(cls, entries: Iterable[str], root: str) -> "_Tree":
        """Sort out all entries (see `_Files`) below `root`."""
        tree = cls()
        below = sorted(path.removeprefix(root) for path in entries if path.startswith(root) and path != root)
        for path in below:  # a folder comes before what it holds
            if path.endswith("/"):
                tree._add_folder(path.rstrip("/"))
            else:
                tree._add_file(path)
        for alphabet, characters in tree.characters.items():
            if not characters:
                tree._fault(alphabet, "the alphabet has no folders character<number>. Fill or remove it.")
            for character, drawings in characters.items():
                if not drawings:
                    tree._fault(f"{alphabet}/{character}", "the character has no .png files. Fill or remove it.")
        return tree

    def _add_folder(self, path: str) -> None:
        alphabet, *rest = path.split("/")
        characters = self.characters.setdefault(alphabet, {})
        if len(rest) == 1 and _CHARACTER.fullmatch(rest[0]):
            characters[rest[0]] = []
        elif len(rest) == 1:
            self._fault(path, "expected a folder character<number> here. Rename it, or move it away.")
        elif len(rest) == 2 and rest[0] in characters:
            self._fault(path, "a character's folder cannot hold folders. Move its drawings up, or it away.")

    def _add_file(self, path: str) -> None:
        *folders, name = path.split("/")
        if not name.lower().endswith(".png"):
            self.ignored += 1
        elif len(folders) < 2:
            self._fault(path, "the drawing is in no folder of a character. Move it into one, or away.")
        elif len(folders) == 2 and folders[1] in self.characters[folders[0]]:
            self.characters[folders[0]][folders[1]].append(path)

    def _fault(self, path: str, reason: str) -> None:
        self.faults.append(Fault(path, reason))


def _root(entries: Iterable[str], source: Path) -> str:
    """The path, "" or one folder with a slash, below which there are ALPHABET/characterNN/ folders.

    Raises:
        DataError: There is none, or more than one.
    """
    roots = set()
    for path in entries:
        *above, last = path.rstrip("/").split("/")
        if path.endswith("/") and len(above) in (1, 2) and _CHARACTER.fullmatch(last):
            roots.add("".join(f"{part}/" for part in above[:-1]))
    if "" in roots:
        return ""
    if len(roots) == 1:
        return roots.pop()
    found = f"several such folders, {', '.join(sorted(roots))}" if roots else "no such folders"
    raise DataError(
        f"Source {source} is not Omniglot as distributed: expected folders <alphabet>/character<number>/, got {found}. "
        f"Give as --source one folder, or the zip file, of {LAYOUT.describe()}"
    )
