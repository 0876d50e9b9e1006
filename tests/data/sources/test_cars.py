"""Source `cars`: classes, not the official image split, decide; files that are not cars_annos.mat are refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
from official_layouts import car_names, put, write_cars, write_cars_annotations
from scipy.io import savemat

from gcahng.data.sources.cars import Cars
from gcahng.errors import DataError, InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cars(tmp_path, {1: 2, 98: 2, 99: 3, 196: 2})
    return tmp_path


def test_classes_decide(root: Path) -> None:
    items = Cars(root).listing().items
    assert {item.class_name: item.split for item in items} == {
        "Maker Model 1 2012": "train",
        "Maker Model 98 2012": "train",
        "Ram C/V Cargo Van Minivan 2012": "test",
        "Maker Model 196 2012": "test",
    }
    assert [item.source for item in items] == [f"car_ims/{i:06d}.jpg" for i in range(1, 10)]
    assert Cars(root).load(items[3]) == (root / "car_ims/000004.jpg").read_bytes()


def test_one_image_only(tmp_path: Path) -> None:
    """MATLAB's 1 x 1 arrays must not turn into scalars."""
    put(tmp_path / "car_ims/000001.jpg", 1)
    write_cars_annotations(tmp_path / "cars_annos.mat", [("car_ims/000001.jpg", 1)], ["Only"])
    assert [(i.class_name, i.source) for i in Cars(tmp_path).listing().items] == [("Only", "car_ims/000001.jpg")]


def test_missing_image_is_a_fault(root: Path) -> None:
    (root / "car_ims/000005.jpg").unlink()
    listing = Cars(root).listing()
    assert [f.source for f in listing.faults] == ["car_ims/000005.jpg"]
    assert len(listing.items) == 8


def test_later_devkit_is_explained(tmp_path: Path) -> None:
    (tmp_path / "devkit").mkdir()
    (tmp_path / "cars_train").mkdir()
    with pytest.raises(DataError, match=r"cars_annos\.mat, car_ims missing; found cars_train/, devkit/.*not the later"):
        Cars(tmp_path).listing()


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([("../x.jpg", 1)], r"cars_annos\.mat: 1 bad line: line 1: the path '\.\./x\.jpg' leads out"),
        ([("car_ims/1.jpg", 1), ("/x.jpg", 1)], r"line 2: the path '/x\.jpg' leads out"),
        ([("car_ims/1.jpg", 0)], "line 1: class 0 is not one of the 196 class names"),
        ([("car_ims/1.jpg", 197)], "line 1: class 197 is not one of the 196 class names"),
    ],
)
def test_bad_annotations(root: Path, annotations: list[tuple[str, int]], message: str) -> None:
    write_cars_annotations(root / "cars_annos.mat", annotations, car_names())
    with pytest.raises(DataError, match=message):
        Cars(root).listing()


def test_class_name_twice(root: Path) -> None:
    write_cars_annotations(root / "cars_annos.mat", [("car_ims/000001.jpg", 1)], ["Same", "Same"])
    with pytest.raises(DataError, match="class_names holds a name twice"):
        Cars(root).listing()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"something": np.arange(3)}, "got 0 class names and the fields none"),
        (
            {"annotations": np.arange(3), "class_names": np.array(["a"], dtype=object)},
            "got 1 class names and the .* none",
        ),
        (
            {
                "annotations": np.zeros((1, 2), dtype=[("fname", "O"), ("class", "O")]),
                "class_names": np.array(["a"], dtype=object),
            },
            "got 1 class names and the fields fname, class",
        ),
    ],
)
def test_another_mat_file(root: Path, content: dict[str, np.ndarray], message: str) -> None:
    savemat(root / "cars_annos.mat", content)
    with pytest.raises(DataError, match=message):
        Cars(root).listing()


@pytest.mark.parametrize("size", [0, 50, 300])
def test_cut_file(root: Path, size: int) -> None:
    path = root / "cars_annos.mat"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"cars_annos\.mat cannot be read as a MATLAB file"):
        Cars(root).listing()


def test_missing_scipy_names_the_installation(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["scipy", *(m for m in sys.modules if m.startswith("scipy."))]:
        monkeypatch.setitem(sys.modules, name, None)  # makes its import fail
    with pytest.raises(InputError, match=r'needs scipy, .* pip install "gcahng\[cars\]"'):
        Cars(root).listing()
