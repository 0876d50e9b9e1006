"""Specs of tables: what they say, and every fault of one with its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gcahng.errors import ConfigError
from gcahng.tables.spec import find_table, read_table

ROWS: list[dict[str, Any]] = [{"name": "A"}, {"name": "B", "overrides": {"graph.enabled": False, "loss.metric": "x"}}]
SPEC: dict[str, Any] = {"title": "T", "config": "a.yaml", "data_sets": ["d"], "metrics": ["R@1"], "rows": ROWS}


def write(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes))
    return path


def test_defaults_and_order(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, {}))
    assert (table.name, table.which, table.metrics) == ("spec", "best_test", {"d": ("R@1",)})
    first, second = table.rows
    assert first.seeds == (0, 1, 2) and first.data_sets == ("d",) and first.runs
    assert first.method is None, "no paper, so nothing is looked up"
    assert second.part.overrides == ("graph.enabled=false", 'loss.metric="x"')


def test_labels_and_shared_parts(tmp_path: Path) -> None:
    rows = [
        {"name": "A", "model": "M", "loss": "L", "seeds": [4], "scale": {"generation.beta": "1/4"}},
        {"name": "A", "model": "N", "loss": "L", "run": False, "published": {"d": [1.5]}},
    ]
    models = {"M": {"title": "Big", "config": "m.yaml", "for_data_set": {"d": ["seed_key=1"]}}, "N": None}
    table = read_table(write(tmp_path, {"rows": rows, "models": models, "losses": {"L": {}}, "paper": "p"}))
    first, second = table.rows
    assert (first.label, second.label) == ("A (Big, L)", "A (N, L)")
    assert first.seeds == (4,) and first.part.scale == {"generation.beta": 0.25}
    assert table.models["M"].for_data_set == {"d": ("seed_key=1",)}
    assert (first.method, first.values) == ("A", {}) and second.values == {"d": ("1.5",)}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"titel": "x"}, "titel: unknown key; known here: title, "),
        ({"title": None}, "title: required and missing."),
        ({"rows": []}, "rows: required and missing."),
        ({"rows": ["A"]}, "rows: must be a list of mappings"),
        ({"which": "first"}, "which: must be one of best_test, last, best: got 'first'."),
        ({"metrics": ["R@0"]}, "metrics: must be a list of R@k, P@k, RP, MAP@R, MRR, "),
        ({"metrics": {"e": ["RP"]}}, "metrics.e: must be given for the data sets d."),
        ({"seeds": [0, 0]}, "seeds: must be a list of different numbers from 0 on: got [0, 0]."),
        ({"data_sets": "d"}, "data_sets: must be a list of different names: got 'd'."),
        ({"config": None}, "rows[1].config: required and missing"),
        ({"rows": [{"name": "A"}, {"name": "A"}]}, "rows: `A` stands 2 times; name, model and loss tell rows apart."),
        ({"rows": [{"name": "A", "data_sets": ["e"]}]}, "rows[1].data_sets: `e` is none of the table's: d."),
        ({"rows": [{"name": "A", "overrides": ["seed=1"]}]}, "rows[1].overrides: seed, run.dir, train.resume are"),
        ({"rows": [{"name": "A", "overrides": "x=1"}]}, "rows[1].overrides: must be a list of section.key=value"),
        ({"rows": [{"name": "A", "scale": {"x": "1/0"}}]}, "rows[1].scale: must be a mapping of settings to factors"),
        ({"rows": [{"name": "A", "run": "no"}]}, "rows[1].run: must be true or false: got 'no'."),
        ({"rows": [{"name": "A", "published": "B"}]}, "rows[1].published: names a published row, but the table has no"),
        ({"rows": [{"name": "A", "published": {"d": [1, 2]}}]}, "rows[1].published: must be `none`, a row's name, or"),
        ({"rows": [{"name": "A", "for_data_set": {"e": []}}]}, "rows[1].for_data_set: `e` is none of the table's data"),
        ({"models": {"M": {"weights": 1}}}, "models.M.weights: unknown key; known here: title, config, overrides, "),
        ({"models": {"M": {}}, "rows": [{"name": "A", "model": "N"}]}, "rows[1].model: `N` is none of the table's"),
    ],
)  # fmt: skip
def test_each_fault_is_named_with_its_place(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    path = write(tmp_path, changes)
    with pytest.raises(ConfigError) as error:
        read_table(path)
    assert str(error.value).startswith(f"Table `{path}` has ")
    assert f"\n  {fault}" in str(error.value)


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 3 faults"):
        read_table(write(tmp_path, {"which": "x", "seeds": 3, "rows": [{"nam": "A", "name": "A"}]}))


def test_tables_are_found_by_name_number_and_path(tmp_path: Path) -> None:
    (tmp_path / "table3.yaml").write_text("")
    assert find_table("3", tmp_path) == find_table("table3", tmp_path) == tmp_path / "table3.yaml"
    assert find_table("own/x.yaml", tmp_path) == Path("own/x.yaml")
    with pytest.raises(ConfigError, match="no table `4`: expected one of table3, or the path of a YAML file"):
        find_table("4", tmp_path)
