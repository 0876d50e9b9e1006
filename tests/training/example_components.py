"""Example: one of each component of one's own, named in a configuration or on a command line by dotted path.

model.backbone: example_components:TwoConvolutions      model.backbone_args: {width: 6}
batch.sampler: example_components:in_turn, or example_components:SimilarClasses
loss.metric: example_components:CentreLoss              loss.args: {margin: 0.5}
optim.metric_model.name: example_components:SignDescent
python -m shards.convert custom --source-class example_components:ArrayFile --source FOLDER --out OUT
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.data.plans.batch_plan import BatchPlan, PlanRequest, num_batches
from gcahng.data.plans.class_table import ClassTable
from gcahng.data.sources.source import Listing, SourceItem


class TwoConvolutions(nn.Module):
    """A backbone: images (B, 3, H, W) to a feature map (B, num_features, h, w)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.num_features = width
        self.first = nn.Conv2d(3, width, 3, stride=2)
        self.second = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(images))))


class CentreLoss(nn.Module):
    """A metric loss with weights of its own: hinge on the distance to the own and to the nearest other centre.

    Whoever names `num_classes` or `embedding_dim` in the constructor is given them; the rest comes from `loss.args`.
    """

    def __init__(self, num_classes: int, embedding_dim: int, margin: float = 1.0) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(num_classes, embedding_dim))
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        distances = torch.cdist(embeddings, self.centres)
        own = F.one_hot(labels, len(self.centres)).bool()
        nearest_other = distances.masked_fill(own, torch.inf).amin(1)
        return F.relu(distances[own] - nearest_other + self.margin).mean()


@dataclass(frozen=True)
class InTurn:
    """The plan of an epoch: classes in the order of their labels, images in the order of the shards."""

    table: ClassTable
    epoch: int
    num_classes: int
    num_samples: int

    def __len__(self) -> int:
        return num_batches(self.table.num_samples, self.num_classes, self.num_samples)

    def batch(self, index: int) -> BatchPlan:
        first = (self.epoch * len(self) + index) * self.num_classes
        labels = np.arange(first, first + self.num_classes) % self.table.num_classes
        turn = first // self.table.num_classes
        columns = [np.roll(self.table.rows_of(label), -turn)[: self.num_samples] for label in labels.tolist()]
        return BatchPlan(labels, np.stack(columns, axis=1))


def in_turn(request: PlanRequest) -> InTurn:
    """A sampler; this one draws nothing, so the seed does not matter."""
    return InTurn(request.table, request.epoch, request.num_classes, request.num_samples)


class SimilarClasses:
    """A sampler that puts similar classes together: a random class and those nearest to it make a batch.

    Nearest by the centres of the classes' embeddings, where the run has them; at random before.
    """

    def __init__(self, request: PlanRequest) -> None:
        self.request = request

    def __len__(self) -> int:
        request = self.request
        return num_batches(request.table.num_samples, request.num_classes, request.num_samples)

    def batch(self, index: int) -> BatchPlan:
        request = self.request
        draws = np.random.default_rng((request.seed, request.epoch, index))
        order = draws.permutation(request.table.num_classes)
        if request.class_centres is not None:
            distances = np.linalg.norm(request.class_centres - request.class_centres[order[0]], axis=1)
            order = np.argsort(distances, kind="stable")
        labels = order[: request.num_classes]
        columns = [draws.permutation(request.table.rows_of(label))[: request.num_samples] for label in labels.tolist()]
        return BatchPlan(labels, np.stack(columns, axis=1))


class SignDescent(torch.optim.Optimizer):
    """An optimiser: every weight moves by the learning rate against the sign of its gradient."""

    def __init__(self, params: Iterator[Any], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(group["lr"] * parameter.grad.sign())


class ArrayFile:
    """A data source: `images.npy` (n, H, W, 3) uint8 and `labels.npy` (n,), the odd labels being for testing."""

    name = "array file"

    def __init__(self, directory: Path, *, seed: int = 0) -> None:
        self.directory = Path(directory)

    def listing(self) -> Listing:
        labels = np.load(self.directory / "labels.npy")
        return Listing(
            [
                SourceItem(f"label {label}", "test" if label % 2 else "train", str(index))
                for index, label in enumerate(labels.tolist())
            ]
        )

    def load(self, item: SourceItem) -> bytes:
        pixels = np.load(self.directory / "images.npy", mmap_mode="r")[int(item.source)]
        content = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(content, "PNG")
        return content.getvalue()
