"""The released evaluation's numbers on stored embeddings with long-tailed labels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gcahng.metrics import retrieval

GOLDEN = Path(__file__).parents[1] / "golden" / "retrieval.npz"
TOLERANCE = 1e-9  # shares of the same counts: only the order of a sum may differ


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["self", "qg"])
def test_matches_the_released_evaluation(golden: dict[str, np.ndarray], kind: str, dtype: torch.dtype) -> None:
    ks = [int(k) for k in golden[f"{kind}_k"]]
    sides = ["self"] if kind == "self" else ["query", "gallery"]
    arguments = []
    for side in sides:
        arguments += [torch.from_numpy(golden[f"{side}_x"]).to(dtype)]
        arguments += [torch.from_numpy(golden[f"{side}_y"])]
    result = retrieval(*arguments, ks=ks)
    assert [result.recall_at_k[k] for k in ks] == pytest.approx(golden[f"{kind}_recall"].tolist(), abs=TOLERANCE, rel=0)
    assert result.map_at_r == pytest.approx(float(golden[f"{kind}_map_at_r"]), abs=TOLERANCE)
    assert result.r_precision == pytest.approx(float(golden[f"{kind}_r_precision"]), abs=TOLERANCE)
