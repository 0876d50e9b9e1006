"""What the losses refuse: each case ends in one clear error."""

import pytest
import torch

from gcahng.errors import InputError
from gcahng.generation import generate_negatives
from gcahng.losses import NPairPlusLoss, ProxyAnchorLoss, similarity_loss, synthetic_n_pair_loss

LABELS = torch.arange(2).repeat(2)


def broken() -> torch.Tensor:
    z = torch.randn(4, 3)
    z[2, 1] = float("nan")
    return z


@pytest.mark.parametrize("loss", [NPairPlusLoss(), ProxyAnchorLoss(2, 3)])
def test_non_finite_embeddings_are_named(loss) -> None:
    with pytest.raises(InputError, match="`embeddings` must be finite: 1 of 4 .* first at position 2"):
        loss(broken(), LABELS)


def test_generation_names_them_too() -> None:
    with pytest.raises(InputError, match="`z` must be finite: 1 of 4 .* position 2"):
        generate_negatives(broken(), LABELS, None, alpha=1.0)


def test_labels_that_are_no_tensor() -> None:
    with pytest.raises(InputError, match="`labels` must be a tensor of class numbers: got list"):
        NPairPlusLoss()(torch.randn(4, 3), [0, 1, 0, 1])  # type: ignore[arg-type]


def test_embeddings_that_are_no_tensor() -> None:
    with pytest.raises(InputError, match="`embeddings` must be a tensor: got list"):
        NPairPlusLoss()([[0.0]], LABELS)  # type: ignore[arg-type]


def test_widths_that_differ() -> None:
    with pytest.raises(InputError, match="`candidates` must have as many channels .* expected 3, got 5"):
        NPairPlusLoss()(torch.randn(4, 3), LABELS, torch.randn(4, 5), LABELS)
    with pytest.raises(InputError, match="`embeddings` must have as many channels as `proxies`: expected 7, got 3"):
        ProxyAnchorLoss(2, 7)(torch.randn(4, 3), LABELS)


def test_an_empty_batch_of_proxy_anchor() -> None:
    with pytest.raises(InputError, match="`embeddings` is empty"):
        ProxyAnchorLoss(2, 3)(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("loss", [synthetic_n_pair_loss, similarity_loss])
def test_a_table_with_other_columns_than_classes(loss) -> None:
    z = torch.randn(4, 3)
    with pytest.raises(InputError, match="one column per class of `labels`: expected 2, got 3"):
        loss(z, torch.randn(4, 3, 3), LABELS)
    with pytest.raises(InputError, match="4 samples are no multiple of 3"):
        loss(z, torch.randn(4, 3, 3))
    with pytest.raises(InputError, match=r"`synthetic` must have shape \(B, P, D\)"):
        loss(z, torch.randn(4, 2, 5), LABELS)
