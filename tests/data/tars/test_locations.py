"""What a user may type for a list of tars."""

import gzip
import os
import re
from pathlib import Path

import pytest
from tar_cases import write_tar

from gcahng.data.tars.locations import TarPlace, find_tars
from gcahng.errors import DataError, InputError

NAMES = ["test-000.tar", "test-001.tar", "test-010.tar", "train-000.tar"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for name in NAMES:
        write_tar(folder / name, {})
    return folder


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ("test-{000..001}.tar", NAMES[:2]),
        ("test-{010,000}.tar", [NAMES[2], NAMES[0]]),
        ("test-*.tar", NAMES[:3]),
        ("test-00[01].tar", NAMES[:2]),
        ("t*-00?.tar", [*NAMES[:2], NAMES[3]]),
        ("{train,test}-*.tar", [NAMES[3], *NAMES[:3]]),
        ("test-001.tar", [NAMES[1]]),
    ],
)
def test_braces_and_globs(folder: Path, pattern: str, want: list[str]) -> None:
    for location in (f"{folder}/{pattern}", folder / pattern, [f"{folder}/{pattern}"], f"file://{folder}/{pattern}"):
        places = find_tars(location)
        assert [place.name for place in places] == want
        assert {place.folder for place in places} == {str(folder)}
        assert [place.location for place in places] == [f"{folder}/{name}" for name in want]


def test_several_locations_keep_their_order(folder: Path) -> None:
    assert [p.name for p in find_tars([folder / NAMES[3], f"{folder}/test-*.tar"])] == [NAMES[3], *NAMES[:3]]


def test_a_path_relative_to_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_tars("test-00*.tar") == [TarPlace(".", name, name) for name in NAMES[:2]]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    for name in ("a[1].tar", "b{1,2}.tar", "c*.tar"):
        assert [p.name for p in find_tars(write_tar(tmp_path / name, {}))] == [name]


@pytest.mark.parametrize(
    ("url", "want"),
    [
        (
            "https://h/d/t-{0..1}.tar",
            [TarPlace("https://h/d", f"t-{i}.tar", f"https://h/d/t-{i}.tar") for i in range(2)],
        ),
        ("http://u:p@h:1/a%20b/c%20d.tar?key=x/y", [TarPlace("http://u:p@h:1/a%20b?key=x/y", "c d.tar", "")]),
        ("s3://bucket/p/a.tar", [TarPlace("s3://bucket/p", "a.tar", "s3://bucket/p/a.tar")]),
    ],
)
def test_urls(url: str, want: list[TarPlace]) -> None:
    places = find_tars(url)
    assert [(place.folder, place.name) for place in places] == [(place.folder, place.name) for place in want]
    if want[0].location:
        assert places == want
    else:
        assert not re.search("u:p|x/y", places[0].location)


def test_the_store_of_a_url_asks_for_that_url() -> None:
    from gcahng.data.stores.urls import WebFolder

    (place,) = find_tars("https://h/a%20b/c%20d.tar?key=x%2Fy")
    assert WebFolder.parse(place.folder).file(place.name) == "https://h/a%20b/c%20d.tar?key=x%2Fy"


@pytest.mark.parametrize(
    ("location", "kind", "message"),
    [
        ("pipe:cat a.tar", InputError, "'pipe:cat a.tar' is a command: expected a path or URL. Commands"),
        ("DIR/test-{000..001.tar", InputError, "has unbalanced braces"),
        ("DIR/{0..100000}.tar", InputError, "means more than 100000 tars"),
        ("https://h/test-*.tar", InputError, "is a pattern of URLs, which cannot be listed. Use braces"),
        ("DIR/none-*.tar", DataError, "No file matches 'DIR/none-*.tar'"),
        ("DIR/none.tar", DataError, "Tar DIR/none.tar does not exist (in "),
        ("DIR", DataError, "DIR is a folder: expected tars. Give a pattern in quotes: 'DIR/*.tar'."),
        ("DIR/a.tar.gz", DataError, "Tar DIR/a.tar.gz is compressed: expected a plain tar. Decompress it first."),
        ("DIR/a.TGZ", DataError, "is compressed"),
        ("https://h/a.tar.zst?x=y", DataError, "https://h/a.tar.zst?*** is compressed"),
        ([], InputError, "No tars were given"),
        (
            ["DIR/test-000.tar", "DIR/test-*.tar"],
            DataError,
            "Tar DIR/test-000.tar comes twice (also as DIR/test-000.tar)",
        ),
        (["DIR/../tars/test-000.tar", "DIR/test-000.tar"], DataError, "comes twice (also as DIR/../tars/test-000.tar)"),
    ],
)
def test_what_is_no_list_of_tars(folder: Path, location, kind: type[Exception], message: str) -> None:
    (folder / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    given = (
        location.replace("DIR", str(folder))
        if isinstance(location, str)
        else [part.replace("DIR", str(folder)) for part in location]
    )
    with pytest.raises(kind) as caught:
        find_tars(given)
    assert message.replace("DIR", str(folder)) in str(caught.value)


def test_a_link_is_the_tar_that_it_points_to(folder: Path) -> None:
    os.symlink(folder / "test-000.tar", folder / "other.tar")
    with pytest.raises(DataError, match="comes twice"):
        find_tars([folder / "other.tar", folder / "test-000.tar"])
