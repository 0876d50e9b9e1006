"""Find the stored images nearest to others: query images from files, exact search in bounded memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gcahng.data.images.decode import decode_image
from gcahng.data.images.transform_settings import TransformSettings
from gcahng.data.images.transforms import eval_transform
from gcahng.data.tars.members import MAX_MEMBER_BYTES
from gcahng.data.tars.samples import IMAGE_EXTENSIONS
from gcahng.errors import ConfigError, DataError, InputError
from gcahng.metrics import checks
from gcahng.metrics.nearest import nearest_items, padded_items
from gcahng.metrics.unit_vectors import unit_vectors
from gcahng.models import Embedder
from gcahng.search.approximate import ApproximateIndex
from gcahng.search.embed import checkpoint_identity
from gcahng.search.index_info import IndexInfo
from gcahng.search.store import BLOCK_BYTES, EmbeddingStore, StoredRow
from gcahng.training import checkpoint
from gcahng.training.embedding import EmbeddingSettings, embed_batch, evaluating
from gcahng.training.evaluate_checkpoint import embedding_settings, load_metric_model

_WORKING_MB = 256


@dataclass(frozen=True)
class Match:
    """A stored image that was found.

    Attributes:
        rank: From 1.
        score: Cosine similarity with the query.
        index: Row of the store.
        row: Key, shard, label and class name.
    """

    rank: int
    score: float
    index: int
    row: StoredRow


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given, and the images below folders, sorted; hidden ones are left out.

    Raises:
        DataError: A path does not exist, or a folder has no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist: expected an image, or a folder of images. Check the path.")
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if _is_image(file.relative_to(path)) and file.is_file())
        if not inside:
            raise DataError(f"{path} has no image: expected files .{', .'.join(IMAGE_EXTENSIONS)}. Check the path.")
        found += inside
    return found


def _is_image(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


def read_image(file: Path) -> Image.Image:
    """Decode an image file as training and evaluation decode images.

    Raises:
        DataError: It cannot be read, is larger than 64 MiB, or is no image.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_MEMBER_BYTES + 1)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}). Check the path and its permissions.") from None
    if len(content) > MAX_MEMBER_BYTES:
        raise DataError(f"{file} is too large: expected at most {MAX_MEMBER_BYTES} bytes. Give a smaller image.")
    return decode_image(content, name=str(file), repair="Replace the file, or leave it out.")


def load_query_model(
    info: IndexInfo | None, path: Path | None = None, overrides: Sequence[str] = (), *, trust_components: bool = False
) -> tuple[Embedder, EmbeddingSettings]:
    """The model that made an index, with the transform that it was made with.

    Args:
        info: Of the index; None of a file that does not say what made it.
        path: Checkpoint folder, a link to one, or a file inside; by default the one that the index names.
        overrides: `section.key=value`, for example `train.device=cpu`.
        trust_components: See `load_metric_model`.
    Raises:
        ConfigError: There is no checkpoint, it is not the one that made the index, or it needs `trust_components`.
        DataError: The checkpoint is damaged.
    """
    if path is None:
        if info is None:
            raise ConfigError("These embeddings do not say which model made them. Name it with --checkpoint.")
        path = Path(info.checkpoint["path"])
        if not path.exists():
            raise ConfigError(f"The index was made by {path}, which is not there. Name the checkpoint (--checkpoint).")
    folder = checkpoint.find_checkpoint(path)
    model, config = load_metric_model(path, overrides, trust_components=trust_components)
    settings = embedding_settings(config)
    if info is None:
        return model, settings
    identity = checkpoint_identity(folder, config)
    for name, what in (("metric_model_sha256", "weights"), ("model_sha256", "settings of `model`")):
        if identity[name] != info.checkpoint[name]:
            raise ConfigError(
                f"Checkpoint {folder} is not the one that made the index: its {what} have sha256 {identity[name]}, "
                f"expected {info.checkpoint[name]}. Name the right one (--checkpoint), or make the index again."
            )
    transform = info.made_with.get("transform")
    try:
        return model, replace(settings, transform=TransformSettings(**(transform or {})))
    except TypeError as error:
        raise DataError(f"The index names an impossible transform ({error}). Make it again.") from None


def embed_files(model: Embedder, files: Sequence[Path], settings: EmbeddingSettings) -> Tensor:
    """Embeddings (Q, D) float32 of image files, on the CPU; a batch of them is in memory at a time.

    Raises:
        DataError: A file is no image.
        TrainingError: An embedding is not finite.
    """
    embeddings = [torch.empty(0, model.embedding_dim)]
    with evaluating(model):
        for start in range(0, len(files), settings.batch_size):
            batch = files[start : start + settings.batch_size]
            pixels = torch.stack([eval_transform(read_image(file), settings.transform) for file in batch])
            embeddings.append(embed_batch(model, pixels, settings, [str(file) for file in batch]))
    return torch.cat(embeddings)


def nearest_stored(
    store: EmbeddingStore,
    queries: Tensor,
    k: int,
    *,
    device: torch.device | str = "cpu",
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k nearest stored embeddings of each query by cosine similarity: exact, of equal ones the lower row first.

    The store is read block by block: memory is bounded by a few blocks, whatever its size.

    Args:
        store: n stored embeddings.
        queries: (Q, D) float.
        k: From 1 to n.
        device: Where scores are computed.
        block_bytes: Bytes of embeddings at a time.
    Returns:
        (Q, k) float32 scores and (Q, k) int64 rows, nearest first, on the CPU.
    Raises:
        InputError: Shapes do not fit, k is impossible, or a number is not finite.
    """
    if queries.ndim != 2 or queries.shape[1] != store.dim:
        raise InputError(
            f"`queries` must be (Q, {store.dim}) as the embeddings of {store.path}, got {tuple(queries.shape)}. Embed "
            "them with the model that made these."
        )
    if not 1 <= k <= store.count:
        raise InputError(f"`k` must be from 1 to the {store.count} embeddings of {store.path}, got {k}. Lower it.")
    checks.check_embeddings("queries", queries)
    checks.check_finite("queries", queries)
    unit, low = unit_vectors(queries.to(device)), checks.use_low_precision("auto", torch.device(device))
    best = unit.new_empty((len(queries), 0), dtype=torch.float64), unit.new_empty((len(queries), 0), dtype=torch.int64)
    for start, block in store.blocks(block_bytes):
        checks.check_finite(f"embeddings of {store.path}", block)
        labels = torch.zeros(len(block), dtype=torch.int64, device=device)
        items = padded_items(block.to(device), labels, start, low=low)
        found = nearest_items(unit, items, min(k, len(block)), None, memory_mb=_WORKING_MB)
        # Rows of earlier blocks come first, and a stable sort leaves equal scores in this order.
        scores, rows = torch.cat([best[0], found[0]], 1), torch.cat([best[1], found[1]], 1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        best = scores.gather(1, order), rows.gather(1, order)
    return best[0].float().cpu(), best[1].cpu()


def matches(store: EmbeddingStore, scores: Tensor, rows: Tensor) -> list[list[Match]]:
    """What was found for each query, with keys and classes.

    Args:
        store: Where it was found.
        scores: (Q, k).
        rows: (Q, k); a negative one (nothing found, of an approximate search) is left out.
    """
    return [
        [
            Match(rank, score, row, store.row(row))
            for rank, (score, row) in enumerate(zip(of_query, found, strict=True), start=1)
            if row >= 0
        ]
        for of_query, found in zip(scores.tolist(), rows.tolist(), strict=True)
    ]


def approximate_index(store: EmbeddingStore, kind: str) -> ApproximateIndex:
    """The faiss index that is kept in an index folder; built and kept if there is none.

    Args:
        store: Of a folder.
        kind: See `ApproximateIndex.build`.
    Raises:
        InputError: faiss is not installed, or there are too few embeddings.
        DataError: What is kept is damaged or of other embeddings, or the folder cannot be written to.
    """
    path = store.path / f"approximate-{kind}.faiss"
    if not path.is_file():
        index = ApproximateIndex.build(store.embeddings(), kind)
        index.save(path)
        return index
    index = ApproximateIndex.load(path)
    if (index.num_items, index.dim, index.kind) != (store.count, store.dim, kind):
        raise DataError(f"{path} is of other embeddings. Remove it: the next search builds it again.")
    return index


def printable(text: str) -> str:
    """The text with everything escaped that would move a terminal's cursor or colour: names come from data sets."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
