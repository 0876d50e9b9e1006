"""The demonstration, run for real on a few characters: its data set, its two runs, its table, its report."""

import io
import json
import re
import sys
from collections.abc import Iterator
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
from gcahng.data.sources import glyphs
from gcahng.data.sources.glyph_fonts import matplotlib_fonts
from gcahng.errors import ConfigError, DataError, InputError, TrainingError
from gcahng.training.demo import SYSTEMS, DemoPaths, demo_table, prepare_data, run_demo
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


@pytest.fixture(scope="module", autouse=True)
def few_fonts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Characters are drawn in matplotlib's smallest faces: reading all of them takes seconds."""
    folder = tmp_path_factory.mktemp("fonts")
    for face in ("cmb10", "cmmi10", "cmr10", "cmss10", "cmtt10"):
        (folder / f"{face}.ttf").symlink_to(matplotlib_fonts() / f"{face}.ttf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "matplotlib_fonts", lambda: folder)
        yield


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
    """A run where characters of other options and a run of another time lie.

    The folder's name would be read otherwise by YAML.
    """
    folder = tmp_path_factory.mktemp("demo") / "no: é, #1"
    paths = DemoPaths(CONFIG, TRAIN, folder / "data", folder / "runs")
    options = {"classes": 2, "size": 32, "min_faces": 2, "test_share": 0.5, "identical": "drop"}
    write_set(paths.data, "glyphs", {"options": options})
    earlier = paths.runs / f"seed-{SEED}" / "baseline"
    (earlier / "step-9").mkdir(parents=True)
    (earlier / "last").symlink_to("step-9")
    (earlier / "metrics.jsonl").write_text('{"kind": "step", "step": 9, "epoch": 4}\n')
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


def test_data_set_of_the_same_options_is_kept(demo: FinishedDemo, capsys: pytest.CaptureFixture[str]) -> None:
    before = (demo.paths.data / "manifest.json").stat().st_mtime_ns
    prepare_data(demo.paths.data, NUM_CLASSES)
    assert capsys.readouterr().out == ""
    assert (demo.paths.data / "manifest.json").stat().st_mtime_ns == before


def test_an_earlier_run_was_replaced(demo: FinishedDemo) -> None:
    rows = read_metrics(demo.run_dir("baseline"))
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2]
    assert demo.run_dir("baseline").joinpath("last").resolve().name == "step-2"


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
    fails = tmp_path / "fails.py"
    fails.write_text("import sys\nprint('error: no', file=sys.stderr)\nsys.exit(2)\n")
    paths = DemoPaths(CONFIG, fails, demo.paths.data, tmp_path)
    with pytest.raises(TrainingError, match=r"Training into .*seed-0/baseline failed with status 2; its message"):
        run_demo(paths, 0, TINY, num_classes=NUM_CLASSES)
    assert "error: no" in capfd.readouterr().err


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
