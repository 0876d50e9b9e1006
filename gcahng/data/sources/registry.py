"""Which sources `python -m shards.convert` offers, with the options and the help of each.

A new source is one entry of `KINDS`; the command line is built from it.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcahng.data.sources import cars, csv_file, cub, hotel50k, inshop, omniglot, sop
from gcahng.data.sources.folder import Folder
from gcahng.data.sources.glyphs import Glyphs
from gcahng.data.sources.source import Source, load_source


@dataclass(frozen=True)
class Option:
    """An option of one source.

    Attributes:
        flag: As it is typed, for example "--test-share".
        keyword: The argument of `SourceKind.build` that takes it.
        help: One line.
        type: Makes the value from the text.
        default: Where it is not given; for pairs an empty mapping.
        choices: Where only some values are allowed.
        required: Whether it must be given.
        pairs: The value is key=value and the option may come several times; `build` gets a dict.
        switch: It takes no value; `build` gets whether it is there.
    """

    flag: str
    keyword: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    choices: tuple[str, ...] | None = None
    required: bool = False
    pairs: bool = False
    switch: bool = False


@dataclass(frozen=True)
class SourceKind:
    """A source as the command line knows it.

    Attributes:
        name: Subcommand.
        summary: One line.
        details: What else its own help says: the files that it expects.
        build: Makes the source: `build(directory, seed=seed, **options)`.
        source_help: What --source is.
        options: Its own options.
        needs_source: Whether --source must be given.
    """

    name: str
    summary: str
    details: str
    build: Callable[..., Source]
    source_help: str = "the folder"
    options: tuple[Option, ...] = ()
    needs_source: bool = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add --source and the options of this source."""
        parser.add_argument("--source", type=Path, required=self.needs_source, help=self.source_help)
        for option in self.options:
            if option.pairs:
                parser.add_argument(
                    option.flag,
                    dest=option.keyword,
                    type=_pair,
                    action="append",
                    default=[],
                    metavar="KEY=VALUE",
                    help=f"{option.help}; may come several times",
                )
            elif option.switch:
                parser.add_argument(option.flag, dest=option.keyword, action="store_true", help=option.help)
            else:
                parser.add_argument(
                    option.flag,
                    dest=option.keyword,
                    type=option.type,
                    default=option.default,
                    choices=option.choices,
                    required=option.required,
                    help=option.help,
                )

    def make(self, arguments: Mapping[str, Any]) -> Source:
        """The source for parsed arguments (`vars` of the namespace).

        Raises:
            InputError: An option is out of range.
        """
        options = {
            option.keyword: dict(arguments[option.keyword]) if option.pairs else arguments[option.keyword]
            for option in self.options
        }
        return self.build(arguments["source"], seed=arguments["seed"], **options)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    return key, value


def _delimiter(text: str) -> str:
    return "\t" if text in ("tab", "\\t") else text


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))


def _custom(directory: Path, *, seed: int, path: str, options: dict[str, str]) -> Source:
    return load_source(path, directory, seed, options)


_TEST_SHARE = Option("--test-share", "test_share", "share of the classes for testing (default: 0.5)", float, 0.5)

KINDS = (
    SourceKind(
        "cub",
        "CUB-200-2011: classes 1-100 for training, 101-200 for testing",
        cub.LAYOUT.describe(),
        cub.Cub,
        "CUB_200_2011 or the folder that holds it",
    ),
    SourceKind(
        "cars",
        "Cars-196: classes 1-98 for training, 99-196 for testing",
        cars.LAYOUT.describe() + '\n\nNeeds scipy: pip install "gcahng[cars]".',
        cars.Cars,
        "the folder with cars_annos.mat and car_ims/",
    ),
    SourceKind(
        "sop",
        "Stanford Online Products: train and test as distributed",
        sop.LAYOUT.describe(),
        sop.StanfordOnlineProducts,
        "Stanford_Online_Products or the folder that holds it",
    ),
    SourceKind(
        "inshop",
        "In-Shop Clothes Retrieval: splits train, query and gallery",
        inshop.LAYOUT.describe(),
        inshop.InShop,
        "the folder with Eval/ and Img/",
        (Option("--image-folder", "image_folder", "instead of img, for example img_highres", default="img"),),
    ),
    SourceKind(
        "hotel50k",
        "Hotels-50K: test images of training hotels, unoccluded",
        hotel50k.LAYOUT.describe()
        + "\n\nImages that were not downloaded stop the conversion; --on-error skip counts and lists them.",
        hotel50k.Hotel50K,
        "the folder with input/ and images/",
    ),
    SourceKind(
        "omniglot",
        "Omniglot: alphabets that you name train, all others test",
        omniglot.LAYOUT.describe(),
        omniglot.Omniglot,
        "the folder of the alphabets, or its zip file",
        (
            Option("--train-alphabets", "train_alphabets", "for example Korean,Greek,Latin", _names, (), required=True),
            Option(
                "--rotations",
                "rotations",
                "training characters turned by 90, 180 and 270 degrees are classes too",
                switch=True,
            ),
        ),
    ),
    SourceKind(
        "csv",
        "a table of images: path, class, split, further columns",
        csv_file.FORMAT,
        csv_file.CsvFile,
        "the csv file",
        (
            Option("--images", "images", "folder that the images are in (default: that of the file)", Path),
            Option("--delimiter", "delimiter", "between fields, for example ; or tab (default: ,)", _delimiter, ","),
            Option("--column", "columns", "name of a column, for example class=label", pairs=True),
            Option("--split", "splits", "value read as a split, for example validation=test", pairs=True),
        ),
    ),
    SourceKind(
        "folder",
        "one folder per class, with or without splits above",
        "DIR/<class>/*, where the seed splits the classes, or DIR/{train,test,query,gallery}/<class>/*.",
        Folder,
        options=(_TEST_SHARE,),
    ),
    SourceKind(
        "glyphs",
        "characters drawn from fonts; nothing to download",
        "A class is a character, its images are the faces that have it. Needs the extra `glyphs`.",
        Glyphs,
        "folder of fonts (default: matplotlib's)",
        (
            Option("--classes", "classes", "how many classes (default: all)", int),
            Option("--size", "size", "pixels per side (default: 64)", int, 64),
            Option("--min-faces", "min_faces", "fewest faces of a class (default: 2)", int, 2),
            Option(
                "--identical",
                "identical",
                "pictures of a class that two faces draw alike (default: keep)",
                default="keep",
                choices=("keep", "drop"),
            ),
            _TEST_SHARE,
        ),
        needs_source=False,
    ),
    SourceKind(
        "custom",
        "a source of your own, by dotted path",
        "A class with the methods of gcahng.data.sources.Source.",
        _custom,
        "passed to it",
        (
            Option("--source-class", "path", "package.module:Name", required=True),
            Option("--option", "options", "passed to it", pairs=True),
        ),
    ),
)
