"""The evaluated images of runs, embedded with the newest checkpoint of each: what several sections look at.

Letters: n queries, G gallery images, D channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gcahng.data.images.decode import decode_image
from gcahng.data.shards.reader import ShardSet
from gcahng.distributed import ONE
from gcahng.errors import ConfigError, InputError, TrainingError
from gcahng.metrics import RetrievalResult
from gcahng.report.features import Moments, watched_features
from gcahng.report.run_data import RunData
from gcahng.training.data_setup import data_store
from gcahng.training.evaluate_checkpoint import embedding_settings, load_metric_model
from gcahng.training.evaluation import check_evaluation, embed_rows
from gcahng.training.evaluation_checks import gallery_splits
from gcahng.training.protocols import EmbeddedSet, search_sets

NUM_NEIGHBOURS = 8


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Embedded images of a shard folder.

    Attributes:
        shards: Where they are.
        rows: (n,) int64 their rows.
        embeddings: (n, D) float32 on the CPU, as the model gives them.
        labels: (n,) int64 class ids.
    """

    shards: ShardSet
    rows: NDArray[np.int64]
    embeddings: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def unit(self) -> Tensor:
        """(n, D) embeddings on the unit sphere, where they are compared."""
        return self.embeddings / self.embeddings.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def as_set(self) -> EmbeddedSet:
        """The same for `gcahng.training.protocols`, which searches."""
        return EmbeddedSet(
            self.embeddings, self.labels, self.key, lambda place: self.shards.shard_name(int(self.rows[place]))
        )

    def key(self, index: int) -> str:
        """Key of an image in its shard."""
        return self.shards.key(int(self.rows[index]))

    def class_name(self, index: int) -> str:
        """Name of an image's class."""
        return self.shards.classes[int(self.labels[index])].name

    def image(self, index: int) -> Image.Image:
        """An image as it is stored, RGB.

        Raises:
            DataError: It is unreadable.
        """
        row = int(self.rows[index])
        return decode_image(self.shards.read(row), name=f"Sample {self.key(index)} of {self.shards.shard_name(row)}")


@dataclass(frozen=True, eq=False)
class EmbeddedRun:
    """The evaluated split of a run, embedded and ranked.

    Attributes:
        run: The run.
        query: Its queries.
        gallery: What they search: the queries themselves or the first gallery of the protocol, then distractors.
        result: With neighbours.
        is_self: Whether the queries search each other.
        features: Moments of the backbone's features of the queries, by pooling.
    """

    run: RunData
    query: ImageSet
    gallery: ImageSet
    result: RetrievalResult
    is_self: bool
    features: Moments = field(default_factory=dict)

    @property
    def neighbours(self) -> Tensor:
        """(n, num_neighbours) int64 positions in `gallery`, nearest first."""
        assert self.result.neighbours is not None
        return self.result.neighbours

    @property
    def rows(self) -> NDArray[np.int64]:
        """(n,) rows of the queries."""
        return self.query.rows

    @property
    def embeddings(self) -> Tensor:
        """(n, D) of the queries."""
        return self.query.embeddings

    @property
    def labels(self) -> Tensor:
        """(n,) class ids of the queries."""
        return self.query.labels

    def class_name(self, class_id: int) -> str:
        """Name of a class id."""
        return self.query.shards.classes[class_id].name

    def image(self, index: int) -> Image.Image:
        """A query's image."""
        return self.query.image(index)

    def key(self, index: int) -> str:
        """A query's key."""
        return self.query.key(index)

    def is_right(self, query: int, neighbour: int) -> bool:
        """Whether a gallery image is of a query's class."""
        return bool(self.gallery.labels[neighbour] == self.labels[query])

    def similarity(self, query: int, neighbour: int) -> float:
        """Cosine similarity of a query and a gallery image."""
        return float(self.query.unit[query] @ self.gallery.unit[neighbour])

    def comparable(self, other: "EmbeddedRun") -> bool:
        """Whether query i is the same image in both, and they search the same images."""
        mine, theirs = self.query.shards.manifest.digest(), other.query.shards.manifest.digest()
        return (
            mine == theirs
            and np.array_equal(self.query.rows, other.query.rows)
            and np.array_equal(self.gallery.rows, other.gallery.rows)
        )


@dataclass(frozen=True)
class EmbeddedRuns(Mapping[str, EmbeddedRun]):
    """The embedded runs of a report by name, in its order.

    Attributes:
        found: Those that could be embedded.
        reasons: Why the others could not, by name.
    """

    found: Mapping[str, EmbeddedRun]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> EmbeddedRun:
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def compared(self) -> tuple[EmbeddedRun | None, EmbeddedRun] | None:
        """The two runs that are shown side by side: the one without synthetic negatives, and the one with them.

        The second is the first run that generates, or the last one; the first is the first other run that evaluates
        the same images, one that does not generate rather than one that does. None where nothing is embedded.
        """
        runs = list(self.found.values())
        if not runs:
            return None
        shown = next((run for run in runs if run.run.config.generation.enabled), runs[-1])
        others = [run for run in runs if run is not shown and shown.comparable(run)]
        others.sort(key=lambda run: run.run.config.generation.enabled)
        return (others[0] if others else None), shown


def embed_runs(runs: Sequence[RunData], num_neighbours: int = NUM_NEIGHBOURS) -> EmbeddedRuns:
    """Embed every run that has a checkpoint and data; the reason, where one cannot be embedded."""
    found: dict[str, EmbeddedRun] = {}
    reasons: dict[str, str] = {}
    for run in runs:
        try:
            found[run.name] = embed_run(run, num_neighbours)
        except (InputError, TrainingError) as error:
            reasons[run.name] = str(error)
    return EmbeddedRuns(found, reasons)


def embed_run(run: RunData, num_neighbours: int = NUM_NEIGHBOURS) -> EmbeddedRun:
    """Embed the evaluated split of a run with its newest checkpoint, and rank it.

    Args:
        run: The run; its device is used if it is here, the CPU otherwise.
        num_neighbours: Neighbours of each query; fewer where there are fewer other images.
    Raises:
        InputError: There is no checkpoint, the data set cannot be read, or no query can be answered.
        TrainingError: An embedding is not finite.
    """
    if run.checkpoint is None:
        raise ConfigError(
            f"`{run.folder}` has no checkpoint `last` yet: expected one to embed its images with. Train an epoch, or "
            "wait for the first one."
        )
    config = run.config
    shards = ShardSet.open(config.data.dir, store=data_store(config.data))
    check_evaluation(shards, config.eval)
    model, _ = load_metric_model(run.checkpoint, ["train.device=auto"], trust_components=run.trust_components)
    settings = embedding_settings(config, device=next(model.parameters()).device)

    def embedded(split: str) -> ImageSet:
        rows = shards.split_samples(split)
        return ImageSet(shards, rows, *embed_rows(model, shards, rows, settings))

    with watched_features(model) as features:
        query = embedded(config.eval.split)
    galleries = gallery_splits(config.eval)[:1]
    searched = [embedded(split) for split in galleries]
    distractors = [embedded(split) for split in config.eval.distractor_splits]
    gallery = _joined([*(searched or [query]), *distractors])
    results, _ = search_sets(
        query.as_set(),
        {"gallery": searched[0].as_set() if searched else None},
        [images.as_set() for images in distractors],
        replace(config.eval, ks=(1,), precision_ks=(), coarse_label=None),
        device=settings.device,
        ranks=ONE,
        num_neighbours=min(num_neighbours, len(gallery) - (not searched)),
    )
    return EmbeddedRun(run, query, gallery, results["gallery"], is_self=not searched, features=features)


def _joined(sets: Sequence[ImageSet]) -> ImageSet:
    """Images of one shard folder, one set after the other."""
    if len(sets) == 1:
        return sets[0]
    return ImageSet(
        sets[0].shards,
        np.concatenate([images.rows for images in sets]),
        torch.cat([images.embeddings for images in sets]),
        torch.cat([images.labels for images in sets]),
    )
