"""Contract of the arguments of `gcahng.metrics.retrieval`, one clear error each.

Shapes: Q queries, G gallery items, D embedding channels.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from gcahng.errors import InputError
from gcahng.metrics.tiles import has_fast_bf16

Precision = Literal["auto", "bf16", "fp32"]
_ROWS_AT_ONCE = 4096
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_embeddings(name: str, embeddings: Tensor, *, may_be_empty: bool = False) -> None:
    """Ask for a non-empty (rows, D) floating-point tensor; with `may_be_empty` for one that may have no rows.

    Raises:
        InputError: not a tensor, not two-dimensional, empty, or not floating point.
    """
    if not isinstance(embeddings, Tensor):
        raise InputError(
            f"`{name}` must be a torch.Tensor: got {type(embeddings).__name__}. Convert it with torch.as_tensor."
        )
    shape = tuple(embeddings.shape)
    if embeddings.ndim != 2 or 0 in shape[may_be_empty:]:
        raise InputError(
            f"`{name}` must have shape (items, channels), both at least 1: got {shape}. Pass one row per image."
        )
    if not embeddings.is_floating_point():
        raise InputError(
            f"`{name}` must be floating point: got {embeddings.dtype}. Pass the embeddings, not indices or labels."
        )


def check_finite(name: str, embeddings: Tensor) -> None:
    """Ask for rows without NaN and infinity.

    Raises:
        InputError: names the first such row and counts them.
    """
    # By slices: the mask of the whole, and what it is made of, would be larger than the embeddings.
    finite = torch.cat([part.isfinite().all(dim=1) for part in embeddings.split(_ROWS_AT_ONCE)])
    if not bool(finite.all()):
        rows = finite.logical_not().nonzero().flatten()
        raise InputError(
            f"`{name}` must be finite: row {int(rows[0])} holds NaN or infinity ({len(rows)} of "
            f"{len(embeddings)} rows do). Look at the weights and at the image of that row."
        )


def check_labels(name: str, labels: Tensor, embedding_name: str, embeddings: Tensor) -> Tensor:
    """Ask for one integer label per embedding.

    Returns:
        The labels as int64, on the device of the embeddings.

    Raises:
        InputError: not a tensor, not integer, or not one per embedding.
    """
    if not isinstance(labels, Tensor):
        raise InputError(
            f"`{name}` must be a torch.Tensor: got {type(labels).__name__}. Convert it with torch.as_tensor."
        )
    if labels.dtype not in LABEL_DTYPES:
        raise InputError(
            f"`{name}` must be integer class indices: expected torch.int64, got {labels.dtype}. "
            "Number the classes; floating point cannot tell large class indices apart."
        )
    if tuple(labels.shape) != (len(embeddings),):
        raise InputError(
            f"`{name}` must have one entry per row of `{embedding_name}`: expected shape "
            f"({len(embeddings)},), got {tuple(labels.shape)}. Check how the two were collected."
        )
    return labels.to(device=embeddings.device, dtype=torch.int64)


def check_pair(query: Tensor, gallery: Tensor) -> None:
    """Ask for queries and gallery of one embedding space on one device.

    Raises:
        InputError: the channels or the devices differ.
    """
    if query.shape[1] != gallery.shape[1]:
        raise InputError(
            f"`gallery` must have as many channels as `query`: expected {query.shape[1]}, "
            f"got {gallery.shape[1]}. Embed both with the same model."
        )
    if query.device != gallery.device:
        raise InputError(
            f"`gallery` must be on the device of `query`: expected {query.device}, "
            f"got {gallery.device}. Move one of them."
        )


def check_ranks(name: str, ranks: Iterable[int], num_candidates: int) -> tuple[int, ...]:
    """Ask for whole ranks between 1 and the number of candidates of a query.

    Raises:
        InputError: a rank is not an integer or lies outside of that range.
    """
    kept = tuple(ranks)
    for rank in kept:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise InputError(
                f"`{name}` must be integers: got {rank!r} ({type(rank).__name__}). Pass them as in ks=(1, 10, 100)."
            )
        if not 1 <= rank <= num_candidates:
            raise InputError(
                f"`{name}` must lie between 1 and the number of candidates of a query "
                f"({num_candidates}; a query is no candidate of its own): got {rank}. "
                "Drop it or use a larger gallery."
            )
    return kept


def check_memory(memory_mb: int) -> None:
    """Ask for a positive number of MiB.

    Raises:
        InputError: It is none.
    """
    if isinstance(memory_mb, bool) or not isinstance(memory_mb, int) or memory_mb < 1:
        raise InputError(f"`memory_mb` must be a positive integer: got {memory_mb!r}. Leave it out for 512.")


def use_low_precision(precision: str, device: torch.device) -> bool:
    """Whether tiles of scores are computed in bfloat16.

    Raises:
        InputError: An unknown precision.
    """
    if precision not in get_args(Precision):
        raise InputError(f"`precision` must be one of {', '.join(get_args(Precision))}: got {precision!r}.")
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))
