"""The synthetic negatives that a run's graph network makes of a batch, with the weights of its newest checkpoint.

Letters: B = P * K samples group-major, P classes, K samples per class, D channels, S = B * (P - 1) synthetic negatives.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcahng.data.plans.plan import make_plan
from gcahng.data.shards.reader import ShardSet
from gcahng.errors import ConfigError
from gcahng.generation import Synthesis
from gcahng.generation.interpolation import Interpolation
from gcahng.graph import GraphNetwork
from gcahng.graph.coefficients import dense
from gcahng.graph.edge_layout import edge_layout
from gcahng.graph.neighbours import neighbour_plan
from gcahng.graph.pairs import PairPlan, class_major_plan
from gcahng.layout import group_major
from gcahng.random import mixing_weights, picking_weights
from gcahng.report.run_data import RunData
from gcahng.training import checkpoint
from gcahng.training.averages import EpochAverages
from gcahng.training.config import Config
from gcahng.training.data_setup import data_store, open_data
from gcahng.training.evaluate_checkpoint import embedding_settings, load_metric_model
from gcahng.training.evaluation import embed_rows
from gcahng.training.parts import module_makers
from gcahng.training.step import METRIC
from gcahng.training.trusted import check_components

# The table of coefficients has B * B * D numbers.
MOST_IMAGES = 128


@dataclass(frozen=True, eq=False)
class SyntheticNegatives:
    """A batch and what is made of it.

    Attributes:
        embeddings: (B, D) float32 of the real images, as the model gives them, group-major.
        labels: (B,) int64 class ids.
        rows: (B,) rows of the images.
        synthetic: (S, D).
        anchor: (S,) int64 position in the batch of each one's anchor.
        negative_class: (S,) int64 class id of the samples that each one is mixed from.
        num_classes: P of the batches that the run trained on, which may be more than these.
    """

    embeddings: Tensor
    labels: Tensor
    rows: NDArray[np.int64]
    synthetic: Tensor
    anchor: Tensor
    negative_class: Tensor
    num_classes: int


@dataclass(frozen=True)
class _Saved:
    """A run's newest checkpoint, and the configuration to use it with here."""

    folder: Path
    config: Config

    @classmethod
    def of(cls, run: RunData) -> "_Saved":
        if run.checkpoint is None:
            raise ConfigError(f"`{run.folder}` has no checkpoint `last` yet. Train an epoch first.")
        folder = checkpoint.find_checkpoint(run.checkpoint)
        checkpoint.verify(folder)
        return cls(folder, run.config)

    @property
    def state(self) -> dict[str, Any]:
        return checkpoint.read_state(self.folder)


def training_batch(run: RunData) -> NDArray[np.int64]:
    """(B,) rows of the first batch of the epoch that a run would train next, group-major.

    Of a batch of more than 128 images the first classes are taken.

    Raises:
        InputError: There is no checkpoint, it needs `trust_components`, or the data set cannot be read.
    """
    saved = _Saved.of(run)
    check_components(saved.config, run.folder, trusted=run.trust_components, whole=True)
    batch = saved.config.batch
    plan = make_plan(
        open_data(saved.config).table,
        seed=saved.config.seed,
        epoch=saved.state["progress"]["epoch"],
        num_classes=batch.num_classes,
        num_samples=batch.num_samples,
        sampler=batch.sampler,
        passes=batch.passes,
    )
    rows = plan.batch(0).rows
    return np.asarray(rows[:, : max(2, MOST_IMAGES // len(rows))].reshape(-1), dtype=np.int64)


@torch.no_grad()
def synthetic_negatives(run: RunData, rows: NDArray[np.int64]) -> SyntheticNegatives:
    """What the next training step's metric pass would make of these images, with the weights as they are.

    The step's own coefficients, interpolation, mixing weights and epoch mean; but the images are those of evaluation
    (no random crop), and the networks are in evaluation mode (running statistics, no dropout).

    Args:
        run: With `generation.enabled`.
        rows: (B,) rows of the data set, K of every class, in any order; at most a few hundred.
    Raises:
        InputError: The run makes no synthetic negatives, it has no checkpoint, the data set cannot be read, or the
            classes have different numbers of images.
    """
    saved = _Saved.of(run)
    config, state = saved.config, saved.state
    if not config.generation.enabled:
        raise ConfigError(f"`{run.folder}` makes no synthetic negatives: expected a run with generation.enabled.")
    model, _ = load_metric_model(saved.folder, ["train.device=auto"], trust_components=run.trust_components)
    settings = embedding_settings(config, device=next(model.parameters()).device)
    shards = ShardSet.open(config.data.dir, store=data_store(config.data))
    layout = group_major(torch.from_numpy(shards.class_ids(rows)))
    rows = rows[layout.order.numpy()]
    embeddings, labels = embed_rows(model, shards, rows, settings)
    num_samples, num_classes = layout.num_samples, layout.num_classes
    coefficients, listed = None, torch.ones(len(rows), num_classes, dtype=torch.bool)
    if config.graph.enabled and config.generation.coefficients == "channel":
        plan = _plan(config, embeddings, num_samples)
        graph = _graph(saved, state["data"]["num_classes"])
        found = graph(embeddings, labels, plan=plan, coefficient_gradient=False).coefficients
        coefficients = found.table()
        listed = _listed(plan, num_samples)
    averages = EpochAverages()
    averages.load_state_dict(state["averages"])
    rule = Interpolation(config.generation.alpha, averages.metric_loss, config.generation.normalised_distance)
    draw = picking_weights if config.generation.fusion == "pick" else mixing_weights
    weights = draw(num_samples, seed=config.seed, step=state["progress"]["step"], phase=METRIC)
    table = Synthesis(num_samples, rule, weights).all_at_once(embeddings, coefficients)
    own = torch.arange(len(rows))[:, None] % num_classes == torch.arange(num_classes)
    anchor, column = (listed & ~own).nonzero(as_tuple=True)
    return SyntheticNegatives(
        embeddings, labels, rows, table[anchor, column], anchor, layout.class_labels[column], config.batch.num_classes
    )


def _graph(saved: _Saved, num_classes: int) -> GraphNetwork:
    # Every backend computes the same; this one is ready at once.
    config = replace(saved.config, graph=replace(saved.config.graph, backend="eager"))
    graph = module_makers(config, num_classes, load_weights=False)["graph"]()
    assert isinstance(graph, GraphNetwork)
    checkpoint.load_module(graph, saved.folder, "graph")
    return graph.eval()


def _plan(config: Config, embeddings: Tensor, num_samples: int) -> PairPlan:
    """The pairs that the training step would list."""
    num_classes, neighbours = len(embeddings) // num_samples, config.graph.neighbours
    if neighbours is None or neighbours >= num_classes - 1:
        return class_major_plan(num_classes, num_samples, embeddings.device)
    return neighbour_plan(embeddings, num_samples, neighbours)


def _listed(plan: PairPlan, num_samples: int) -> Tensor:
    """(B, P) whether a plan has the pairs of a sample with the class of each column."""
    layout = edge_layout(plan, None, 0)
    ones = torch.ones(layout.num_rows, 1)
    pairs = dense(layout, ones)[..., 0] > 0
    return pairs.view(len(pairs), num_samples, -1).all(1)
