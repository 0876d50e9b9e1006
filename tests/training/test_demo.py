"""The demonstration, run for real on a few characters: its data set, its two runs, its table, its report."""

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from run_cases import read_metrics, with_overrides

from gcahng.data.shards.manifest import Manifest
from gcahng.data.shards.reader import ShardSet
from gcahng.data.shards.writer import Sample, ShardWriter
from gcahng.errors import ConfigError, DataError, InputError, TrainingError
from gcahng.training import neighbours
from gcahng.training.demo import SYSTEMS, DemoPaths, demo_table, prepare_data, run_demo
from gcahng.training.neighbours import draw_neighbours
from gcahng.training.pictures import Neighbour, Query
from launch import demo as command
from launch.cli import run

ROOT = Path(__file__).parents[2]
CONFIG, TRAIN = ROOT / "configs" / "demo.yaml", ROOT / "launch" / "train.py"
NUM_CLASSES = 16
SEED = 3
TINY = (
    "train.epochs=1",
    "train.max_steps_per_epoch=2",
    "train.log_every=1",
    "train.device=cpu",
    "batch.num_classes=4",
    "eval.ks=[1]",
    "data.num_workers=0",
)
DRAWING = "Drawing 16 characters and writing tar shards to"


def write_set(folder: Path, source: str, extra: dict[str, Any]) -> Path:
    """Two classes of one picture each, said to be of `source`."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    for split in ("train", "test"):
        content = io.BytesIO()
        Image.new("RGB", (32, 32)).save(content, "PNG")
        writer.write(Sample(content.getvalue(), "png", split, split, "drawn"))
    writer.finish(source, 0, extra)
    return folder


@dataclass(frozen=True)
class FinishedDemo:
    """What a demonstration printed and left."""

    paths: DemoPaths
    out: str

    def run_dir(self, system: str) -> Path:
        return self.paths.runs / f"seed-{SEED}" / system

    @property
    def report(self) -> Path:
        return self.paths.runs / f"seed-{SEED}" / "report" / "report.html"


def run_command(paths: DemoPaths, patch: pytest.MonkeyPatch) -> None:
    """`python -m launch.demo` on a few characters."""
    options = ["--seed", SEED, "--data", paths.data, "--runs", paths.runs, "--classes", NUM_CLASSES]
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setattr(sys, "argv", ["demo", *map(str, options), *TINY])
    assert command.main() == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> FinishedDemo:
    """A run where characters of other options lie, below a folder whose name YAML would read otherwise."""
    folder = tmp_path_factory.mktemp("demo") / "no: é, #1"
    paths = DemoPaths(CONFIG, TRAIN, folder / "data", folder / "runs")
    options = {"classes": 2, "size": 32, "min_faces": 2, "test_share": 0.5, "identical": "drop"}
    write_set(paths.data, "glyphs", {"options": options})
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        run_command(paths, patch)
    return FinishedDemo(paths, printed.getvalue())


def table_rows(out: str) -> dict[str, list[float]]:
    """Numbers of each system's line of the table."""
    rows = {}
    for title, _ in SYSTEMS.values():
        (line,) = [line for line in out.splitlines() if re.match(rf"{re.escape(title)}  +\d", line)]
        rows[title] = [float(text) for text in line.removeprefix(title).split()]
    return rows


def test_table_shows_five_columns_of_both_systems(demo: FinishedDemo) -> None:
    (heading,) = [line for line in demo.out.splitlines() if "R@1" in line]
    assert heading.split() == ["R@1", "RP", "MAP@R", "s/iter", "peak", "MiB"]
    rows = table_rows(demo.out)
    for name, (title, _) in SYSTEMS.items():
        written = json.loads((demo.run_dir(name) / "results.json").read_text())
        last = written["last"]
        assert rows[title] == pytest.approx(
            [
                100 * last["recall_at_1"],
                100 * last["r_precision"],
                100 * last["map_at_r"],
                written["seconds_per_step"],
                written["peak_memory_bytes"] / 2**20,
            ],
            abs=0.51,
        )
        assert written["steps"] == 2 and rows[title][3] > 0 and rows[title][4] > 50


def test_columns_stand_under_their_headings() -> None:
    last = {"recall_at_1": 0.5, "r_precision": 0.25, "map_at_r": 0.125}
    result = {"last": last, "seconds_per_step": 0.0625, "peak_memory_bytes": 3 << 20}
    assert demo_table({"gca_hng": result}).splitlines()[1:] == [
        "                                R@1     RP  MAP@R  s/iter  peak MiB",
        "GCA-HNG                       50.00  25.00  12.50   0.062         3",
    ]


def test_runs_differ_in_graph_and_generation_alone(demo: FinishedDemo) -> None:
    def settings(system: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((demo.run_dir(system) / "config.yaml").read_text())
        return found

    baseline, full = settings("baseline"), settings("gca_hng")
    assert baseline["seed"] == full["seed"] == SEED
    assert baseline["data"]["dir"] == str(demo.paths.data)
    enabled = {"graph.enabled": True, "generation.enabled": True, "run.dir": full["run"]["dir"]}
    assert not baseline["graph"]["enabled"] and not baseline["generation"]["enabled"]
    assert with_overrides(baseline, enabled) == full


def test_runs_begin_with_the_same_batch_and_weights(demo: FinishedDemo) -> None:
    """The metric loss of the first step sees images and initial weights, and nothing that differs."""
    first = {name: read_metrics(demo.run_dir(name))[0] for name in SYSTEMS}
    assert first["baseline"]["step"] == first["gca_hng"]["step"] == 1
    assert first["baseline"]["metric_loss"] == first["gca_hng"]["metric_loss"]
    assert "node_loss" in first["gca_hng"] and "node_loss" not in first["baseline"]
    digests = {
        json.loads((demo.run_dir(name) / "last" / "state.json").read_text())["data"]["manifest"] for name in SYSTEMS
    }
    assert digests == {Manifest.load(demo.paths.data).digest()}


def test_it_ends_with_the_report(demo: FinishedDemo) -> None:
    """Every section has something to show of both runs, and the last line names the page."""
    assert demo.out.rstrip().endswith(f"on one page: {demo.report}")
    text = demo.report.read_text(encoding="utf-8")
    names = ["results", "curves", "hardness", "gallery", "map", "classes", "variance"]
    assert re.findall(r'<section id="(.*?)"', text) == names
    assert "Left out:" not in text
    assert re.findall(r'class="card">\s*<h2>(.*?)</h2>', text) == ["baseline", "GCA-HNG"]
    pictures = {path.name for path in (demo.report.parent / "pictures").iterdir()}
    assert len(pictures) > 30 and text.count("<img ") == len(pictures)


def test_data_set_of_other_options_was_replaced(demo: FinishedDemo) -> None:
    assert f"{demo.paths.data} was made with other options and is replaced." in demo.out
    assert f"{DRAWING} {demo.paths.data}" in demo.out
    manifest = Manifest.load(demo.paths.data)
    assert manifest.classes.count == manifest.extra["options"]["classes"] == NUM_CLASSES
    assert manifest.splits["test"]["classes"] == NUM_CLASSES // 2


def test_runs_again_on_the_same_data(
    demo: FinishedDemo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (demo.paths.data / "manifest.json").stat().st_mtime_ns
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = run_demo(demo.paths, SEED, TINY, num_classes=NUM_CLASSES)
    out = capsys.readouterr().out
    assert "characters and writing" not in out
    assert (demo.paths.data / "manifest.json").stat().st_mtime_ns == before
    assert json.loads((demo.run_dir("gca_hng") / "results.json").read_text()) == results["gca_hng"]
    # All but time and memory is the same once more.
    for title, numbers in table_rows(demo.out).items():
        assert table_rows(out)[title][:3] == numbers[:3]


def test_another_data_set_is_not_replaced(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "cub", "folder", {})
    content = (folder / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a data set of source 'folder': expected 'glyphs'.*with --data"):
        prepare_data(folder, NUM_CLASSES)
    assert (folder / "manifest.json").read_bytes() == content


def as_version_1(folder: Path) -> Path:
    """The manifest as the first release wrote it: classes in it, no windows."""
    raw = json.loads((folder / "manifest.json").read_text())
    for name in ("window_bytes", "manifest_sha256"):
        del raw[name]
    raw |= {"version": 1, "classes": [{"class_id": 0, "name": "train", "split": "train", "num_samples": 1}]}
    (folder / "manifest.json").write_text(json.dumps(raw))
    (folder / "classes.jsonl").unlink()
    return folder


def test_characters_of_an_earlier_release_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = as_version_1(write_set(tmp_path / "demo", "glyphs", {}))
    prepare_data(folder, NUM_CLASSES)
    assert f"{folder} was made by an earlier release and is replaced." in capsys.readouterr().out
    assert ShardSet.open(folder, verify=True).manifest.classes.count == NUM_CLASSES
    prepare_data(folder, NUM_CLASSES)
    assert capsys.readouterr().out == ""


def test_another_data_set_of_an_earlier_release_is_not_replaced(tmp_path: Path) -> None:
    folder = as_version_1(write_set(tmp_path / "cub", "folder", {}))
    with pytest.raises(ConfigError, match=r"holds a data set of source 'folder': expected 'glyphs'.*with --data"):
        prepare_data(folder, NUM_CLASSES)
    assert len(list(folder.iterdir())) == 5


def test_characters_of_a_later_release_are_not_replaced(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "demo", "glyphs", {})
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(raw | {"version": 3}))
    with pytest.raises(DataError, match="expected version 2, got 3"):
        prepare_data(folder, NUM_CLASSES)


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="exists and is not a shard folder"):
        prepare_data(tmp_path, NUM_CLASSES)
    assert (tmp_path / "thesis.txt").is_file()


def refused(tmp_path: Path, config: Path = CONFIG, train: Path = TRAIN, overrides: tuple[str, ...] = ()) -> str:
    """The message with which the demonstration refuses; it must have written nothing."""
    with pytest.raises(InputError) as caught:
        run_demo(DemoPaths(config, train, tmp_path / "data", tmp_path / "runs"), 0, overrides)
    assert not list(tmp_path.iterdir())
    return str(caught.value)


def test_refuses_before_it_writes(tmp_path: Path) -> None:
    assert "configuration `none.yaml` is missing: expected a file" in refused(tmp_path, Path("none.yaml"))
    assert "training command `none.py` is missing: expected a file" in refused(tmp_path, train=Path("none.py"))
    assert "`eval.ks` must hold 1" in refused(tmp_path, overrides=("eval.ks=[2]",))
    assert "unknown key; did you mean `train.epochs`" in refused(tmp_path, overrides=("train.epoch=1",))
    message = refused(tmp_path, overrides=("graph.enabled=true", "run.dir=elsewhere", "train.epochs=1"))
    assert "got graph.enabled=true, run.dir=elsewhere. Use --seed, --data and --runs" in message


def test_a_failed_run_is_told(demo: FinishedDemo, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = DemoPaths(CONFIG, TRAIN, demo.paths.data, tmp_path)
    with pytest.raises(TrainingError, match=r"Training into .*seed-0/baseline failed with status 2; its message"):
        run_demo(paths, 0, (*TINY, "batch.num_classes=9"), num_classes=NUM_CLASSES)
    assert "error: `batch.num_classes` must not exceed the training classes" in capfd.readouterr().err


Captured = tuple[list[Query], list[list[Neighbour]]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Captured]:
    """What was given to the picture, which is drawn all the same."""
    calls: list[Captured] = []
    original = neighbours.neighbour_picture

    def record(path: Path, queries: list[Query], ranked: list[list[Neighbour]], title: str) -> Path:
        calls.append((queries, ranked))
        return original(path, queries, ranked, title)

    monkeypatch.setattr(neighbours, "neighbour_picture", record)
    return lambda: calls[-1]


def test_neighbours_are_of_the_test_split_and_marked_by_class(
    demo: FinishedDemo, tmp_path: Path, drawn: Callable[[], Captured]
) -> None:
    checkpoint = demo.run_dir("gca_hng") / "last"
    path = draw_neighbours(checkpoint, tmp_path / "some.png", title="t", num_worst=2, num_typical=1, num_neighbours=3)
    assert path == tmp_path / "some.png" and path.is_file()
    queries, ranked = drawn()
    shards = ShardSet.open(demo.paths.data)
    test_names = {info.name for info in shards.classes if info.split == "test"}
    assert [query.note for query in queries] == ["worst", "worst", "typical"]
    assert [len(row) for row in ranked] == [3, 3, 3]
    for query, row in zip(queries, ranked, strict=True):
        assert query.image.mode == "RGB" and query.image.size == (32, 32)
        assert {query.name} | {item.name for item in row} <= test_names
        assert all(item.is_right == (item.name == query.name) for item in row)
        scores = [item.score for item in row]
        assert scores == sorted(scores, reverse=True) and all(-1.001 <= score <= 1.001 for score in scores)
        assert all(item.image.tobytes() != query.image.tobytes() for item in row)


def test_neighbours_of_a_small_split_are_all_the_others(
    demo: FinishedDemo, tmp_path: Path, drawn: Callable[[], Captured]
) -> None:
    checkpoint = demo.run_dir("baseline") / "last"
    draw_neighbours(checkpoint, tmp_path / "all.png", title="t", num_worst=1, num_typical=0, num_neighbours=500)
    images = Manifest.load(demo.paths.data).splits["test"]["images"]
    assert [len(row) for row in drawn()[1]] == [images - 1]


def test_help_explains_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        run(command.main)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m launch.demo ")
    for option in ("--seed SEED", "--config CONFIG", "--data DATA", "--runs RUNS", "--classes CLASSES"):
        assert re.search(rf"^  {option} +\w.*\(default: .+\)$", out, re.MULTILINE), option
    assert re.search(r"^  section\.key=value +\w", out, re.MULTILINE)


def test_missing_configuration_ends_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", "--config", "none.yaml"])
    with pytest.raises(SystemExit) as ended:
        run(command.main)
    assert ended.value.code == 2
    assert "error: The demonstration's configuration `none.yaml` is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
