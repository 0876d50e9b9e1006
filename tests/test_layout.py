"""The group-major layout of a batch in any order, and what is refused."""

import pytest
import torch

from gcahng.errors import InputError
from gcahng.layout import check_embeddings, check_labels, check_same_width, group_major


def test_a_group_major_batch_keeps_its_order() -> None:
    layout = group_major(torch.tensor([7, 2, 9, 7, 2, 9]))
    assert (layout.num_classes, layout.num_samples) == (3, 2)
    assert layout.order.tolist() == list(range(6))
    assert layout.class_labels.tolist() == [7, 2, 9]


def test_any_order_is_sorted_stably() -> None:
    # Classes in the order of their first sample: 5, 1, 3; samples of a class in their own order.
    labels = torch.tensor([5, 5, 1, 3, 1, 5, 3, 3, 1])
    layout = group_major(labels)
    assert layout.class_labels.tolist() == [5, 1, 3]
    assert layout.order.tolist() == [0, 2, 3, 1, 4, 6, 5, 8, 7]


@pytest.mark.parametrize("seed", range(5))
def test_every_permutation_gives_groups_of_all_classes(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor([4, -1, 8, 30]).repeat(5)[torch.randperm(20, generator=draw)]
    layout = group_major(labels)
    assert sorted(layout.order.tolist()) == list(range(20))
    groups = layout.order.view(5, 4)
    assert (labels[groups] == layout.class_labels).all()
    assert (groups[1:] > groups[:-1]).all()  # stable: earlier samples in earlier groups


def test_one_class_and_one_sample() -> None:
    assert group_major(torch.tensor([3, 3])).order.tolist() == [0, 1]
    assert group_major(torch.tensor([3, 1])).num_samples == 1


def test_classes_of_unequal_size_are_listed() -> None:
    message = r"most classes have 2 samples, but class 4 has 1, class 9 has 3\. Use a class-balanced"
    with pytest.raises(InputError, match=message):
        group_major(torch.tensor([9, 9, 9, 4, 1, 1, 2, 2, 5, 5]))


def test_of_two_equally_common_sizes_the_smaller_one_offends() -> None:
    with pytest.raises(InputError, match=r"most classes have 3 samples, but class 1 has 2\."):
        group_major(torch.tensor([0, 0, 0, 1, 1]))


def test_a_long_list_of_offenders_is_cut() -> None:
    labels = torch.cat([torch.arange(13), torch.arange(100, 120).repeat(2)])
    with pytest.raises(InputError, match=r"class 9 has 1 and 3 more classes"):
        group_major(labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.complex64])
def test_labels_that_are_no_integers(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"integer class numbers: expected int64, got {dtype}"):
        group_major(torch.ones(4).to(dtype))


def test_labels_of_a_wrong_shape() -> None:
    with pytest.raises(InputError, match=r"expected shape \(2,\), got \(2, 2\)"):
        group_major(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"expected shape \(0,\), got \(\)"):
        group_major(torch.tensor(3))


def test_no_labels() -> None:
    with pytest.raises(InputError, match="`labels` is empty: expected at least one sample"):
        group_major(torch.empty(0, dtype=torch.int64))


def test_embeddings_that_are_no_float_matrix() -> None:
    check_embeddings(torch.ones(2, 3))
    for wrong in (torch.ones(2), torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"`gallery` must be a floating tensor of shape"):
            check_embeddings(wrong, "gallery")


def test_what_is_no_tensor() -> None:
    with pytest.raises(InputError, match=r"`labels` must be a tensor of class numbers: got list\. Use torch.as_tensor"):
        check_labels([0, 1], 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`embeddings` must be a tensor: got list"):
        check_embeddings([[0.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite(bad: float) -> None:
    z = torch.zeros(4, 3)
    z[1, 2] = z[3, 0] = bad
    with pytest.raises(InputError, match="`z` must be finite: 2 of 4 embeddings are not, the first at position 1"):
        check_embeddings(z, "z")


def test_embeddings_of_another_width() -> None:
    check_same_width(torch.zeros(2, 3), torch.zeros(5, 3), "query", "gallery")
    with pytest.raises(InputError, match="`gallery` must have as many channels as `query`: expected 3, got 4"):
        check_same_width(torch.zeros(2, 3), torch.zeros(5, 4), "query", "gallery")
