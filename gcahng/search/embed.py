"""Embed images into an index folder: streamed, over several ranks, and continued where it was after any interruption.

The bytes of the folder do not depend on interruptions, nor on the number of ranks and workers, as long as each rank
computes with as many threads. What is written while it is made: `gcahng.search.unfinished`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gcahng.data.shards.reader import ShardSet
from gcahng.data.stores.file_lock import LockedFile
from gcahng.distributed import ONE, Ranks
from gcahng.distributed.agreement import agreed, check_same
from gcahng.errors import DataError
from gcahng.models import Embedder
from gcahng.search.image_parts import ImageParts, Job, PartBatch, ShardParts, share_of_jobs
from gcahng.search.index_info import IndexInfo, read_json
from gcahng.search.part_files import ImageRow, PartFiles
from gcahng.search.tar_parts import TarParts
from gcahng.search.unfinished import IndexTarget, begin, check_shared, finish
from gcahng.training import checkpoint
from gcahng.training.config import Config
from gcahng.training.data_setup import data_store
from gcahng.training.embedding import EmbeddingSettings, embed_batch, evaluating
from gcahng.training.evaluate_checkpoint import embedding_settings, load_metric_model
from gcahng.training.launched import Launched

# Batches after which ranks hear from each other: none waits longer than for so many of another's.
_BATCHES_PER_WORD = 8
_END = object()


def embed_checkpoint(
    path: Path,
    target: IndexTarget,
    started: Launched,
    overrides: Sequence[str] = (),
    *,
    split: str | None = None,
    tars: Sequence[str | Path] | None = None,
    label_field: str | None = None,
    labelled: bool = True,
    progress_bars: bool = False,
    trust_components: bool = False,
) -> IndexInfo | None:
    """Embed a split of a shard folder, or plain tars, by a checkpoint; every rank calls this.

    Args:
        path: Checkpoint folder, a link to one, or a file inside.
        target: What to write.
        started: How this process was started.
        overrides: `section.key=value`, for example another data.dir.
        split: Split of data.dir; by default `eval.split`.
        tars: Plain WebDataset tars in place of data.dir.
        label_field: Field of the tars' `.json` that holds the class.
        labelled: False looks for no labels in the tars: all are 0.
        progress_bars: Show a bar, of what this rank embeds.
        trust_components: See `load_metric_model`.
    Returns:
        What `index.json` says, on rank 0.
    Raises:
        InputError: See `embed_index`; or the checkpoint does not fit, or there is no such split or tar.
        TrainingError: An embedding is not finite.
    """
    ranks = started.ranks

    def read() -> tuple[Embedder, ImageParts, EmbeddingSettings, dict[str, Any]]:
        target.check()
        model, config = load_metric_model(path, overrides, device=started.device, trust_components=trust_components)
        settings = embedding_settings(config, device=started.device, progress_bars=progress_bars and ranks.first)
        images: ImageParts
        if tars is not None:
            images = TarParts(tars, label_field, labelled=labelled)
        else:
            shards = ShardSet.open(config.data.dir, store=data_store(config.data))
            images = ShardParts(shards, config.eval.split if split is None else split, config.data.dir)
        folder = checkpoint.find_checkpoint(path)
        return model, images, settings, made_with(folder, config, settings, images, part_rows_of(target, settings))

    model, images, settings, origin = agreed(ranks, read)
    return embed_index(model, images, settings, target, origin, ranks)


def embed_index(
    model: Embedder,
    images: ImageParts,
    settings: EmbeddingSettings,
    target: IndexTarget,
    origin: Mapping[str, Any],
    ranks: Ranks = ONE,
) -> IndexInfo | None:
    """Embed images into an index folder; one that is there already, of the same origin, is left as it is.

    Args:
        model: The metric model, the same on every rank.
        images: What to embed.
        settings: How images become embeddings.
        target: What to write; a folder that all ranks share.
        origin: See `made_with`.
        ranks: All of them call this; rank 0 puts the index together, the others return before that.
    Returns:
        What `index.json` says, on rank 0.
    Raises:
        ConfigError: The target cannot be written, is of another checkpoint or data, or another process writes it.
        DataError: An image is unreadable, on whichever rank; or the disk is full.
        TrainingError: An embedding is not finite.
    """
    check_same(ranks, {"what is embedded": json.dumps(origin, sort_keys=True)})
    part_rows = part_rows_of(target, settings)
    files = PartFiles(target.partial / "parts", model.embedding_dim)
    lock: LockedFile | None = None
    jobs: list[Job] | None = []
    try:
        begun = agreed(ranks, lambda: begin(target, origin, images, files, part_rows) if ranks.first else None)
        if begun is not None:
            lock, jobs = begun
        jobs = ranks.all_of(jobs)[0]
        if jobs is None:
            return IndexInfo.load(target.folder) if ranks.first else None
        agreed(ranks, lambda: check_shared(target))
        own = share_of_jobs(jobs, ranks.rank, ranks.size)
        _embed_together(_embedded(model, images, settings, files, own, target, part_rows), ranks)
        if not ranks.first:
            return None
        return finish(target, origin, images, files)
    finally:
        if lock is not None:
            lock.close()


def _embed_together(batches: Iterator[None], ranks: Ranks) -> None:
    """Run this rank's share; the ranks hear of each other's end or error after every few batches."""

    def some() -> bool:
        return any(next(batches, _END) is _END for _ in range(_BATCHES_PER_WORD))

    while not all(ranks.all_of(agreed(ranks, some))):
        pass


def _embedded(
    model: Embedder,
    images: ImageParts,
    settings: EmbeddingSettings,
    files: PartFiles,
    jobs: Sequence[Job],
    target: IndexTarget,
    part_rows: int,
) -> Iterator[Any]:
    """Embed the jobs and write their parts; gives something after each batch."""
    held: list[Tensor] = []
    rows: list[ImageRow] = []
    with evaluating(model), tqdm(desc="embed", unit="image", leave=False, disable=not settings.progress) as bar:
        for job in jobs:
            for batch in images.batches(job, part_rows, settings):
                held.append(_embeddings(model, batch, settings, target.normalised))
                rows += batch.rows
                if batch.ends_part:
                    files.write(batch.unit, batch.part, torch.cat(held).numpy(), rows, batch.kind, batch.ends_unit)
                    held, rows = [], []
                bar.update(len(batch.rows))
                yield


def _embeddings(model: Embedder, batch: PartBatch, settings: EmbeddingSettings, normalised: bool) -> Tensor:
    """(b, D) float32, on the CPU."""
    if not batch.rows:
        return torch.empty(0, model.embedding_dim)
    embeddings = embed_batch(model, batch.images, settings, [row.key for row in batch.rows])
    return torch.nn.functional.normalize(embeddings, dim=1) if normalised else embeddings


def made_with(
    folder: Path, config: Config, settings: EmbeddingSettings, images: ImageParts, part_rows: int
) -> dict[str, Any]:
    """All that decides the embeddings, in JSON.

    Args:
        folder: Verified checkpoint.
        config: Its configuration, with overrides.
        settings: How images become embeddings.
        images: What is embedded.
        part_rows: Images of a part.
    """
    dtype = settings.matmul_dtype
    return {
        "checkpoint": checkpoint_identity(folder, config),
        "data": images.identity(),
        "transform": asdict(settings.transform),
        "precision": "fp32" if dtype is None else str(dtype).removeprefix("torch."),
        "device": settings.device.type,
        "batch_size": settings.batch_size,
        "part_images": part_rows,
    }


def checkpoint_identity(folder: Path, config: Config) -> dict[str, str]:
    """Where a checkpoint is, and checksums of the metric model's weights and of its settings.

    Raises:
        DataError: Its manifest lists no metric model.
    """
    listing = read_json(folder / checkpoint.MANIFEST, "Use another checkpoint.")
    weights = listing.get("metric_model.safetensors")
    if not isinstance(weights, dict):
        raise DataError(f"Checkpoint {folder} lacks metric_model.safetensors. Use another checkpoint.")
    model = json.dumps(asdict(config.model), sort_keys=True, default=str)
    return {
        "path": str(folder),
        "metric_model_sha256": str(weights["sha256"]),
        "model_sha256": hashlib.sha256(model.encode()).hexdigest(),
    }


def part_rows_of(target: IndexTarget, settings: EmbeddingSettings) -> int:
    """Images of a part, a whole number of batches."""
    return -(-target.part_images // settings.batch_size) * settings.batch_size
