"""States of a process's random generators as tensors, so that a checkpoint can hold them without pickles.

Every draw of the library itself is a function of seed, step and rank (`gcahng.random`) and needs no state. An own
backbone, loss or sampler may draw from torch's, numpy's and Python's generators: they are seeded when a run begins, and
their states are kept, each rank's.
"""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gcahng.random import stream_key

_NUMPY = "MT19937"


def seed_generators(seed: int, rank: int) -> None:
    """Begin torch's, numpy's and Python's generators as a function of the run's seed and the rank."""
    key = stream_key(seed, "process", rank)
    torch.manual_seed(key >> 1)
    np.random.seed(key % 2**32)
    random.seed(key)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators (of the CPU, and of `device` if that is CUDA), numpy's and Python's."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == _NUMPY and isinstance(keys, np.ndarray)
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on where `random_states` was called; what it did not have stays as it is."""
    if not states:
        return
    torch.set_rng_state(states["torch"])
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state((_NUMPY, keys, position, has_gauss, float(states["numpy_gauss"])))
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
