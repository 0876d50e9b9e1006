"""Synthetic negatives of a checkpoint: those that the training step makes of the same batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from run_cases import ALONE

from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transforms import normalise
from gcahng.errors import ConfigError
from gcahng.generation import generate_negatives, synthetic_loss
from gcahng.graph import UnitCoefficients
from gcahng.graph.neighbours import nearest_classes
from gcahng.losses import synthetic_n_pair_loss
from gcahng.random import mixing_weights
from gcahng.report.run_data import RunData
from gcahng.report.synthetic import SyntheticNegatives, synthetic_negatives, training_batch
from gcahng.training import checkpoint
from gcahng.training.averages import EpochAverages
from gcahng.training.data_setup import open_data
from gcahng.training.parts import build_modules, build_parts, build_step


def with_settings(run: RunData, **sections: dict[str, object]) -> RunData:
    changed = {name: replace(getattr(run.config, name), **values) for name, values in sections.items()}
    return replace(run, config=replace(run.config, **changed))


def negatives_of_the_step(run: RunData, rows: np.ndarray, monkeypatch, *, later: int = 0) -> torch.Tensor:
    """(B, P, D) what the metric pass of a real step takes J_syn of, its networks in evaluation mode."""
    data = open_data(run.config)
    modules = build_modules(run.config, data.table.num_classes, load_weights=False)
    parts = build_parts(run.config, modules, ALONE.device)
    for name, module in modules.items():
        if checkpoint.read_tensors(run.checkpoint, name):
            checkpoint.load_module(module, run.checkpoint, name)
        module.eval()
    step, backend = build_step(run.config, parts, ALONE)
    state = checkpoint.read_state(run.checkpoint)
    averages = EpochAverages()
    averages.load_state_dict(state["averages"])
    loader = eval_loader(data.shards, rows, transform=data.transform, batch_size=len(rows), num_workers=0)
    images = normalise(next(iter(loader))[0], data.transform)
    labels = torch.from_numpy(np.searchsorted(data.table.class_ids, data.shards.class_ids(rows)))
    made = []

    def watched(z, coefficients, synthesis, **options):
        loss = synthetic_loss(z, coefficients, synthesis, **options)
        table = None if isinstance(coefficients, UnitCoefficients) else coefficients.table()
        made.append(synthesis.all_at_once(z.detach(), table).detach())
        # The loss is of these negatives.
        assert float(loss.detach()) == pytest.approx(float(synthetic_n_pair_loss(z.detach(), made[-1])), rel=1e-5)
        return loss

    monkeypatch.setattr("gcahng.training.graph_passes.synthetic_loss", watched)
    monkeypatch.setattr("gcahng.training.step.synthetic_loss", watched)
    step(images, labels, averages, step=state["progress"]["step"] + later)
    backend.close()
    (negatives,) = made
    return negatives


def table_of(batch: SyntheticNegatives) -> torch.Tensor:
    """(B, P, D) with zeros for what was not made."""
    classes = batch.labels[: len(batch.labels.unique())].tolist()
    table = torch.zeros(len(batch.labels), len(classes), batch.embeddings.shape[1])
    for made, anchor, negative in zip(
        batch.synthetic, batch.anchor.tolist(), batch.negative_class.tolist(), strict=True
    ):
        table[anchor, classes.index(negative)] = made
    return table


@pytest.fixture(scope="module")
def run(report_runs) -> RunData:
    return report_runs[1]


@pytest.fixture(scope="module")
def rows(run) -> np.ndarray:
    return training_batch(run)


@pytest.mark.parametrize("coefficients", ["channel", "single"])
@pytest.mark.parametrize("normalised", [False, True])
def test_they_are_those_of_the_training_step(run, rows, coefficients, normalised, monkeypatch) -> None:
    # A small alpha, so that coefficients and distances count.
    settings = {"coefficients": coefficients, "normalised_distance": normalised, "alpha": 0.5}
    run = with_settings(run, generation=settings)
    batch = synthetic_negatives(run, rows)
    assert batch.synthetic.shape == (8 * 3, 8)
    own = (torch.arange(8)[:, None] % 4 == torch.arange(4))[..., None]
    want = negatives_of_the_step(run, rows, monkeypatch).masked_fill(own, 0.0)
    scale = float(want.abs().mean())
    torch.testing.assert_close(table_of(batch), want, rtol=1e-4, atol=1e-5 * scale)
    # Another step mixes with other weights: the comparison would notice.
    other = negatives_of_the_step(run, rows, monkeypatch, later=1).masked_fill(own, 0.0)
    assert float((table_of(batch) - other).abs().max()) > 0.01 * scale


def test_rows_may_come_in_any_order(run, rows) -> None:
    shuffled = rows.reshape(2, 4)[:, [2, 0, 3, 1]].T.reshape(-1)  # class by class
    first, second = synthetic_negatives(run, rows), synthetic_negatives(run, shuffled)
    assert sorted(second.rows.tolist()) == sorted(rows.tolist())
    assert torch.equal(second.labels[:4], second.labels[4:])

    def by_ends(batch: SyntheticNegatives) -> dict[tuple[int, int], torch.Tensor]:
        ends = zip(batch.rows[batch.anchor.numpy()].tolist(), batch.negative_class.tolist(), strict=True)
        return dict(zip(ends, batch.synthetic, strict=True))

    want, found = by_ends(first), by_ends(second)
    assert want.keys() == found.keys() and len(want) == 24
    for ends, made in found.items():
        torch.testing.assert_close(made, want[ends], rtol=1e-4, atol=1e-5)


def test_a_sparse_graph_has_only_listed_pairs(run, rows) -> None:
    sparse = synthetic_negatives(with_settings(run, graph={"neighbours": 1}), rows)
    chosen = nearest_classes(sparse.embeddings, 2, 1)
    classes = sparse.labels[:4].tolist()
    pairs = {(i % 4, int(c)) for i in range(8) for c in chosen[i]}
    listed = {(classes[a], classes[b]) for a, b in pairs | {(b, a) for a, b in pairs}}
    ends = list(zip(sparse.labels[sparse.anchor].tolist(), sparse.negative_class.tolist(), strict=True))
    assert set(ends) == listed
    assert len(ends) == 2 * len(listed) < 24  # both samples of a class are anchors
    assert torch.isfinite(sparse.synthetic).all()


def test_the_epoch_mean_and_the_step_are_those_of_the_checkpoint(run, rows) -> None:
    """By the plain formula, for one coefficient 1 for all channels."""
    single = with_settings(run, generation={"coefficients": "single"})
    batch = synthetic_negatives(single, rows)
    state = checkpoint.read_state(run.checkpoint)
    made = generate_negatives(
        batch.embeddings,
        batch.labels,
        None,
        alpha=run.config.generation.alpha,
        mean_metric_loss=state["averages"]["metric_loss"],
        weights=mixing_weights(2, seed=run.config.seed, step=state["progress"]["step"], phase="metric"),
    )
    own = torch.arange(8)[:, None] % 4 == torch.arange(4)
    torch.testing.assert_close(table_of(batch), made.masked_fill(own[..., None], 0.0), rtol=1e-5, atol=1e-7)


def test_the_batch_is_the_next_of_the_run(run, rows) -> None:
    data = open_data(run.config)
    labels = data.shards.class_ids(rows).reshape(2, 4)
    assert len(set(rows.tolist())) == 8
    assert (labels[0] == labels[1]).all() and len(set(labels[0])) == 4
    assert set(labels[0]) <= set(data.table.class_ids.tolist())


def test_a_large_batch_is_cut_to_some_classes(run, monkeypatch) -> None:
    monkeypatch.setattr("gcahng.report.synthetic.MOST_IMAGES", 6)
    rows = training_batch(run)
    assert len(rows) == 6
    batch = synthetic_negatives(run, rows)
    assert (len(batch.synthetic), batch.num_classes) == (6 * 2, 4)


def test_a_baseline_makes_none(report_runs, rows, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"makes no synthetic negatives: expected a run with generation\.enabled"):
        synthetic_negatives(report_runs[0], rows)
    with pytest.raises(ConfigError, match="has no checkpoint"):
        training_batch(replace(report_runs[1], folder=tmp_path))
