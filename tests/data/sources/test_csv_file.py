"""Source `csv`: names of columns, marks of query and gallery, paths, and lines that cannot be used."""

import csv
from pathlib import Path

import pytest
from official_layouts import put

from gcahng.data.conversion.convert import convert
from gcahng.data.sources.csv_file import CsvFile
from gcahng.errors import DataError, InputError

TABLE = """\
path,class,split,colour,note
a/1.jpg,owl,train,red,"one, two"
a/2.jpg,owl,train,,
b/3.png,gull,test,blue,x
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path / "a/1.jpg", 1)
    put(tmp_path / "a/2.jpg", 2)
    put(tmp_path / "b/3.png", 3, form="PNG")
    (tmp_path / "images.csv").write_text(TABLE)
    return tmp_path


def rows(root: Path, text: str | None = None, **options: object) -> list[tuple[str, str, str]]:
    if text is not None:
        (root / "images.csv").write_text(text)
    listing = CsvFile(root / "images.csv", **options).listing()  # type: ignore[arg-type]
    assert not listing.faults
    return [(i.source, i.class_name, i.split) for i in listing.items]


ROWS = [("a/1.jpg", "owl", "train"), ("a/2.jpg", "owl", "train"), ("b/3.png", "gull", "test")]


def test_rows_and_further_columns(root: Path) -> None:
    assert rows(root) == ROWS
    source = CsvFile(root / "images.csv")
    items = source.listing().items
    assert [dict(i.columns) for i in items] == [
        {"colour": "red", "note": "one, two"},
        {},
        {"colour": "blue", "note": "x"},
    ]
    assert source.load(items[2]) == (root / "b/3.png").read_bytes()


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_byte_order_mark_and_line_ends(root: Path, prefix: bytes, line_end: bytes) -> None:
    (root / "images.csv").write_bytes(prefix + TABLE.encode().replace(b"\n", line_end))
    assert rows(root) == ROWS


def test_delimiter(root: Path) -> None:
    assert rows(root, "path;class;split\na/1.jpg;owl, snowy;train\n", delimiter=";") == [
        ("a/1.jpg", "owl, snowy", "train")
    ]


def test_columns_by_name(root: Path) -> None:
    text = "file,who,path,half\na/1.jpg,owl,elsewhere,train\n"
    assert rows(root, text, columns={"path": "file", "class": "who", "split": "half"}) == ROWS[:1]
    assert CsvFile(root / "images.csv", columns={"path": "file", "class": "who", "split": "half"}).listing().items[
        0
    ].columns == {"path": "elsewhere"}


def test_index_column_without_name_is_left_out(root: Path) -> None:
    assert rows(root, ",path,class,split\n0,a/1.jpg,owl,train\n") == ROWS[:1]
    assert CsvFile(root / "images.csv").listing().items[0].columns == {}


def test_table_of_open_metric_learning(root: Path) -> None:
    """Columns label, is_query, is_gallery; marks as pandas writes them, absolute paths, split validation."""
    text = "label,path,split,is_query,is_gallery,x_1\n"
    for i, (split, query, gallery) in enumerate(
        [
            ("train", "", ""),
            ("validation", "True", "False"),
            ("validation", "False", "True"),
            ("validation", "1.0", "1.0"),
        ]
    ):
        put(root / f"{i}.jpg", i)
        text += f"{i},{root}/{i}.jpg,{split},{query},{gallery},5\n"
    assert rows(root, text, splits={"validation": "test"}) == [
        ("0.jpg", "0", "train"),
        ("1.jpg", "1", "query"),
        ("2.jpg", "2", "gallery"),
        ("3.jpg", "3", "test"),
    ]


@pytest.mark.parametrize(
    ("split", "query", "gallery", "result"),
    [
        ("test", "", "", "test"),
        ("test", "1", "1", "test"),
        ("test", "1", "0", "query"),
        ("test", "True", "", "query"),
        ("test", "", "true", "gallery"),
        ("test", "0", "1", "gallery"),
        ("test", "0", "0", None),
        ("test", "0", "", None),
        ("test", "maybe", "", None),
        ("train", "", "", "train"),
        ("train", "0", "0", "train"),
        ("train", "1", "", None),
        ("train", "", "1", None),
        ("query", "", "", "query"),
        ("query", "1", "0", "query"),
        ("query", "1", "1", None),
        ("gallery", "0", "1", "gallery"),
        ("gallery", "1", "", None),
    ],
)
def test_marks(root: Path, split: str, query: str, gallery: str, result: str | None) -> None:
    text = f"path,class,split,query,gallery\na/1.jpg,owl,{split},{query},{gallery}\n"
    if result is None:
        with pytest.raises(DataError, match=f"line 2: split {split} does not go with query '{query}'"):
            rows(root, text)
    else:
        assert rows(root, text) == [("a/1.jpg", "owl", result)]


def test_folder_of_images(root: Path) -> None:
    (root / "tables").mkdir()
    (root / "images.csv").rename(root / "tables/images.csv")
    listing = CsvFile(root / "tables/images.csv", images=root).listing()
    assert [i.source for i in listing.items] == ["a/1.jpg", "a/2.jpg", "b/3.png"]


def test_paths_stay_inside_of_the_folder_of_images(root: Path) -> None:
    text = f"path,class,split\n{root}/a/1.jpg,owl,train\nb/../a/2.jpg,owl,train\n"
    assert rows(root, text) == ROWS[:2]
    for bad in ("../other/1.jpg", "/etc/1.jpg", f"{root}2/1.jpg", "a\0b"):
        with pytest.raises(DataError, match=r"line 2: '.*' is not inside of .* \(see --images\)"):
            rows(root, f"path,class,split\n{bad},owl,train\n")
    absolute = f"path,class,split\n{root}/a/1.jpg,owl,train\n"
    assert rows(root, absolute, images="/") == [(f"{root}/a/1.jpg"[1:], "owl", "train")]


def test_missing_and_repeated_files_are_faults(root: Path, tmp_path: Path) -> None:
    with (root / "images.csv").open("a") as file:
        file.write("c/9.jpg,owl,train,,\na/../a/1.jpg,gull,test,,\n")
    with pytest.raises(DataError, match=r"c/9\.jpg: there is no such file\. Check the path and --images"):
        convert(CsvFile(root / "images.csv"), tmp_path / "out")
    manifest = convert(CsvFile(root / "images.csv"), tmp_path / "out", on_error="skip")
    assert [entry["source"] for entry in manifest.extra["skipped"]] == ["c/9.jpg", "a/1.jpg"]
    assert "listed twice" in manifest.extra["skipped"][1]["reason"]
    assert manifest.num_samples == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a/1.jpg,,train,,", "line 5: the class is empty"),
        (" ,owl,train,,", "line 5: the path is empty"),
        ("a/1.jpg,owl,val,,", r"line 5: expected the split train, test, query, gallery, got 'val' \(see --split\)"),
        ("a/1.jpg,owl,train", "line 5: expected 5 fields, got 3"),
    ],
)
def test_bad_lines(root: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows(root, TABLE + line + "\n")


def test_first_bad_lines_are_listed_together(root: Path) -> None:
    with pytest.raises(DataError, match="7 bad lines: line 5: .*; line 9: .*; and 2 more. Correct these lines"):
        rows(root, TABLE + "a/1.jpg,,train,,\n" * 7)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "path,name,split",
            r"column class or label is missing; got path, name, split\. Name the columns with --column",
        ),
        ("path;class;split", "column path, class or label, split is missing; got path;class;split"),
        ("path,class,split,path", "path comes twice; got path, class, split, path"),
        ("", "column path, class or label, split is missing; got an empty file"),
    ],
)
def test_bad_headers(root: Path, header: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows(root, header)


def test_named_column_must_be_there(root: Path) -> None:
    with pytest.raises(DataError, match="column is_query is missing"):
        rows(root, columns={"query": "is_query"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delimiter": "ab"}, "`delimiter` must be one character, got 'ab'"),
        ({"columns": {"label": "x"}}, "`columns` must name path, class, split, query, gallery, got 'label'"),
        ({"splits": {"val": "dev"}}, "`splits` must lead to train, test, query, gallery, got 'dev'"),
    ],
)
def test_options_out_of_range(root: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CsvFile(root / "images.csv", **options)  # type: ignore[arg-type]


def test_files_that_are_no_csv(root: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv cannot be read \(No such file"):
        CsvFile(root / "nowhere.csv").listing()
    (root / "images.csv").write_bytes(b"path,class,split\n\xff\n")
    with pytest.raises(DataError, match=r"images\.csv is not text in UTF-8"):
        rows(root)
    with pytest.raises(DataError, match=r"images\.csv, line 2: .*Check quotes"):
        rows(root, 'path,class,split\n"a" b,c,train\n')
    assert csv.field_size_limit() == 131072
    with pytest.raises(DataError, match=r"line 2: field larger than field limit"):
        rows(root, "path,class,split\n" + "a" * 200_000 + ",c,train\n")


@pytest.mark.parametrize("ending", ["  \n", ",,\n,,\n", " , ,\n\n"])
def test_lines_without_content_are_no_rows(root: Path, ending: str) -> None:
    text = "path,class,split\na/1.jpg,owl,train\n"
    assert rows(root, text + ending) == rows(root, text)
