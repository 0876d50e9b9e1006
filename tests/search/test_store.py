"""Index folders: what was written comes back, in bounded memory, and what is wrong is refused."""

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from store_files import rows_of, vectors, write_index

from gcahng.data.tars.labels import label_ids
from gcahng.errors import DataError, InputError
from gcahng.search.store import EmbeddingStore, StoredRow
from gcahng.training.saved_embeddings import NamedEmbeddings, save_embeddings

SIZES = (5, 4, 2)
ALL = np.concatenate([vectors(size, 3, part) for part, size in enumerate(SIZES)])


@pytest.mark.parametrize("layout", ["npy", "parquet"])
def test_what_was_written_comes_back(tmp_path: Path, layout: str) -> None:
    write_index(tmp_path / "index", SIZES, 3, layout)
    store = EmbeddingStore.open(tmp_path / "index", verify=True)
    assert len(store) == store.count == 11 and store.dim == 3
    assert np.array_equal(store.embeddings().numpy(), ALL)
    assert np.array_equal(store.embeddings(3, 10).numpy(), ALL[3:10])  # over two borders of parts
    assert store.embeddings(4, 4).shape == (0, 3)
    blocks = list(store.blocks(block_bytes=4 * 3 * 4))
    assert [start for start, _ in blocks] == [0, 4, 8]
    assert torch.equal(torch.cat([block for _, block in blocks]), torch.from_numpy(ALL))
    want = rows_of(11)
    assert store.labels().tolist() == [row.label for row in want]
    assert [store.row(i) for i in range(11)] == [StoredRow(*row, f"name of {row.label}") for row in want]


def test_named_classes_are_numbered_as_everywhere(tmp_path: Path) -> None:
    write_index(tmp_path / "index", SIZES, 3, kind="name in field 'class' of .json")
    store = EmbeddingStore.open(tmp_path / "index")
    names = [store.row(i).class_name for i in range(11)]
    assert names[0] == "class 999" and names[-1] == "class 996"
    assert store.labels().tolist() == label_ids(names)[0].tolist() == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0]


def test_npy_is_what_other_tools_read(tmp_path: Path) -> None:
    write_index(tmp_path / "index", SIZES, 3)
    assert np.array_equal(np.load(tmp_path / "index" / "embeddings.npy"), ALL)
    assert np.load(tmp_path / "index" / "labels.npy").tolist() == [row.label for row in rows_of(11)]
    lines = [json.loads(line) for line in (tmp_path / "index" / "rows.jsonl").read_text().splitlines()]
    assert lines[10] == {"key": "000000010", "shard": "shard-1.tar", "label": 3, "class_name": "name of 3"}


def test_parquet_is_what_other_tools_read(tmp_path: Path) -> None:
    import pyarrow.parquet

    write_index(tmp_path / "index", SIZES, 3, "parquet")
    file = pyarrow.parquet.ParquetFile(tmp_path / "index" / "embeddings.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == list(SIZES)
    table = file.read()
    assert table.column_names == ["key", "shard", "label", "class_name", "embedding"]
    assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype=np.float32), ALL)
    # The file alone, wherever it was moved.
    store = EmbeddingStore.open(tmp_path / "index" / "embeddings.parquet")
    assert store.info is None and torch.equal(store.embeddings(), torch.from_numpy(ALL))


def test_saved_embeddings_are_a_store(tmp_path: Path) -> None:
    named = NamedEmbeddings(torch.from_numpy(ALL), torch.arange(11) // 2, [str(i) for i in range(11)], ["a.tar"] * 11)
    save_embeddings(tmp_path / "e.npz", named, None, "class {}".format)
    store = EmbeddingStore.open(tmp_path / "e.npz")
    assert torch.equal(store.embeddings(), torch.from_numpy(ALL)) and store.labels().tolist() == named.labels.tolist()
    assert store.row(5) == StoredRow("5", "a.tar", 2, "class 2")
    assert torch.equal(torch.cat([block for _, block in store.blocks(24)]), torch.from_numpy(ALL))


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def resized(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and let index.json say its new size, as somebody would who means harm."""
    (folder / name).write_bytes(content)
    edited(folder, lambda raw: raw["files"][name].update(bytes=len(content)))


def edited(folder: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads((folder / "index.json").read_text())
    change(raw)
    (folder / "index.json").write_text(json.dumps(raw))


class Harmful:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('unpickled')",)


def header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index.json": (lambda f: (f / "index.json").unlink(), "got a folder without index.json"),
    "no JSON": (lambda f: (f / "index.json").write_text("{"), "is not readable JSON"),
    "deep JSON": (lambda f: (f / "index.json").write_text("[" * 100_000), "is not readable JSON"),
    "a list": (lambda f: (f / "index.json").write_text("[]"), "expected a JSON object, got list"),
    "version": (lambda f: edited(f, lambda r: r.update(version=2)), "expected format 'gcahng-index', version 1"),
    "layout": (lambda f: edited(f, lambda r: r.update(layout="../x")), "`layout` must be one of npy, parquet"),
    "count": (lambda f: edited(f, lambda r: r.update(count=True)), "`count` must be a whole number"),
    "many": (lambda f: edited(f, lambda r: r.update(count=1 << 60)), "`count` must be a whole number"),
    "fewer": (lambda f: edited(f, lambda r: r.update(count=10)), "expected 10 x 3, got 11 x 3"),
    "channels": (lambda f: edited(f, lambda r: r.update(dim=0)), "`dim` must be a whole number"),
    "path": (lambda f: edited(f, lambda r: r["files"].update({"../x": {}})), "`files` must list embeddings.npy"),
    "origin": (lambda f: edited(f, lambda r: r["made_with"].pop("data")), "`made_with` must hold"),
    "cut": (lambda f: (f / "embeddings.npy").write_bytes(b"x"), "embeddings.npy is damaged: expected 260 bytes"),
    "absent": (lambda f: (f / "labels.npy").unlink(), "labels.npy is missing"),
    "pickle": (
        lambda f: resized(f, "embeddings.npy", npy(np.array([Harmful()], dtype=object), allow_pickle=True)),
        "no array that can be mapped",
    ),
    "bare pickle": (lambda f: resized(f, "labels.npy", pickle.dumps(Harmful())), "no array that can be mapped"),
    "huge": (lambda f: resized(f, "embeddings.npy", header((1 << 50, 3)) + b"0" * 99), "no array that can be mapped"),
    "too short": (lambda f: resized(f, "embeddings.npy", npy(ALL)[:-4]), "no array that can be mapped"),
    "type": (lambda f: resized(f, "embeddings.npy", npy(ALL.astype("<f8"))), "expected <f4 in 2 dimensions"),
    "order": (lambda f: resized(f, "embeddings.npy", npy(np.asfortranarray(ALL))), "expected rows one after another"),
    "labels": (lambda f: resized(f, "labels.npy", npy(np.zeros(10, "<i8"))), "labels.npy: expected 11 entries, got 10"),
    "offsets": (lambda f: resized(f, "row_offsets.npy", npy(np.zeros(12, "<i8"))), "does not fit rows.jsonl"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_refused(tmp_path: Path, name: str) -> None:
    write_index(tmp_path / "index", SIZES, 3)
    damage, message = DAMAGE[name]
    damage(tmp_path / "index")
    with pytest.raises(DataError) as error:
        EmbeddingStore.open(tmp_path / "index")
    assert message in str(error.value), str(error.value)


def test_checksums_on_request(tmp_path: Path) -> None:
    write_index(tmp_path / "index", SIZES, 3)
    content = bytearray((tmp_path / "index" / "embeddings.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "index" / "embeddings.npy").write_bytes(content)
    EmbeddingStore.open(tmp_path / "index")
    with pytest.raises(DataError, match=r"embeddings\.npy is damaged: expected sha256 [0-9a-f]{64}, got"):
        EmbeddingStore.open(tmp_path / "index", verify=True)


def test_damaged_rows_are_found_when_they_are_read(tmp_path: Path) -> None:
    write_index(tmp_path / "index", SIZES, 3)
    rows = tmp_path / "index" / "rows.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    for number, wrong in enumerate([b'{"key": 1', b'"label": 7', b'["shard']):
        lines[number] = wrong.ljust(len(lines[number]) - 1) + b"\n"
    lines[3] = lines[3].replace(b'"label": 1', b'"label": 2')
    rows.write_bytes(b"".join(lines))
    store = EmbeddingStore.open(tmp_path / "index")
    for number in range(4):
        with pytest.raises(DataError, match=rf"row {number} is damaged: got b'"):
            store.row(number)
    assert store.row(4).key == "000000004"
    offsets = np.load(tmp_path / "index" / "row_offsets.npy")
    offsets[5] = -1
    np.save(tmp_path / "index" / "row_offsets.npy", offsets)
    with pytest.raises(DataError, match="row 5 cannot lie at bytes -1 to"):
        EmbeddingStore.open(tmp_path / "index").row(5)


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    write_index(tmp_path / "index", SIZES, 3)
    store = EmbeddingStore.open(tmp_path / "index")
    for index in (-1, 11):
        with pytest.raises(InputError, match=f"Row {index} is not among 11"):
            store.row(index)
    with pytest.raises(InputError, match="Rows 3 to 12 are not among 11"):
        store.embeddings(3, 12)


def test_parquet_of_texts_that_are_none(tmp_path: Path) -> None:
    """Arrow itself would hand them out, and Python fail at them."""
    import pyarrow
    import pyarrow.parquet

    key, text = pyarrow.array(["ab"]), pyarrow.array(["x"])
    damaged = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, key.buffers()[1], pyarrow.py_buffer(b"\x80b")])
    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array([1.0, 2.0], pyarrow.float32()), 2)
    for keys in (key, damaged):
        columns = {"key": keys, "shard": text, "label": pyarrow.array([0]), "class_name": text, "embedding": vectors}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        store = EmbeddingStore.open(tmp_path / "a.parquet")
        if keys is key:
            assert store.row(0).key == "ab"
        else:
            with pytest.raises(DataError, match=r"row group 0 is damaged .*UTF8"):
                store.row(0)


def test_wrong_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "e.parquet"
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="is no readable parquet file"):
        EmbeddingStore.open(path)
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"], "embedding": [[1.0]]}), path)
    with pytest.raises(DataError, match="expected columns key, shard, class_name"):
        EmbeddingStore.open(path)
    vector = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array([1.0, None], pyarrow.float32()), 2)
    columns = {"key": ["a"], "shard": [None], "label": [1], "class_name": ["c"], "embedding": vector}
    kinds = {"shard": pyarrow.string()}
    table = pyarrow.table({n: pyarrow.array(v, kinds.get(n)) if n in kinds else v for n, v in columns.items()})
    pyarrow.parquet.write_table(table, path)
    store = EmbeddingStore.open(path)
    with pytest.raises(DataError, match="row group 0 has empty entries"):
        store.row(0)
    with pytest.raises(DataError, match="row group 0 has embeddings with gaps"):
        store.embeddings()


def test_wrong_npz(tmp_path: Path) -> None:
    path = tmp_path / "e.npz"
    whole = {name: np.array(["a", "b"]) for name in ("keys", "shards", "class_names")}
    whole |= {"embeddings": ALL[:2], "labels": np.arange(2), "class_ids": np.arange(2)}
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: path.write_bytes(b"no zip"), "cannot be read"),
        (lambda: np.savez_compressed(path, **whole), "is compressed"),
        (lambda: np.savez(path, embeddings=ALL), "lacks labels, keys, shards, class_ids, class_names"),
        (lambda: np.savez(path, **whole | {"keys": np.array([Harmful()] * 2, dtype=object)}), "cannot be read"),
        (lambda: np.savez(path, **whole | {"labels": np.arange(3)}), "`labels` must have 2 entries, got 3"),
        (lambda: np.savez(path, **whole | {"labels": np.ones(2)}), "`labels` must have kind 'i' and 1 dimensions"),
        (lambda: np.savez(path, **whole | {"embeddings": ALL[:0]}), "`embeddings` must have kind 'f' and 2 dim"),
        (lambda: np.savez(path, **whole | {"class_ids": np.arange(1)}), "must be equally many"),
    ]
    for write, message in cases:
        write()
        with pytest.raises(DataError) as error:
            EmbeddingStore.open(path)
        assert message in str(error.value)


def test_what_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    for path, found in ((tmp_path / "a.txt", "another file"), (tmp_path / "none", "nothing there")):
        with pytest.raises(DataError, match=f"holds no embeddings: expected an index folder, .* got {found}"):
            EmbeddingStore.open(path)


@pytest.mark.parametrize("layout", ["npy", "parquet"])
def test_memory_is_bounded_by_parts_and_blocks(tmp_path: Path, layout: str) -> None:
    """48 MiB in parts of 1.5 MiB are put together, and read in blocks of 2 MiB, in less than half of their size."""
    # A process of its own: memory that others have freed would serve again, unseen.
    command = [sys.executable, str(Path(__file__).parents[1] / "store_memory.py"), str(tmp_path), layout]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0, found.stderr
    peaks = json.loads(found.stdout)
    if "unseen" in peaks:
        pytest.skip(f"the largest resident set cannot be set back here ({peaks['unseen']})")
    assert peaks["size"] == 48 << 20
    assert peaks["written"] < peaks["size"] // 2
    assert peaks["read"] < peaks["size"] // 2
    assert peaks["whole"] > peaks["size"] * 0.9, "the measure would not see a whole store"
