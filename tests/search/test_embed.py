"""Embedding into an index: the embeddings of evaluation, the same bytes however it was done, clear refusals."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from launched_here import launched_here
from rank_group import run_ranks
from run_cases import ALONE
from shard_cases import write_indexes
from tar_cases import write_tar

from gcahng.data.shards.reader import ShardSet
from gcahng.data.stores.file_lock import locked
from gcahng.distributed import Ranks
from gcahng.errors import ConfigError, DataError, InputError
from gcahng.search import unfinished
from gcahng.search.embed import embed_checkpoint
from gcahng.search.image_parts import Job, ShardParts, share_of_jobs
from gcahng.search.part_files import PartFiles
from gcahng.search.store import EmbeddingStore
from gcahng.search.unfinished import IndexTarget
from gcahng.training.embedding import embed_rows
from gcahng.training.evaluate_checkpoint import embedding_settings, load_metric_model

REPOSITORY = Path(__file__).parents[2]
SWEEP = Path(__file__).with_name("killed_embeddings.py")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def embed(trained: Any, out: Path, *overrides: str, layout: str = "npy", **options: Any) -> EmbeddingStore:
    """Parts of 14 images: two batches of 7."""
    of_target = {name: options.pop(name) for name in ("normalised", "overwrite") if name in options}
    target = IndexTarget(out, layout, part_images=10, **of_target)
    info = embed_checkpoint(trained.checkpoint, target, ALONE, overrides, **options)
    assert info is not None and not target.partial.exists()
    return EmbeddingStore.open(out, verify=True)


@pytest.fixture(scope="module")
def whole(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of the test split; never written to."""
    out = tmp_path_factory.mktemp("whole") / "index"
    embed(trained, out)
    return out


@pytest.fixture(scope="module")
def tars(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test split as three plain tars of 20, 0 and 28 images, classes by name."""
    folder = tmp_path_factory.mktemp("tars")
    shards = ShardSet.open(trained.shards)
    rows = shards.split_samples("test").tolist()
    for number, part in enumerate((rows[:20], [], rows[20:])):
        files: dict[str, bytes] = {} if part else {"README": b"no sample"}
        for row in part:
            files[f"{shards.key(row)}.json"] = json.dumps({"class": shards.meta(row)["class_name"]}).encode()
            files[f"{shards.key(row)}.png"] = shards.read(row)
        write_tar(folder / f"{number}.tar", files)
    return folder


@pytest.mark.parametrize("layout", ["npy", "parquet"])
def test_embeddings_are_those_of_evaluation(trained: Any, tmp_path: Path, layout: str) -> None:
    store = embed(trained, tmp_path / "index", layout=layout)
    model, config = load_metric_model(trained.checkpoint)
    shards = ShardSet.open(trained.shards)
    rows = shards.split_samples("test")
    want, labels = embed_rows(model, shards, rows, embedding_settings(config))
    assert torch.equal(store.embeddings(), want) and torch.equal(store.labels(), labels)
    for place, row in enumerate(rows.tolist()):
        name = shards.classes[int(labels[place])].name
        assert store.row(place) == (shards.key(row), shards.shard_name(row), int(labels[place]), name)
    assert store.info is not None and store.info.data["manifest"] == shards.manifest.digest()


def test_another_split_of_length_1(trained: Any, tmp_path: Path, whole: Path) -> None:
    store = embed(trained, tmp_path / "index", split="train", normalised=True)
    assert store.embeddings().norm(dim=1).tolist() == pytest.approx([1.0] * 48, abs=1e-6)
    assert store.info is not None and store.info.normalised and store.row(0).class_name != ""
    assert set(store.labels().tolist()).isdisjoint(EmbeddingStore.open(whole).labels().tolist())


def test_workers_and_part_sizes_change_no_embedding(trained: Any, tmp_path: Path, whole: Path) -> None:
    assert contents(embed(trained, tmp_path / "workers", "data.num_workers=2").path) == contents(whole)
    target = IndexTarget(tmp_path / "parts", part_images=21)
    embed_checkpoint(trained.checkpoint, target, ALONE)
    assert (target.folder / "embeddings.npy").read_bytes() == (whole / "embeddings.npy").read_bytes()


def test_tars_give_the_embeddings_of_the_folder(trained: Any, tmp_path: Path, whole: Path, tars: Path) -> None:
    store = embed(trained, tmp_path / "index", "eval.batch_size=5", tars=[f"{tars}/*.tar"])
    folder = EmbeddingStore.open(whole)
    # Batches end with their tar, and other batch sizes may round otherwise.
    torch.testing.assert_close(store.embeddings(), folder.embeddings(), rtol=1e-5, atol=1e-6)
    rows = [store.row(i) for i in range(48)]
    assert [(row.key, row.class_name) for row in rows] == [
        (row.key, row.class_name) for row in map(folder.row, range(48))
    ]
    assert [row.shard for row in rows] == [f"{tars}/0.tar"] * 20 + [f"{tars}/2.tar"] * 28
    names = sorted({row.class_name for row in rows})
    assert [names[row.label] for row in rows] == [row.class_name for row in rows]
    bare = embed(trained, tmp_path / "bare", "data.num_workers=2", tars=[f"{tars}/0.tar"], labelled=False)
    assert bare.labels().tolist() == [0] * 20 and bare.row(3) == (rows[3].key, f"{tars}/0.tar", 0, "")


def test_tars_without_images_or_with_two_kinds_of_labels(trained: Any, tmp_path: Path, tars: Path) -> None:
    with pytest.raises(DataError, match="There is no image to embed"):
        embed(trained, tmp_path / "none", tars=[tars / "1.tar"])
    image = ShardSet.open(trained.shards).read(0)
    write_tar(tmp_path / "number.tar", {"a.png": image, "a.cls": b"7"})
    with pytest.raises(DataError, match=r"has a number in \.cls, others have a name in field 'class' of \.json"):
        embed(trained, tmp_path / "kinds", tars=[tars / "0.tar", tmp_path / "number.tar"])
    write_tar(tmp_path / "bad.tar", {"a.png": image[:40], "a.cls": b"7"})
    with pytest.raises(DataError, match=r"bad\.tar: the image of sample 'a' (cannot be decoded|is no image)"):
        embed(trained, tmp_path / "bad", "data.num_workers=1", tars=[tmp_path / "bad.tar"])


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: hundreds of small files are forced to disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_killed_at_any_moment_it_continues_to_the_same_bytes(fast_folder: Path, trained: Any, tars: Path) -> None:
    common = ["--checkpoint", str(trained.checkpoint.resolve()), "--quiet", "--part-images", "10"]
    cases = [
        {"arguments": common, "old": [], "stride": 5},
        {
            "arguments": [*common, "--tars", f"{tars}/*.tar", "--format", "parquet"],
            "old": [*common, "--normalise"],
            "stride": 9,
        },
    ]
    done = subprocess.run(
        [sys.executable, SWEEP, fast_folder, json.dumps(cases)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for result in json.loads(done.stdout):
        assert result["problems"] == []
        assert result["moments"] >= 18, "an index has fewer file operations than it must have"
        assert result["continued"] >= 1, "no killed run had left parts"


def embedded_by(ranks: Ranks, trained: Any, out: Path, tars: Path) -> list[str]:
    """On one of several ranks: an index of the split, one of tars, and two refusals."""
    launched = launched_here(ranks)
    target = IndexTarget(out / "split", part_images=10)
    info = embed_checkpoint(trained.checkpoint, target, launched)
    assert (info is not None) == ranks.first
    target = IndexTarget(out / "tars", "parquet", part_images=10)
    embed_checkpoint(trained.checkpoint, target, launched, tars=[f"{tars}/*.tar"])
    said = []
    for arguments in ({"overrides": ["eval.batch_size=6"]}, {"tars": [tars / "0.tar", tars.parent / "bad.tar"]}):
        ranks.wait()  # the folders of rank 0 are whole
        folder = out / ("split" if "overrides" in arguments else "bad")
        with pytest.raises(InputError) as error:
            embed_checkpoint(trained.checkpoint, IndexTarget(folder), launched, **arguments)
        said.append(str(error.value))
    return said


def test_two_ranks_write_the_bytes_of_one(trained: Any, tmp_path: Path, whole: Path, tars: Path) -> None:
    image = ShardSet.open(trained.shards).read(0)
    write_tar(tars.parent / "bad.tar", {"a.png": image[:40], "a.json": b'{"class": "x"}'})
    said = run_ranks(2, embedded_by, trained, tmp_path, tars)
    assert contents(tmp_path / "split") == contents(whole)
    one = embed(trained, tmp_path / "one", layout="parquet", tars=[f"{tars}/*.tar"])
    assert contents(tmp_path / "tars") == contents(one.path)
    for other_settings, bad_image in said:
        assert "batch_size was 7, now 6" in other_settings
        assert "bad.tar: the image of sample 'a'" in bad_image
    assert said[0][1].startswith("rank 1: ")


def test_parts_are_dealt_evenly_and_joined() -> None:
    jobs = [Job(0, part, part + 1) for part in range(100) if part not in (7, 40)]
    for size in (1, 2, 3, 5):
        shares = [share_of_jobs(jobs, rank, size) for rank in range(size)]
        parts = [[part for job in share for part in range(job.start, job.stop or 0)] for share in shares]
        assert [part for share in parts for part in share] == [job.start for job in jobs]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert max((job.stop or 0) - job.start for share in shares for job in share) == 16
    tar_jobs = [Job(unit, 0, None) for unit in range(3)]
    assert [share_of_jobs(tar_jobs, rank, 2) for rank in range(2)] == [tar_jobs[:2], tar_jobs[2:]]


def test_rows_of_a_split_without_listing_them(tmp_path: Path) -> None:
    sizes = [("train", 5), ("test", 3), ("test", 4), ("train", 2), ("test", 1)]
    write_indexes(tmp_path / "shards", [(split, [split == "test"] * size) for split, size in sizes], 2)
    shards = ShardSet.open(tmp_path / "shards")
    for split in ("train", "test"):
        parts = ShardParts(shards, split, "somewhere")
        want = shards.split_samples(split).tolist()
        assert parts.count == len(want) in (7, 8)
        for start in range(len(want)):
            for stop in range(start, len(want) + 1):
                assert parts.rows(start, stop).tolist() == want[start:stop]


def half_done(
    trained: Any, target: IndexTarget, monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int] = (0, 2), **options: Any
) -> None:
    """A run that failed before a part: unit and number."""
    write = PartFiles.write

    def failing(self: PartFiles, unit: int, part: int, *rest: Any) -> None:
        if (unit, part) == stop:
            raise DataError("no more")
        write(self, unit, part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PartFiles, "write", failing)
        with pytest.raises(DataError, match="no more"):
            embed_checkpoint(trained.checkpoint, target, ALONE, **options)
    assert sorted(path.name for path in target.partial.iterdir()) == ["lock", "parts", "progress.json"]


def test_it_continues_in_the_middle_of_a_tar(
    trained: Any, tmp_path: Path, tars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = embed(trained, tmp_path / "one", tars=[f"{tars}/*.tar"])
    target = IndexTarget(tmp_path / "index", part_images=10)
    half_done(trained, target, monkeypatch, (2, 1), tars=[f"{tars}/*.tar"])
    parts = sorted(path.name for path in (target.partial / "parts").iterdir())
    assert parts == [f"part-{unit:06d}-{part:08d}" for unit, part in ((0, 0), (0, 1), (1, 0), (2, 0))]
    embed_checkpoint(trained.checkpoint, target, ALONE, tars=[f"{tars}/*.tar"])
    assert contents(target.folder) == contents(one.path)


def test_a_damaged_part_is_embedded_again(
    trained: Any, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = IndexTarget(tmp_path / "index", part_images=10)
    half_done(trained, target, monkeypatch)
    part = target.partial / "parts" / "part-000000-00000000"
    content = part.read_bytes()
    part.write_bytes(content[:-3])
    embed_checkpoint(trained.checkpoint, target, ALONE)
    assert contents(target.folder) == contents(whole)
    # Of the right size with other bytes: found when it is put together.
    shutil.rmtree(target.folder)
    half_done(trained, target, monkeypatch)
    part.write_bytes(content.replace(b"shard-", b"chard-"))
    with pytest.raises(DataError, match="part-000000-00000000 is damaged .its checksum differs.* Remove it and start"):
        embed_checkpoint(trained.checkpoint, target, ALONE)
    part.unlink()
    embed_checkpoint(trained.checkpoint, target, ALONE)
    assert contents(target.folder) == contents(whole)


def test_another_origin_is_refused_or_replaced(
    trained: Any, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = IndexTarget(tmp_path / "index", part_images=10)
    half_done(trained, target, monkeypatch)
    wrong: list[tuple[Callable[[IndexTarget], object], str]] = [
        (lambda t: embed_checkpoint(trained.checkpoint, t, ALONE, split="train"), "data.split was 'test', now 'train'"),
        (lambda t: embed_checkpoint(trained.checkpoint, t, ALONE, ["eval.batch_size=5"]), "batch_size was 7, now 5"),
        (
            lambda t: embed_checkpoint(trained.checkpoint, t, ALONE, ["data.transform.eval_resize=18"]),
            "transform.eval_resize was 16, now 18",
        ),
    ]
    for action, message in wrong:
        with pytest.raises(ConfigError) as error:
            action(target)
        assert f"{target.partial} was begun with another checkpoint, data or settings" in str(error.value)
        assert message in str(error.value) and "--overwrite" in str(error.value)
    # The same weights at another place are the same checkpoint.
    moved = shutil.copytree(trained.checkpoint, tmp_path / "moved")
    embed_checkpoint(moved, target, ALONE)
    assert (target.folder / "index.json").read_bytes() == (whole / "index.json").read_bytes()
    for action, message in wrong:
        with pytest.raises(ConfigError, match="holds an index with another checkpoint, data or settings: .*" + message):
            action(target)
    with pytest.raises(ConfigError, match="format was 'npy', now 'parquet'; normalised was False, now True"):
        embed_checkpoint(trained.checkpoint, IndexTarget(target.folder, "parquet", True, False, 10), ALONE)
    assert embed(trained, target.folder, split="train", overwrite=True).info.data["split"] == "train"  # type: ignore[union-attr]


def test_an_index_that_is_whole_is_left_as_it_is(trained: Any, tmp_path: Path, whole: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "index")
    (tmp_path / "index.partial").mkdir()  # of a run that was killed at its very end
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    embed(trained, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_one_process_writes_at_a_time(trained: Any, tmp_path: Path) -> None:
    target = IndexTarget(tmp_path / "index")
    target.partial.mkdir()
    with locked(target.partial / "lock"), pytest.raises(ConfigError, match="Another process is writing"):
        embed_checkpoint(trained.checkpoint, target, ALONE)


def test_what_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").touch()
    (tmp_path / "file").touch()
    cases = [
        (IndexTarget(tmp_path / "none" / "index"), "the folder .*none does not exist"),
        (IndexTarget(tmp_path / "folder", overwrite=True), "exists and is no index: it is not replaced"),
        (IndexTarget(tmp_path / "file", overwrite=True), "exists and is no index"),
        (IndexTarget(Path(".")), "`--out` .: expected the name of a folder"),
        (IndexTarget(tmp_path / ".."), "expected the name of a folder"),
        (IndexTarget(tmp_path / "index", "csv"), "`--format` must be one of npy, parquet, got 'csv'"),
        (IndexTarget(tmp_path / "index", part_images=0), "`--part-images` must be at least 1"),
    ]
    for target, message in cases:
        with pytest.raises(ConfigError, match=message):
            embed_checkpoint(tmp_path / "no checkpoint", target, ALONE)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'gcahng\[search\]'"):
        embed_checkpoint(tmp_path / "no checkpoint", IndexTarget(tmp_path / "index", "parquet"), ALONE)


def test_a_disk_without_room(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 20_000

    monkeypatch.setattr(unfinished.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ConfigError, match="48 embeddings of 8 channels need about 0 MiB .* 0 MiB are free"):
        embed_checkpoint(trained.checkpoint, IndexTarget(tmp_path / "index"), ALONE)
    assert not (tmp_path / "index").exists()
    Usage.free = 30_000
    embed_checkpoint(trained.checkpoint, IndexTarget(tmp_path / "index"), ALONE)
