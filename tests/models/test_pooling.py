import pytest
import torch

from gcahng.errors import InputError
from gcahng.models import pool


def test_feature_map_by_hand():
    features = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[-1.0, -2.0], [-3.0, -6.0]]]])
    assert pool(features, "avg").tolist() == [[3.0, -3.0]]
    assert pool(features, "max").tolist() == [[6.0, -1.0]]
    assert pool(features, "avg+max").tolist() == [[9.0, -4.0]]


def test_tokens_leave_prefix_out_and_cls_takes_the_first():
    tokens = torch.tensor([[[100.0], [50.0], [1.0], [3.0]]])
    assert pool(tokens, "cls", 2).tolist() == [[100.0]]
    assert pool(tokens, "avg", 2).tolist() == [[2.0]]
    assert pool(tokens, "max", 2).tolist() == [[3.0]]
    assert pool(tokens, "avg", 0).tolist() == [[38.5]]


def test_map_and_tokens_agree():
    features = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    tokens = features.flatten(2).transpose(1, 2)
    for mode in ("avg", "max", "avg+max"):
        assert torch.equal(pool(features, mode), pool(tokens, mode))


@pytest.mark.parametrize(
    ("shape", "mode", "prefix", "message"),
    [
        (
            (1, 2, 3, 3),
            "cls",
            0,
            r"cls needs a class token, but the backbone returns a feature map",
        ),
        ((1, 4, 2), "cls", 0, r"this backbone has none \(num_prefix_tokens is 0\)"),
        (
            (1, 1, 2),
            "avg",
            1,
            r"avg needs patch tokens, .* only its 1 class token\(s\)\. Set .* cls",
        ),
        ((1, 2), "avg", 0, r"must return a feature map .*: got shape \(1, 2\)\. Leave out its own"),
        ((1, 4, 2), "gem", 0, r"`mode` must be one of avg, max, avg\+max, cls: got 'gem'"),
    ],
)
def test_refusals(shape, mode, prefix, message):
    with pytest.raises(InputError, match=message):
        pool(torch.zeros(shape), mode, prefix)
