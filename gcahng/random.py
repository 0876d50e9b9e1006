"""Counter-based random numbers: every draw is a pure function of its coordinates.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64 tensors, so that the
same numbers come out on every device, in any chunk, on any rank, in a recomputation and after a resume.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def stream_key(*parts: int | str) -> int:
    """A 64-bit key for the stream named by `parts`, e.g. `stream_key(seed, "edge_dropout", step)`.

    Stable over processes, platforms and Python versions (BLAKE2b of the parts' text).
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word: int64 wraps around, which leaves the 64 bits of the product."""
    product = word * constant
    return (product >> 32) & _MASK, product & _MASK


def philox(key: int | tuple[Tensor, Tensor], counter: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64 tensors) for each entry of the broadcast counter.

    Args:
        key: 64 bits, see `stream_key`; or its low and high 32 bits as int64 scalars on the device of the counter.
        counter: One to four int64 tensors with values in [0, 2**32), broadcast against each other.
    """
    words = list(torch.broadcast_tensors(*counter))
    words += [torch.zeros_like(words[0])] * (4 - len(words))
    c0, c1, c2, c3 = words
    k0, k1 = (key & _MASK, (key >> 32) & _MASK) if isinstance(key, int) else key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def key_words(key: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A key as two scalars on a device, written there: nothing waits, and compiled code takes every key."""
    low, high = (torch.full((), word, dtype=torch.int64, device=device) for word in (key & _MASK, (key >> 32) & _MASK))
    return low, high


def to_uniform(word: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A 32-bit word as a number in [0, 1) with 24 bits, so that float32 and float64 hold the same value."""
    return (word >> 8).to(dtype) * 2.0**-24


def mixing_weights(
    num_samples: int,
    *,
    seed: int,
    step: int,
    phase: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The weights w ~ U[0, 1) that fuse a class's K interpolations, one per anchor and negative group.

    Args:
        num_samples: K.
        seed: Run seed.
        step: Global step.
        phase: "metric" or "generation"; each pass of a step has draws of its own.
    Returns:
        (K, K-1); entry [a, g-1] fuses negative group g for the anchors of group a.
    """
    # A handful of numbers through a few hundred small operations: drawn on the CPU, and sent without waiting.
    key = stream_key(seed, "mixing_weights", step, phase)
    anchor = torch.arange(num_samples)[:, None]
    negative = torch.arange(1, num_samples)[None, :]
    return _sent(to_uniform(philox(key, (anchor, negative))[0], dtype), device)


def picking_weights(
    num_samples: int,
    *,
    seed: int,
    step: int,
    phase: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Mixing weights of 0 and 1 that pick one of a class's K interpolations instead of mixing them.

    The paper's ablation "without random weighting" (GCA-HNG, IJCV 2024, table 3): an arbitrary interpolation of the set
    takes the place of their mixture. Its text leaves open whether each anchor and class choose for themselves. Here all
    anchors of a group pick the same negative group, for the released code draws its mixing weights by groups too:
    the two differ then in what is drawn, not in how often. Uniform over the K groups to one part in 2**32 / K.

    Args:
        num_samples, seed, step, phase, dtype, device: As for `mixing_weights`; the draws are of another stream.
    Returns:
        (K, K-1); row a holds 0 at the group that the anchors of group a pick, unless that is group 0, and 1 elsewhere:
        the fusion f = s_g + w_g (f - s_g) starts with group 0 and takes s_g where w_g is 0.
    """
    key = stream_key(seed, "fusion_picks", step, phase)
    words = philox(key, (torch.arange(num_samples),))[0]
    picked = (words * num_samples) >> 32
    return _sent((torch.arange(1, num_samples) != picked[:, None]).to(dtype), device)


def _sent(drawn: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device, without waiting for it."""
    if torch.device(device).type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)
