"""How hard negatives are: counts against plain loops, golden ratios, and that recording changes nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_cases import Case
from hardness_loops import Looped, looped
from host_waits import noted
from maths_cases import Size
from run_cases import assert_same_tensors, make_trainer, read_metrics, saved_tensors, train
from share_threads import Group
from step_cases import Case as StepCase
from step_cases import averages_of
from torch import Tensor

from gcahng.graph import Coefficients, GraphNetwork, PairPlan, UnitCoefficients, class_major_plan, identity, pair_plan
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.neighbours import neighbour_plan
from gcahng.report.run_data import read_run
from gcahng.training.hardness import DISTANCE_EDGES, HardnessRecord, hard_negative_ratio
from gcahng.training.run_log import read_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "sct.npz"
SIZE = Size(7, 2, 12, 1, 2)
CASES = {
    "pairs": Case(SIZE),
    "three samples, padded blocks": Case(Size(5, 3, 16, 2, 4), per_block=2),
    "duplicates": Case(Size(5, 3, 8, 1, 2), duplicates=True, per_block=2),
    "paper's distances": Case(SIZE, normalised=True),
    "dropout per direction": Case(SIZE, options={"edge_dropout": "independent", "dropout": 0.4}),
}


def recorded(case: Case, coefficients: Coefficients, reduce: Any = identity) -> dict[str, Any]:
    z, labels = case.batch()
    record = HardnessRecord(edges=True, reduce=reduce)
    record.take_batch(z, labels, coefficients.plan, case.synthesis().rule, case.size.num_samples)
    record.take_synthetic(z, coefficients, case.synthesis(), case.classifier(), labels[: case.size.num_classes])
    return record.row()


def coefficients_of(
    case: Case,
    backend: str,
    plan: PairPlan,
    *,
    gradient: bool = True,
    reduce: Any = identity,
    graph: GraphNetwork | None = None,
) -> Coefficients:
    z, labels = case.batch()
    graph = case.graph(backend) if graph is None else graph
    output = graph(z, labels, dropout_key=5, plan=plan, coefficient_gradient=gradient, reduce=reduce)
    assert output.coefficients is not None
    return output.coefficients


def histogram(values: list[float], edges: list[float]) -> list[int]:
    """Values outside the edges count in the first and in the last bin."""
    found: list[int] = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
    return found


def assert_says(row: dict[str, Any], want: Looped) -> None:
    assert row["anchors"] == len(want.d_positive) and row["pairs"] == len(want.d_negative)
    for name in ("d_positive", "d_negative", "d_synthetic"):
        values = getattr(want, name)
        assert row[name] == histogram(values, list(DISTANCE_EDGES)), name
        assert row[f"mean_{name}"] == pytest.approx(np.mean(values), rel=1e-8)
    assert row["distance_edges"] == pytest.approx(DISTANCE_EDGES, rel=1e-8)
    assert row["hard_negative_ratio"] == np.mean(want.anchors_hard)
    assert row["synthetic_own_class_share"] == pytest.approx(np.mean(want.own_class), rel=1e-8)
    if not want.coefficients:
        assert "coefficients" not in row
        return
    assert row["coefficients"] == histogram(want.coefficients, row["coefficient_edges"])
    assert sum(row["coefficients"]) == row["pairs"] * (len(want.coefficients) // len(want.d_negative))
    spread = row["coefficient_channel_std"]
    assert spread["min"] == pytest.approx(min(want.channel_std), rel=1e-7)
    assert spread["max"] == pytest.approx(max(want.channel_std), rel=1e-7)
    for name, share in (("q25", 0.25), ("median", 0.5), ("q75", 0.75)):
        # A quantile of few values lies anywhere between two of them; the bins add 2 %.
        low, high = (
            np.quantile(want.channel_std, share, method="lower"),
            np.quantile(want.channel_std, share, method="higher"),
        )
        assert low * 0.975 <= spread[name] <= high * 1.025, name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["eager", "scatter"])
def test_a_row_is_what_plain_loops_count(name: str, backend: str) -> None:
    case = CASES[name]
    z, labels = case.batch()
    table = coefficients_of(case, "scatter", case.plan()).table().detach()
    want = looped(z, labels.tolist(), table, case.synthesis(), case.classifier())
    assert_says(recorded(case, coefficients_of(case, backend, case.plan())), want)
    assert 0 < np.mean(want.own_class) < 1 and np.mean(want.d_synthetic) < np.mean(want.d_negative)


def test_coefficients_without_gradient_count_as_well() -> None:
    case = CASES["pairs"]
    rows = [
        recorded(case, coefficients_of(case, "eager", case.plan(), gradient=gradient)) for gradient in (True, False)
    ]
    assert rows[0] == rows[1]


def test_without_a_graph_all_coefficients_are_one() -> None:
    case = CASES["three samples, padded blocks"]
    z, labels = case.batch()
    row = recorded(case, UnitCoefficients(edge_layout(case.plan(), None, 0)))
    assert_says(row, looped(z, labels.tolist(), None, case.synthesis(), case.classifier()))


def test_a_sparse_graph_counts_the_edges_it_keeps() -> None:
    case = Case(Size(9, 2, 8, 1, 2))
    z, labels = case.batch()
    plan = neighbour_plan(z, 2, 2)
    coefficients = coefficients_of(case, "eager", plan)
    table = coefficients.table().detach()
    listed = table.abs().sum(-1) > 0
    assert int((~listed).sum()) > 0
    assert_says(
        recorded(case, coefficients), looped(z, labels.tolist(), table, case.synthesis(), case.classifier(), listed)
    )


@pytest.mark.parametrize("name", ["three samples, padded blocks", "paper's distances"])
def test_a_baseline_counts_distances_alone(name: str) -> None:
    case = CASES[name]
    z, labels = case.batch()
    rule, num_samples = case.synthesis().rule, case.size.num_samples
    record = HardnessRecord(edges=True, reduce=identity)
    record.take_batch(z, labels, case.plan(), rule, num_samples)
    record.take_negatives(z, case.plan(), rule, num_samples)
    row = record.row()
    whole = recorded(case, UnitCoefficients(edge_layout(case.plan(), None, 0)))
    assert row == {name: whole[name] for name in row} and "d_negative" in row
    assert not {"d_synthetic", "coefficients", "synthetic_own_class_share"} & row.keys()


@pytest.mark.parametrize("backend", ["eager", "scatter", "none"])
def test_ranks_add_up_to_the_row_of_one_process(backend: str) -> None:
    case, ranks = CASES["pairs"], 3
    order = class_major_plan(7, 2).order[: case.size.batch]

    # Made here: threads would share the generator of the initial weights.
    graphs = [None if backend == "none" else case.graph(backend) for _ in range(ranks + 1)]

    def of_share(rank: int, size: int, reduce: Any) -> dict[str, Any]:
        plan = pair_plan(order, 6, share=(rank, size), edges_per_chunk=50)
        graph = graphs.pop()
        if graph is None:
            return recorded(case, UnitCoefficients(edge_layout(plan, None, 0)), reduce)
        return recorded(case, coefficients_of(case, backend, plan, reduce=reduce, graph=graph), reduce)

    group = Group(ranks)
    rows = group.run(lambda rank: of_share(rank, ranks, group.reducer(rank)))
    assert rows == [of_share(0, 1, identity)] * ranks


@pytest.mark.parametrize("name", ["mixed", "duplicate", "collapsed", "easy", "four"])
def test_the_ratio_is_the_released_codes(name: str) -> None:
    golden = np.load(GOLDEN)
    z, labels = torch.from_numpy(golden[f"{name}/x"]), torch.from_numpy(golden[f"{name}/y"])
    assert float(hard_negative_ratio(z, labels)) == pytest.approx(float(golden[f"{name}/hn/hard_negative_ratio"]))


def test_no_anchor_has_a_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert math.isnan(float(hard_negative_ratio(torch.zeros(4, 2), torch.arange(4))))
    z = torch.eye(3).repeat(2, 1)
    assert math.isnan(float(hard_negative_ratio(z, torch.arange(3).repeat(2))))
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    whole = hard_negative_ratio(z, torch.arange(3).repeat(3))
    monkeypatch.setattr("gcahng.losses.hard_triplets.SIMILARITIES", 20)  # two rows at once
    assert 0 < float(hard_negative_ratio(z, torch.arange(3).repeat(3))) == float(whole)


STEPS = {
    "whole": StepCase(),
    "bf16": StepCase(dtype=torch.float32, precision="bf16"),
    "edge list": StepCase(graph_options={"backend": "scatter"}),
    "single coefficient": StepCase(graph=False, channel=False),
    "graph alone": StepCase(generate=False),
    "baseline": StepCase(graph=False, generate=False),
}


@pytest.mark.parametrize("name", STEPS)
def test_recording_moves_nothing_and_waits_for_nothing(name: str) -> None:
    case = replace(STEPS[name], fused=True, deferred=True)
    found: list[dict[str, Tensor]] = []
    for records in (False, True):
        backend, averages = case.backend(), averages_of()
        step = case.step_on(backend)
        for number in range(2):
            record = HardnessRecord(edges=True, reduce=identity) if records else None
            images, labels = case.images(number)
            with noted() as waits:
                report = step(images, labels, averages, step=number, record=record)
            assert number == 0 or waits == [] or name == "edge list"  # which always waits
        found.append(backend.snapshot() | report)
    assert record is not None
    with noted() as waits:
        row = record.row()
    assert len(waits) == 1 and "tolist" in waits[0]
    assert row["pairs"] == 12 * 9 and row["anchors"] == 12
    assert ("d_synthetic" in row) == case.generate and ("coefficients" in row) == (case.generate and case.graph)
    assert float(found[1]["hard_negative_ratio"]) == row["hard_negative_ratio"]
    assert found[1].keys() - found[0].keys() == {"hard_negative_ratio"} | signals_of(case)
    assert_same_tensors({name: found[1][name] for name in found[0]}, found[0])


def signals_of(case: StepCase) -> set[str]:
    found = {"embedding_std", "mean_positive_distance", "mean_negative_distance"}
    if not case.generate:
        return found
    return found | {"active_synthetic_ratio"} | ({"coefficient_spread"} if case.graph and case.channel else set())


@pytest.fixture(scope="module")
def recorded_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "run"
    train(shards, folder, {"train.epochs": 2, "train.record_every": 2})
    return folder


def test_a_run_records_what_was_asked_for(recorded_run: Path) -> None:
    rows = read_run(recorded_run, "run").hardness
    assert [(row["step"], row["epoch"]) for row in rows] == [(1, 0), (3, 0), (5, 0), (7, 1), (9, 1)]
    for row in rows:
        assert sum(row["d_positive"]) == row["anchors"] == 8
        assert sum(row["d_negative"]) == sum(row["d_synthetic"]) == row["pairs"] == 8 * 6
        assert sum(row["coefficients"]) == 8 * 6 * 8
        assert row["mean_d_synthetic"] <= row["mean_d_negative"]
    steps = {row["step"]: row for row in read_metrics(recorded_run) if row["kind"] == "step"}
    assert [steps[row["step"]]["hard_negative_ratio"] for row in rows] == [row["hard_negative_ratio"] for row in rows]
    assert all(0 <= row["hard_negative_ratio"] <= 1 for row in steps.values())


def test_a_run_without_records_is_the_same_run(shards: Path, tmp_path: Path, recorded_run: Path) -> None:
    folder = tmp_path / "run"
    train(shards, folder, {"train.epochs": 2, "train.record_every": 0, "train.log_every": 100})
    assert read_rows(folder / "hardness.jsonl") == []
    assert_same_tensors(saved_tensors(folder), saved_tensors(recorded_run))


def test_each_epoch_is_recorded_once_by_default_and_a_resume_cuts_rows_back(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"train.epochs": 1, "train.max_steps_per_epoch": 2, "optim.graph.schedule.name": "constant"}
    train(shards, folder, settings)
    file = folder / "hardness.jsonl"
    first = read_rows(file)
    assert [row["step"] for row in first] == [1]
    # The process was killed in its second epoch.
    with open(file, "a", encoding="utf-8") as log:
        log.write(json.dumps(first[0] | {"step": 3, "anchors": -1}) + "\n" + '{"step": 4, "anch')
    train(shards, folder, settings | {"train.epochs": 2, "train.resume": "auto"})
    rows = read_rows(file)
    assert [(row["step"], row["anchors"]) for row in rows] == [(1, 8), (3, 8)]
    assert rows[0] == first[0] and len(file.read_text().splitlines()) == 2


def test_steps_that_are_not_asked_for_record_nothing(shards: Path, tmp_path: Path) -> None:
    trainer = make_trainer(shards, tmp_path / "run", {"train.log_every": 3, "train.record_every": 4})
    kinds = []
    for step in range(9):
        trainer.progress.step = step
        record = trainer._hardness_record(step + 1)
        kinds.append(None if record is None else record.edges)
    # Rows are of steps 1, 5, 9; the log is of steps 3, 6, 9.
    assert kinds == [True, None, False, None, True, False, None, None, True]
