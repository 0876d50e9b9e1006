"""The results table: published numbers found by configuration, seeds grouped, means and spreads."""

import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_cases import base_settings, with_overrides

from gcahng.report import results_table
from gcahng.report.facts import DataFacts, method_name
from gcahng.report.results_table import (
    Setting,
    architecture,
    group_runs,
    losses,
    mean_and_spread,
    paper_results,
    published,
    results_section,
)
from gcahng.report.run_data import RunData
from gcahng.training.config import Config, config_from_mapping, load_config

ROOT = Path(__file__).parents[2]
VALUE = re.compile(r"\d\d\.\d±\d\.\d|\d\d\.\d\d±\d\.\d\d|collapse")


def configuration(**overrides: Any) -> Config:
    keys = {name.replace("__", "."): value for name, value in overrides.items()}
    return config_from_mapping(with_overrides(base_settings(Path("data/none"), Path("runs/none")), keys))


def finished(name: str, recall: float, *, best: float | None = None, config: Config | None = None) -> RunData:
    """A run that was evaluated after epochs 1 and 2, as its log and results tell."""
    config = config or configuration(seed=len(name), run__dir=f"runs/{name}")
    recalls = [recall - 0.05 if best is None else best, recall]
    rows = [
        {"kind": "evaluation", "step": 5 * e, "epoch": e, "split": "test", "recall_at_1": r, "recall_at_10": 0.99,
         "r_precision": r / 2, "map_at_r": r / 4, "num_queries": 9, "num_without_reference": 0}
        for e, r in enumerate(recalls, 1)
    ]  # fmt: skip
    results = {"last": rows[1], "best_test": max(rows, key=lambda row: row["recall_at_1"]), "steps": 10}
    return RunData(Path(f"runs/{name}"), name, config, rows, [], results)


def texts(markup: str) -> list[list[str]]:
    """Cells of a table's rows."""
    rows = re.findall(r"<tr.*?</tr>", markup, re.DOTALL)
    return [[" ".join(cell.split()) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def test_data_file_is_whole() -> None:
    data = paper_results()
    assert {table["source"] for table in data["tables"]} == set(data["sources"])
    known = {name for names in data["losses"].values() for name in names}
    for table in data["tables"]:
        seen = set()
        for method, model, loss, *values in table["rows"]:
            assert model in data["architectures"] and loss in known
            assert len(values) == len(table["columns"])
            for value in values:
                assert value is None or (isinstance(value, float) and 0 < value < 100) or VALUE.fullmatch(value)
            seen.add((method, model, loss))
        assert len(seen) == len(table["rows"]), table
    for paper in data["sources"].values():
        assert paper["url"].startswith("https://") and paper["title"]


def test_published_gains_are_gains() -> None:
    """GCA-HNG is above its baseline wherever both stand, as the paper says: a row in the wrong place would show."""
    for table in paper_results()["tables"]:
        if table["source"] != "gca_hng" or table["table"] not in ("1", "2"):
            continue
        names = ("N-pair", "N-pair+", "Proxy Anchor")
        baselines = {row[1] + row[2]: row for row in table["rows"] if row[0] in names}
        ours = {row[1] + row[2]: row for row in table["rows"] if row[0] == "GCA-HNG"}
        assert ours.keys() == baselines.keys()
        for key, row in ours.items():
            for better, worse in zip(row[3:], baselines[key][3:], strict=True):
                assert float(better.split("±")[0]) > float(worse.split("±")[0])


CONFIGS = {
    "cub_resnet50": ("cub", "R512", "70.3 ± 0.3"),
    "cars_googlenet": ("cars", "G512", "84.1 ± 0.3"),
    "sop_dino": ("sop", "DN384", "85.5 ± 0.1"),
    "inshop_resnet50": ("inshop", "R512", "91.7 ± 0.1"),
    "inshop_googlenet": ("inshop", "G512", "88.6 ± 0.1"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_papers_configurations_find_their_rows(name: str) -> None:
    source, model, recall = CONFIGS[name]
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert architecture(config) == model
    found = published(Setting.of(config, DataFacts(source, "")))
    (ours,) = [row for row in found if row.method == "GCA-HNG" and row.loss != "NP"]
    assert ours.values["R@1"] == recall
    assert ours.source == f"GCA-HNG paper, Table {1 if source in ('cub', 'cars') else 2}"


def test_every_configuration_of_the_project_finds_both_losses() -> None:
    """Twelve configurations, each with N-pair+ as it stands and with Proxy-Anchor."""
    sources = [(path, path.stem.partition("_")[0]) for path in sorted((ROOT / "configs").glob("*.yaml"))]
    of_the_paper = [(path, source) for path, source in sources if source in ("cub", "cars", "sop", "inshop")]
    assert len(of_the_paper) == 12
    for path, source in of_the_paper:
        config = load_config(path)
        for loss in ("n_pair_plus", "proxy_anchor"):
            setting = Setting.of(replace(config, loss=replace(config.loss, metric=loss)), DataFacts(source, ""))
            assert "GCA-HNG" in [row.method for row in published(setting)], (path.stem, loss)


def test_other_settings_match_nothing() -> None:
    path = ROOT / "configs" / "cub_resnet50.yaml"
    cub = DataFacts("cub", "")
    assert architecture(load_config(path, ["model.embedding_dim=128"])) is None
    assert architecture(load_config(path, ["model.pooling=max"])) is None
    assert architecture(load_config(path, ["model.pooling=avg", "model.embedding_dim=64"])) == "R64avg"
    assert architecture(load_config(path, ["model.backbone=resnet50"])) == "R512"
    assert architecture(load_config(path, ["model.backbone=resnet18.tv_in1k"])) is None
    assert published(Setting.of(load_config(path), DataFacts("glyphs", ""))) == []
    assert published(Setting.of(load_config(path), DataFacts(None, "gone"))) == []
    assert "NP" not in losses(load_config(path)) and "NP" in losses(load_config(path, ["batch.num_samples=2"]))
    own = Setting.of(load_config(path, ["loss.metric=torch.nn:CosineEmbeddingLoss"]), cub)
    assert own.losses == () and published(own) == [] and own.title.endswith(", CosineEmbeddingLoss")


def test_published_rows_stand_below_ours_with_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_table, "data_facts", lambda run: DataFacts("cub", ""))
    config = load_config(ROOT / "configs" / "cub_resnet50.yaml", ["run.dir=runs/a"])
    section = results_section([finished("a", 0.7, config=config), finished("b", 0.6)])
    with_papers, alone, source = (str(part) for part in section.parts)
    head, ours, *theirs = texts(with_papers)
    assert head == ["Method", "R@1", "R@2", "R@10", "RP", "MAP@R", "Where from"]
    assert ours[:3] == ["GCA-HNG", "70.00", "\u2013"]
    assert ["GCA-HNG (NP+)", "70.3 ± 0.3", "80.6 ± 0.3", "\u2013", "39.4 ± 0.2", "28.4 ± 0.3"] in [
        r[:6] for r in theirs
    ]
    assert {row[-1] for row in theirs} == {f"GCA-HNG paper, Table {n}" for n in (1, 3, 6, 8)}
    assert with_papers.count('class="own"') == 1
    assert len(texts(alone)) == 2 and "none of this backbone, pooling and embedding size on this data set" in alone
    assert "IJCV 133(5), 2025. https://doi.org/10.1007/s11263-024-02288-0" in source


def test_runs_of_several_seeds_are_one_row() -> None:
    runs = [finished("a", 0.70), finished("bb", 0.72, best=0.80), finished("ccc", 0.77)]
    assert [len(group) for group in group_runs(runs)] == [3]
    section = results_section(runs)
    head, last, best = texts(str(section.parts[0]))
    assert head == ["Method", "R@1", "R@10", "RP", "MAP@R", "Where from"]
    spread = statistics.stdev([70.0, 72.0, 77.0])
    assert last[:2] == ["GCA-HNG", f"73.00 ± {spread:.2f}"]
    assert last[3] == f"36.50 ± {spread / 2:.2f}"
    assert last[-1] == "3 runs (a, bb, ccc): last, epoch 2"
    assert best[1] == f"75.67 ± {statistics.stdev([70.0, 80.0, 77.0]):.2f}"
    assert best[-1] == "3 runs (a, bb, ccc): best by test R@1, epochs 2, 1, 2"
    assert "sample standard deviation" in section.intro


def test_another_setting_is_another_row() -> None:
    runs = [finished("a", 0.7), finished("b", 0.8, config=configuration(seed=4, generation__alpha=1.0))]
    assert [len(group) for group in group_runs(runs)] == [1, 1]
    section = results_section(runs)
    rows = texts(str(section.parts[0]))
    assert [row[1] for row in rows[1:]] == ["70.00", "80.00"]
    assert [row[-1] for row in rows[1:]] == [f"{name}: last and best by test R@1, epoch 2" for name in "ab"]
    assert "standard deviation" not in section.intro
    assert "it is not known which it is" in str(section.parts[0])


def test_unfinished_runs_say_so() -> None:
    run = finished("a", 0.7, config=configuration(train__epochs=9))
    begun = replace(run, results=None)
    (cells,) = texts(str(results_section([begun]).parts[0]))[1:]
    assert cells[-1] == "a: last and best by test R@1, epoch 2 of 9, unfinished"
    (cells,) = texts(str(results_section([replace(begun, rows=[])]).parts[0]))[1:]
    assert cells == ["GCA-HNG", "a: not evaluated yet"]
    other = replace(run, name="b", rows=[], results=None)
    (cells,) = texts(str(results_section([run, other]).parts[0]))[1:]
    assert cells[1] == "70.00" and cells[-1].endswith("epoch 2; not evaluated yet: b")


def test_a_measure_that_is_no_number_is_shown_as_such() -> None:
    run = finished("a", 0.7)
    run.rows[-1]["map_at_r"] = "nan"
    rows = texts(str(results_section([replace(run, results=None)]).parts[0]))
    assert rows[1][-2] == "nan"


def test_mean_and_spread() -> None:
    assert mean_and_spread([70.126]) == "70.13"
    assert mean_and_spread([1.0, 3.0]) == "2.00 ± 1.41"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({}, "GCA-HNG"),
        ({"graph__enabled": False, "generation__enabled": False}, "Metric loss alone"),
        ({"generation__enabled": False}, "Metric loss and graph network"),
        (
            {"graph__enabled": False, "generation__coefficients": "single"},
            "Single coefficient interpolation",
        ),
        (
            {"graph__enabled": False, "generation__coefficients": "single", "generation__method": "generator"},
            "Generator-based negatives",
        ),
        (
            {"generation__coefficients": "single", "generation__method": "generator"},
            "Generator-based negatives and graph network",
        ),
        ({"graph__node_propagation": False}, "GCA-HNG without global correlations"),
        ({"graph__edge_to_node": False}, "GCA-HNG without edge to node"),
        ({"generation__fusion": "pick"}, "GCA-HNG without random weighting"),
        ({"generation__weights__similarity": 0.0}, "GCA-HNG without similarity loss"),
    ],
)
def test_method_is_named(overrides: dict[str, Any], name: str) -> None:
    assert method_name(configuration(**overrides)) == name
