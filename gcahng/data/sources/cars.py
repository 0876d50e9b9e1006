"""Source `cars`: Cars-196, split by class. Needs scipy: the extra `cars`."""

from pathlib import Path
from typing import Any

import numpy as np

from gcahng.data.sources.layout import Layout, RowFaults, find_root, leads_out, relative_path
from gcahng.data.sources.listing_builder import FolderFiles, ListingBuilder
from gcahng.data.sources.read_file import read_file
from gcahng.data.sources.source import TEST, TRAIN, Listing, Published, SourceItem
from gcahng.errors import DataError, InputError

LAYOUT = Layout(
    "Cars-196",
    "Stanford Cars by Krause et al.: car_ims.tgz and cars_annos.mat; not the later devkit with cars_train/ and "
    "cars_test/, whose images have other numbers",
    """\
  cars_annos.mat         annotations (relative_im_path, class, ...) and class_names
  car_ims/000001.jpg ...""",
)
PUBLISHED = Published("Cars-196", {TRAIN: (98, 8054), TEST: (98, 8131)})
_ANNOTATIONS = "cars_annos.mat"
_FIELDS = ("relative_im_path", "class")
_LAST_TRAINING_CLASS = 98
_REPAIR = "Download cars_annos.mat and car_ims.tgz again."


class Cars:
    """Cars-196: classes 1 to 98 are for training, 99 to 196 for testing.

    The annotations' field `test` is not read: it puts images of every class on both sides, which is a protocol for
    classification, not for retrieval of unseen classes.

    Args:
        directory: The folder with cars_annos.mat and car_ims/.
        seed: Without effect here: the split is the authors'.
    """

    name = "cars"

    def __init__(self, directory: Path | str, *, seed: int = 0) -> None:
        self.root = find_root(directory, ("cars196",), _ANNOTATIONS)

    def listing(self) -> Listing:
        """All images with their class and split.

        Raises:
            InputError: scipy is not installed.
            DataError: Files are missing or damaged.
        """
        LAYOUT.require(self.root, _ANNOTATIONS, "car_ims")
        path = self.root / _ANNOTATIONS
        annotations, class_names = _read_annotations(path)
        builder = ListingBuilder(FolderFiles(self.root), "Unpack car_ims.tgz again.")
        faults = RowFaults(path, _REPAIR)
        for number, (text, class_id) in enumerate(annotations, start=1):
            image = relative_path(text)
            if image is None:
                faults.add(number, leads_out(text))
            elif not 1 <= class_id <= len(class_names):
                faults.add(number, f"class {class_id} is not one of the {len(class_names)} class names")
            else:
                split = TRAIN if class_id <= _LAST_TRAINING_CLASS else TEST
                builder.add(class_names[class_id - 1], split, image)
        faults.stop()
        return builder.listing(PUBLISHED)

    def load(self, item: SourceItem) -> bytes:
        """The bytes of the file."""
        return read_file(self.root / item.source)


def _read_annotations(path: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """(path, class id) of every image, and the class names, of which the first is class 1."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(
            'Reading cars_annos.mat needs scipy, which is not installed: pip install "gcahng[cars]".'
        ) from None
    try:
        content: dict[str, Any] = loadmat(str(path), variable_names=["annotations", "class_names"], squeeze_me=True)
    except Exception as error:  # a damaged file ends in whatever the parser stumbles over
        raise DataError(
            f"{path} cannot be read as a MATLAB file ({type(error).__name__}: {error}). Download it again."
        ) from None
    annotations = np.atleast_1d(content.get("annotations", np.empty(0)))
    class_names = [str(name) for name in np.atleast_1d(content.get("class_names", np.empty(0)))]
    fields = annotations.dtype.names or ()
    if not set(_FIELDS) <= set(fields) or not class_names:
        raise DataError(
            f"{path}: expected the variables class_names and annotations, the latter with the fields "
            f"{', '.join(_FIELDS)}; got {len(class_names)} class names and the fields "
            f"{', '.join(fields) or 'none'}. This is not {_ANNOTATIONS} as distributed; expected {LAYOUT.describe()}"
        )
    if len(set(class_names)) < len(class_names):
        raise DataError(f"{path}: class_names holds a name twice. {_REPAIR}")
    try:
        rows = [(str(row["relative_im_path"]), int(row["class"])) for row in annotations]
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: a field of annotations is not of one value ({error}). {_REPAIR}") from None
    return rows, class_names
