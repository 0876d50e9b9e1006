"""The scaling benchmark: a rank's part falls as 1 / W, formulas are held against counts, the page says the same."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_cases import load_benchmark

SIZES = ("9x2-D32-L2-N30-H2", "12x2-D32-L1-N30-H2")
RANKS = (1, 2)
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("scaling")


@pytest.fixture(scope="module")
def counted(benchmark: ModuleType) -> list[Any]:
    """Of real processes."""
    return benchmark.count([benchmark.Size.parse(text) for text in SIZES], RANKS)


def test_rows(
    benchmark: ModuleType, counted: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(benchmark, "count", lambda sizes, ranks: counted)
    target = tmp_path / "rows.json"
    assert benchmark.main(["--sizes", *SIZES, "--ranks", *map(str, RANKS), "--json", str(target)]) == 0
    rows = {row["name"]: row for row in json.loads(target.read_text())}
    assert len(rows) == len(SIZES) * len(RANKS) * 11
    assert "edge rows, 9x2 D32 L2 N30 W2" in capsys.readouterr().out
    for size in ("9x2 D32 L2 N30", "12x2 D32 L1 N30"):
        for what in ("edge rows", "edge buffers", "edge buffers, nothing kept", "edge arithmetic"):
            assert rows[f"{what}, {size} W1"]["ratio"] == pytest.approx(1, rel=0.02)
            # Half of it, but for one block pair more on one of them.
            assert 0.95 <= rows[f"{what}, {size} W2"]["ratio"] <= 1.02, what
        alone, shared = (rows[f"repeated arithmetic, {size} W{ranks}"]["value"] for ranks in RANKS)
        assert alone == shared
        assert rows[f"collectives, {size} W1"]["value"] == rows[f"sent, {size} W1"]["value"] == 0


def test_messages_are_those_of_the_method(counted: list[Any]) -> None:
    one = next(each for each in counted if each.ranks == 2 and each.size.layers == 1)
    batch, dim = 24, 32
    for rank in one.kept:
        assert set(rank.sent) == {"all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"}
        # z, and a flag for each embedding.
        assert (rank.sent["all_gather_into_tensor"].calls, rank.sent["all_gather_into_tensor"].bytes) == (
            2,
            4 * batch * (dim + 1),
        )
        assert rank.sent["reduce_scatter_tensor"].bytes == 4 * batch * dim
        # Messages to nodes both ways in both passes, row means; 2 B scores both ways; statistics of channels.
        nodes, scores, channels = 5 * batch * dim, 2 * 2 * batch, 6 * dim + 6
        assert rank.sent["all_reduce"].bytes == 4 * (nodes + scores + channels)
        assert rank.host.calls > 0


def test_a_count_that_is_not_its_formula_is_an_error(
    benchmark: ModuleType, counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = benchmark.Costs.edge_flop
    monkeypatch.setattr(benchmark.Costs, "edge_flop", lambda self, rows, kept=True: 1.1 * original(self, rows))
    with pytest.raises(benchmark.FormulaError, match="edge arithmetic.*the formula says"):
        counted[0].rows()


def test_the_page_predicts_what_the_formulas_say(benchmark: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    assert benchmark.main(["--predict", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())
    wanted = {row["name"].removeprefix("predicted graph step, "): row for row in rows}
    found = re.findall(r"^\| (\d+x\d+) \| (\d+) \| ([\d,.]+) ms \|.*\| (\d\.\d\d) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(found) == len(wanted)
    for size, ranks, value, ratio in found:
        row = wanted[f"{size} D512 L1 N11318 W{ranks}"]
        assert float(value.replace(",", "")) == pytest.approx(row["value"], rel=0.006)
        assert float(ratio) == pytest.approx(row["ratio"], abs=0.006)


def test_what_cannot_be_counted_is_refused(benchmark: ModuleType, capsys: Any) -> None:
    for arguments in (["--ranks", "0"], ["--sizes", "2x2-D4-L1-N9", "--ranks", "3"]):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
    assert "a rank holds whole classes" in capsys.readouterr().err
