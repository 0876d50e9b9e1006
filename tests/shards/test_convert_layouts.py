"""`python -m shards.convert`: a miniature of every official layout, converted by the real command line."""

import subprocess
import sys
from pathlib import Path

import pytest
from official_layouts import Expected, put, write_cars, write_cub, write_hotels, write_inshop, write_sop

from gcahng.data.shards.reader import ShardSet

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shards.convert", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def check(out: Path, expected: Expected, source: str) -> ShardSet:
    """Every image once, with its class, split and unchanged bytes; the tables of the shards agree with them."""
    shards = ShardSet.open(out, verify=True)
    assert shards.manifest.source == source
    assert shards.manifest.splits == expected.splits()
    assert sorted(shards.source(row) for row in range(len(shards))) == sorted(expected.items)
    class_ids = shards.class_ids()
    for row in range(len(shards)):
        name = shards.source(row)
        meta = shards.meta(row)
        assert (meta["class_name"], meta["split"]) == expected.items[name]
        assert shards.classes[int(class_ids[row])].name == meta["class_name"]
        assert shards.read(row) == expected.files[name].read_bytes()
    for split in expected.splits():
        names = {shards.source(row) for row in shards.split_samples(split)}
        assert names == {name for name, own in expected.items.items() if own[1] == split}
    return shards


def columns(shards: ShardSet) -> dict[str, dict[str, str]]:
    return {info.name: dict(info.columns) for info in shards.classes}


def test_cub(tmp_path: Path) -> None:
    expected = write_cub(tmp_path / "CUB_200_2011", {1: 5, 2: 3, 100: 4, 101: 4, 200: 6})
    out = tmp_path / "out"
    done = run("cub", "--source", tmp_path, "--out", out, "--allow-mismatch", "--workers", "2", "--shard-bytes", "8K")
    assert done.returncode == 0, done.stderr
    shards = check(out, expected, "cub")
    assert len(shards.manifest.shards) > 2
    assert columns(shards)["101.Bird_101"] == {}
    assert "train: 3 classes, 12 images" in done.stdout
    assert "test: 2 classes, 10 images" in done.stdout
    assert "NOT as published" in done.stdout
    assert "5864" in done.stdout and "-5852" in done.stdout


def test_cars(tmp_path: Path) -> None:
    expected = write_cars(tmp_path / "cars", {1: 3, 98: 2, 99: 2, 196: 4})
    done = run("cars", "--source", tmp_path / "cars", "--out", tmp_path / "out", "--allow-mismatch", "--workers", "1")
    assert done.returncode == 0, done.stderr
    shards = check(tmp_path / "out", expected, "cars")
    assert "Ram C/V Cargo Van Minivan 2012" in columns(shards)


def test_sop(tmp_path: Path) -> None:
    expected = write_sop(tmp_path / "sop", {1: 3, 2: 4}, {3: 2, 4: 2, 6: 3})
    done = run("sop", "--source", tmp_path / "sop", "--out", tmp_path / "out", "--allow-mismatch", "--workers", "1")
    assert done.returncode == 0, done.stderr
    shards = check(tmp_path / "out", expected, "sop")
    assert columns(shards)["1"] == {"super_class_id": "1", "super_class": "bicycle"}
    assert columns(shards)["6"] == {"super_class_id": "2", "super_class": "cabinet"}


def test_inshop(tmp_path: Path) -> None:
    expected = write_inshop(tmp_path / "inshop/Img/img", tmp_path / "inshop/Eval", train=4, test=3)
    done = run(
        "inshop", "--source", tmp_path / "inshop", "--out", tmp_path / "out", "--allow-mismatch", "--workers", "1"
    )
    assert done.returncode == 0, done.stderr
    shards = check(tmp_path / "out", expected, "inshop")
    assert columns(shards)["id_00000001"] == {"category": "WOMEN/Dresses"}
    query, gallery = (shards.split_samples(split) for split in ("query", "gallery"))
    assert set(shards.class_ids(query)) == set(shards.class_ids(gallery))
    assert not set(shards.class_ids(query)) & set(shards.class_ids(shards.split_samples("train")))
    for split in ("train", "query", "gallery"):
        assert f"{split}: {expected.splits()[split]['classes']} classes" in done.stdout


def test_hotel50k(tmp_path: Path) -> None:
    """Test hotels are training hotels with the same class ids; no counts are published to compare with."""
    expected = write_hotels(tmp_path / "hotels", {1: 3, 2: 2, 3: 2, 4: 1}, {1: 2, 4: 1})
    done = run("hotel50k", "--source", tmp_path / "hotels", "--out", tmp_path / "out", "--workers", "1")
    assert done.returncode == 0, done.stderr
    shards = check(tmp_path / "out", expected, "hotel50k")
    train, test = (shards.split_samples(split) for split in ("train", "test"))
    assert set(shards.class_ids(test)) < set(shards.class_ids(train))
    assert not {shards.source(r) for r in test} & {shards.source(r) for r in train}
    assert columns(shards)["1"]["chain_name"] == "Seven, and Sons"
    assert {shards.meta(row)["columns"]["image_source"] for row in test} == {"traffickcam"}
    assert "listed: train 4 classes / 8 images, test 2 classes / 3 images" in done.stdout


def test_hotel50k_without_some_downloads(tmp_path: Path) -> None:
    expected = write_hotels(tmp_path / "hotels", {1: 3, 2: 2}, {1: 2, 2: 1})
    gone = "images/train/7/1/traffickcam/1001.jpg"
    expected.files[gone].unlink()
    arguments = ("hotel50k", "--source", tmp_path / "hotels", "--out", tmp_path / "out", "--workers", "1")
    done = run(*arguments)
    assert done.returncode == 2
    assert f"error: Cannot convert {gone}: there is no such file." in done.stderr
    assert not (tmp_path / "out").exists()

    done = run(*arguments, "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    del expected.items[gone]
    check(tmp_path / "out", expected, "hotel50k")
    assert "skipped: 1" in done.stdout
    assert f"  {gone}: there is no such file." in done.stdout


def test_csv(tmp_path: Path) -> None:
    expected = Expected()
    lines = ["file|who|part|light\n"]
    for i, (name, part, split) in enumerate(
        [("owl", "train", "train"), ("owl", "train", "train"), ("gull", "dev", "test"), ("crow", "query", "query")]
    ):
        path = put(tmp_path / "images" / f"{i}.jpg", i)
        lines.append(f"{i}.jpg|{name}|{part}|{'dusk' if i else ''}\n")
        expected.add(f"{i}.jpg", name, split, path)
    (tmp_path / "table.csv").write_text("".join(lines), encoding="utf-8-sig")
    done = run(
        *("csv", "--source", tmp_path / "table.csv", "--images", tmp_path / "images", "--delimiter", "|"),
        *("--column", "path=file", "--column", "class=who", "--column", "split=part", "--split", "dev=test"),
        *("--out", tmp_path / "out", "--workers", "1"),
    )
    assert done.returncode == 0, done.stderr
    shards = check(tmp_path / "out", expected, "csv")
    lights = {shards.source(row): shards.meta(row).get("columns") for row in range(len(shards))}
    assert lights == {"0.jpg": None, "1.jpg": {"light": "dusk"}, "2.jpg": {"light": "dusk"}, "3.jpg": {"light": "dusk"}}
    assert "protocol" not in done.stdout


def test_folder_with_query_and_gallery(tmp_path: Path) -> None:
    expected = Expected()
    for i, (split, name) in enumerate([("train", "owl"), ("query", "gull"), ("gallery", "gull"), ("gallery", "crow")]):
        source = f"{split}/{name}/{i}.jpg"
        expected.add(source, name, split, put(tmp_path / "photos" / source, i))
    done = run("folder", "--source", tmp_path / "photos", "--out", tmp_path / "out", "--workers", "1")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out", expected, "folder")


@pytest.mark.parametrize("kind", ["cub", "cars", "sop", "inshop", "hotel50k"])
def test_same_bytes_again(kind: str, tmp_path: Path) -> None:
    """Two conversions of one source are equal, whatever the folder is called and however many processes work."""
    from shards.convert import main

    for name in ("one", "another"):
        root = tmp_path / name
        if kind == "cub":
            write_cub(root, {1: 3, 150: 3})
        elif kind == "cars":
            write_cars(root, {1: 3, 150: 3})
        elif kind == "sop":
            write_sop(root, {1: 3}, {2: 3})
        elif kind == "inshop":
            write_inshop(root / "img", root)
        else:
            write_hotels(root, {1: 3, 2: 2}, {2: 1})
        options = ["--source", str(root), "--out", str(root) + "_out", "--workers", "1", "--quiet", "--allow-mismatch"]
        assert main([kind, *options]) == 0
    first, second = (tmp_path / f"{name}_out" for name in ("one", "another"))
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
