import pytest
import torch

from gcahng.errors import ConfigError
from gcahng.models import SmallConv, build_backbone


def test_shapes_sizes_and_arguments():
    net = SmallConv()
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 128, 4, 4)
    assert net.num_features == 128
    assert 250_000 < sum(p.numel() for p in net.parameters()) < 350_000
    small = SmallConv(in_channels=1, widths=(8, 12))
    # an odd side rounds up in both ways through a block
    assert small(torch.rand(2, 1, 7, 9)).shape == (2, 12, 4, 5)


def test_every_parameter_gets_a_gradient():
    net = SmallConv(widths=(4, 8))
    net(torch.rand(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_by_name():
    backbone = build_backbone("small_conv", backbone_args={"widths": [4, 8]})
    assert backbone.num_features == 8
    assert backbone(torch.rand(2, 3, 16, 16)).shape == (2, 8, 8, 8)
    assert backbone.patch_embed is None


@pytest.mark.parametrize("arguments", [{"widths": []}, {"widths": [4, 0]}, {"in_channels": 1.5}])
def test_impossible_widths(arguments):
    with pytest.raises(ConfigError, match=r"small_conv needs .*: got in_channels=.*backbone_args"):
        SmallConv(**arguments)


def test_unknown_argument():
    with pytest.raises(ConfigError, match=r"`small_conv` does not take model.backbone_args \{'width': 3\}: .*width"):
        build_backbone("small_conv", backbone_args={"width": 3})


def test_no_published_weights():
    with pytest.raises(ConfigError, match=r"`small_conv` has no published weights\. Set model.pre"):
        build_backbone("small_conv", pretrained=True)
