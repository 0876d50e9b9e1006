"""What the losses refuse: each case ends in one clear error."""

import math

import pytest
import torch
from host_waits import noted

from gcahng.errors import InputError
from gcahng.generation import generate_negatives
from gcahng.layout import BatchLayout
from gcahng.losses import NPairLoss, NPairPlusLoss, ProxyAnchorLoss, similarity_loss, synthetic_n_pair_loss

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


def grouped(labels: torch.Tensor, num_samples: int) -> BatchLayout:
    num_classes = labels.numel() // num_samples
    return BatchLayout(num_classes, num_samples, torch.arange(labels.numel()), labels[:num_classes])


@pytest.mark.parametrize("loss", [NPairPlusLoss(), NPairLoss(), ProxyAnchorLoss(9, 3).double()])
def test_a_known_layout_changes_no_number_and_reads_none(loss) -> None:
    labels = torch.tensor([7, 2, 4]).repeat(2)
    values = []
    for layout in (None, grouped(labels, 2)):
        z = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with noted() as waits:
            value = loss(z, labels, layout=layout)
            value.backward()
        assert bool(waits) == (layout is None)
        values.append((value, z.grad, [p.grad for p in loss.parameters()]))
        loss.zero_grad(set_to_none=True)
    torch.testing.assert_close(*values, rtol=0, atol=0)
    assert loss(torch.full((6, 3), math.nan).double(), labels, layout=grouped(labels, 2)).isnan()


def test_shapes_are_checked_with_a_known_layout_too() -> None:
    layout = grouped(LABELS, 2)
    for loss in (NPairPlusLoss(), ProxyAnchorLoss(2, 3)):
        with pytest.raises(InputError, match="one entry per embedding"):
            loss(torch.randn(5, 3), LABELS, layout=layout)
    with pytest.raises(InputError, match="exactly twice .* got K = 3"):
        NPairLoss()(torch.randn(6, 3), torch.arange(2).repeat(3), layout=grouped(torch.arange(2).repeat(3), 3))
