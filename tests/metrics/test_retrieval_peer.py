"""The same values as pytorch-metric-learning on data without ties."""

import pytest
import torch

from gcahng.metrics import retrieval

calculators = pytest.importorskip(
    "pytorch_metric_learning.utils.accuracy_calculator",
    reason="pytorch-metric-learning is not installed",
)
distances = pytest.importorskip("pytorch_metric_learning.distances")
inference = pytest.importorskip("pytorch_metric_learning.utils.inference")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("with_gallery", [False, True])
def test_agrees_with_accuracy_calculator(with_gallery: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(400, generator=generator) ** 2 * 40).to(torch.int64)
    centres = torch.randn(40, 16, generator=generator)
    x = centres[labels] + 1.5 * torch.randn(400, 16, generator=generator)
    arguments = (x[:150], labels[:150], x[150:], labels[150:]) if with_gallery else (x, labels)
    mine = retrieval(*arguments, ks=(1,))
    calculator = calculators.AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        # Their default search needs faiss.
        knn_func=inference.CustomKNN(distances.CosineSimilarity()),
    )
    theirs = calculator.get_accuracy(*arguments)
    assert mine.recall_at_k[1] == pytest.approx(theirs["precision_at_1"], abs=1e-9)
    assert mine.r_precision == pytest.approx(theirs["r_precision"], abs=1e-9)
    assert mine.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-9)
