"""The benchmark of retrieval metrics runs small, compares equal results first, and says what it scaled."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_cases import load_benchmark

from gcahng.metrics import retrieval

SMALL = ["--items", "600", "--dim", "16", "--queries", "150", "--repeats", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    pytest.importorskip("faiss")
    pytest.importorskip("pytorch_metric_learning")
    return load_benchmark("retrieval")


def read(path: Path) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads(path.read_text())}


def test_rows_of_a_small_set(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Peaks are measured in this process: each other one takes seconds to start.
    monkeypatch.setattr(benchmark, "measure", benchmark.peak_here)
    target = tmp_path / "rows.json"
    assert benchmark.main([*SMALL, "--json", str(target)]) == 0
    rows = read(target)
    default = benchmark.label("default", "cpu")
    assert set(rows) == {
        *(f"ours {ours} time, cpu 600x16" for ours in (default, "fp32")),
        *(
            f"{arm} time, against {ours}, cpu 600x16"
            for arm in ("pytorch-metric-learning", "released", "floor")
            for ours in (default, "fp32")
        ),
        *(
            f"{arm} peak memory, cpu 600x16"
            for arm in (f"ours {default}", "ours fp32", "pytorch-metric-learning", "released")
        ),
    }
    for ours in (default, "fp32"):
        own = rows[f"ours {ours} time, cpu 600x16"]["value"]
        for arm in ("pytorch-metric-learning", "released"):
            row = rows[f"{arm} time, against {ours}, cpu 600x16"]
            assert row["ratio"] == pytest.approx(row["value"] / own)
            assert "150 queries scaled to 600" in row["note"]
        floor = rows[f"floor time, against {ours}, cpu 600x16"]
        assert floor["ratio"] == pytest.approx(own / floor["value"])
        assert "scaled" not in floor["note"]
    assert all(row["value"] > 0 for row in rows.values())
    assert "of 150 queries, not scaled" in rows["released peak memory, cpu 600x16"]["note"]


@pytest.mark.parametrize(("structure", "tail"), [("trained", True), ("none", False)])
def test_all_arms_find_the_same(benchmark: ModuleType, structure: str, tail: bool) -> None:
    spec = benchmark.Spec(500, 24, 120, structure=structure, tail=tail)
    problem = benchmark.Problem.of(spec)
    found = {arm: benchmark.arm_named(arm)(problem) for arm in ("fp32", "default", "released", benchmark.PEER)}
    benchmark.check_agreement(found, 1e-6)
    assert set(found["released"].recall) == {1, 10, 100}
    assert set(found[benchmark.PEER].recall) == {1}
    off = replace(found["released"], map_at_r=found["released"].map_at_r + 1e-3)
    with pytest.raises(RuntimeError, match=r"MAP@R of released is 0\.\d+, that of fp32 0\.\d+"):
        benchmark.check_agreement(found | {"released": off}, 2e-4)
    off = replace(off, map_at_r=found["fp32"].map_at_r, recall=found["fp32"].recall | {10: 0.0})
    with pytest.raises(RuntimeError, match="R@10 of released"):
        benchmark.check_agreement(found | {"released": off}, 2e-4)


def test_scaled_queries_are_the_first_rows(benchmark: ModuleType) -> None:
    spec = benchmark.Spec(300, 12, 40)
    problem = benchmark.Problem.of(spec)
    result = retrieval(problem.embeddings, problem.labels, ks=(1,))
    first = float(result.query_map_at_r[:40].mean())
    assert benchmark.arm_named("fp32")(problem).map_at_r == pytest.approx(first, abs=1e-12)
    # Another number than that of all rows.
    assert abs(first - result.map_at_r) > 1e-6


def test_large_search_in_a_process_of_its_own(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, specs = benchmark.measure, []

    def measure(spec: object, arm: str) -> object:
        specs.append(spec)
        return (real if arm == "default" else benchmark.peak_here)(spec, arm)

    monkeypatch.setattr(benchmark, "measure", measure)
    target = tmp_path / "rows.json"
    arguments = ["--large", "--items", "2000", "--dim", "8", "--queries", "50", "--threads", "1"]
    assert benchmark.main([*arguments, "--json", str(target)]) == 0
    rows = read(target)
    default = benchmark.label("default", "cpu")
    for ours in (default, "fp32"):
        assert rows[f"ours {ours} time, cpu 200x2000x8"]["note"] == "50 queries scaled to 200"
        floor = rows[f"floor time, against {ours}, cpu 200x2000x8"]
        assert floor["ratio"] == pytest.approx(rows[f"ours {ours} time, cpu 200x2000x8"]["value"] / floor["value"])
        memory = rows[f"ours {ours} peak memory, cpu 200x2000x8"]
        assert memory["note"].endswith("of 50 queries, not scaled")
    # torch alone holds more.
    assert rows[f"ours {default} peak memory, cpu 200x2000x8"]["value"] > 0.05
    assert {(spec.items, spec.split, spec.queries) for spec in specs} == {(2000, 200, 50)}


def test_defaults_are_those_of_the_page(benchmark: ModuleType) -> None:
    usual, large = benchmark.specs_of(benchmark.parse([]))
    assert (usual.items, usual.dim, usual.queries, usual.split) == (60_502, 512, 8192, 0)
    assert (large.split, large.items, large.dim, large.queries) == (100_000, 1_000_000, 128, 100_000)
    assert benchmark.parse([]).parts == ["time", "memory"]
    assert benchmark.parse(["--large"]).parts == []
    assert usual.share("released") == usual.share(benchmark.PEER) == 60_502 / 8192
    assert usual.share("floor") == usual.share("default") == 1


def test_two_ranks_against_one(benchmark: ModuleType) -> None:
    (default, fp32) = benchmark.rank_rows(benchmark.Spec(400, 16, 400), [2], 1)
    assert default.name == f"ours {benchmark.label('default', 'cpu')} time on ranks, cpu 400x16 W2"
    assert fp32.name == "ours fp32 time on ranks, cpu 400x16 W2"
    for row in (default, fp32):
        alone = float(row.note.removeprefix("one rank ").split()[0])
        assert row.ratio == pytest.approx(alone / row.value / 2, rel=1e-3)


@pytest.mark.parametrize("tail", [False, True])
def test_class_sizes(tail: bool) -> None:
    sizes = load_benchmark("retrieval_data").class_sizes(60_502, tail=tail, generator=torch.Generator().manual_seed(0))
    assert len(sizes) == 11_316
    assert int(sizes.sum()) == 60_502
    assert int(sizes.min()) == 2
    assert int(sizes.max()) == (1000 if tail else 12)
    # Small classes are the most frequent ones.
    assert int((sizes == 2).sum()) == int(sizes.bincount().max())


def test_data_are_seeded_and_have_the_structure_asked_for(benchmark: ModuleType) -> None:
    spec = benchmark.Spec(3000, 64, 3000)
    trained = benchmark.Problem.of(spec)
    again, other = benchmark.Problem.of(spec), benchmark.Problem.of(replace(spec, seed=1))
    assert torch.equal(trained.embeddings, again.embeddings) and torch.equal(trained.labels, again.labels)
    assert not torch.equal(trained.embeddings, other.embeddings)
    assert 0.5 < benchmark.arm_named("fp32")(trained).recall[1] < 0.95
    untrained = benchmark.Problem.of(replace(spec, structure="none"))
    assert benchmark.arm_named("fp32")(untrained).recall[1] < 0.02
    unit = torch.nn.functional.normalize(untrained.embeddings)
    assert 0.85 < float((unit @ unit.t()).mean()) < 0.95
    assert asdict(untrained.spec)["structure"] == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items", "49"], "--items must be at least 50: got 49"),
        (["--queries", "0"], "--queries must be at least 1: got 0"),
        (["--ranks", "1"], "--ranks must be at least 2, which are compared with one"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    ],
)
def test_arguments_out_of_range(
    benchmark: ModuleType,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
