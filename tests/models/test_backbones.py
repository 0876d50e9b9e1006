import sys
import urllib.error

import huggingface_hub
import pytest
import timm
import torch
from torchvision.models import GoogLeNet_Weights, googlenet

import gcahng.models.googlenet as googlenet_module
from gcahng.errors import ConfigError, InputError
from gcahng.models import Backbone, build_backbone
from gcahng.models.build import needs_no_trust


def test_timm_map_equals_timms_own_features():
    backbone = build_backbone("resnet18.tv_in1k").eval()
    assert (backbone.num_features, backbone.num_prefix_tokens) == (512, 0)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features = backbone.forward_features(images)
        expected = backbone.network.forward_features(images)
    assert features.shape == (1, 512, 2, 2)
    assert torch.equal(features, expected)
    assert backbone.weight_source == "random initialisation"


def test_timm_tokens_and_class_token():
    backbone = build_backbone("vit_tiny_patch16_224", backbone_args={"img_size": 32}).eval()
    assert (backbone.num_features, backbone.num_prefix_tokens) == (192, 1)
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, 1 + 4, 192)
    assert backbone.patch_embed is backbone.network.patch_embed


def test_channels_last_maps_are_turned():
    arguments = {"img_size": 32, "patch_size": 2, "window_size": 2, "depths": (1, 1)}
    backbone = build_backbone(
        "swin_tiny_patch4_window7_224",
        backbone_args={**arguments, "embed_dim": 12, "num_heads": (1, 1)},
    ).eval()
    assert backbone.num_features == 24
    assert backbone(torch.rand(1, 3, 32, 32)).shape == (1, 24, 8, 8)


def test_a_convolution_behind_the_pooling_counts():
    backbone = build_backbone("mobilenetv3_small_050").eval()
    assert backbone(torch.rand(1, 3, 32, 32)).shape == (1, backbone.num_features, 1, 1)


def test_distilled_transformer():
    backbone = build_backbone("deit_tiny_distilled_patch16_224", backbone_args={"img_size": 32, "depth": 1})
    assert backbone.num_prefix_tokens == 2
    assert backbone.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 2 + 4, 192)


def test_wrong_image_size_says_where_to_set_it():
    backbone = build_backbone("vit_tiny_patch16_224", backbone_args={"img_size": 32, "depth": 1})
    with pytest.raises(
        InputError,
        match=r"refuses images of shape \(1, 3, 48, 48\): .*Set data.transform.image_size",
    ):
        backbone(torch.rand(1, 3, 48, 48))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", r"Unknown backbone `resnet5O`\. Did you mean .*`resnet50`"),
        (
            "resnet51.tv_in1k",
            r"Unknown backbone `resnet51.tv_in1k`\. Did you mean .*`resnet51q`",
        ),
        ("smallconv", r"Unknown backbone `smallconv`\. Did you mean .*`small_conv`"),
        (
            "zzzzzzzzzz",
            r"Unknown backbone `zzzzzzzzzz`\. Give a timm name, `torchvision/googlenet`",
        ),
        ("torchvision/resnet50", r"of torchvision's only `torchvision/googlenet` is offered"),
        ("resnet50.tv_in2k", r"Invalid pretrained tag .*Known tags: .*`resnet50.tv_in1k`"),
        ("no_such_package:Net", r"no module `no_such_package` can be imported"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(name)


def test_unknown_timm_argument():
    with pytest.raises(
        ConfigError,
        match=r"`resnet18` does not take model.backbone_args \{'img_sizes': 3\}: .*img_s",
    ):
        build_backbone("resnet18", backbone_args={"img_sizes": 3})


def test_impossible_timm_argument():
    with pytest.raises(ConfigError, match=r"timm cannot build backbone `vit_tiny_patch16_224` with"):
        build_backbone("vit_tiny_patch16_224", backbone_args={"num_heads": 5})


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network and empty caches: the hub's own offline switch, and an address nobody answers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


REPAIR = r"cannot be fetched \(\w+: .*\)\. Without network, .* pass model.weights=FILE"


def test_pretrained_without_network(offline):
    with pytest.raises(ConfigError, match=rf"weights of backbone `resnet18.tv_in1k` {REPAIR}"):
        build_backbone("resnet18.tv_in1k", pretrained=True)


def test_pretrained_googlenet_without_network(offline, monkeypatch):
    weights = GoogLeNet_Weights.IMAGENET1K_V1
    address = "http://127.0.0.1:9/googlenet-00000000.pth"
    monkeypatch.setattr(
        weights,
        "_value_",
        weights.value.__class__(url=address, transforms=weights.transforms, meta=weights.meta),
    )
    with pytest.raises(urllib.error.URLError):
        googlenet_module.download_googlenet()
    with pytest.raises(ConfigError, match=rf"weights of backbone `torchvision/googlenet` {REPAIR}"):
        build_backbone("torchvision/googlenet", pretrained=True)


def test_pretrained_where_none_are_published():
    name = next(n for n in timm.list_models() if not timm.is_model_pretrained(n))
    with pytest.raises(ConfigError, match=rf"no published weights for backbone `{name}`\. Choose"):
        build_backbone(name, pretrained=True)


def test_googlenet_equals_torchvisions_with_transformed_input():
    whole = googlenet(weights=None, aux_logits=False, transform_input=True, init_weights=False)
    backbone = build_backbone("torchvision/googlenet")
    assert backbone.num_features == 1024
    own = backbone.network.state_dict()
    backbone.network.load_state_dict({k: v for k, v in whole.state_dict().items() if k in own})
    whole.eval().double()
    backbone.eval().double()
    kept = {}
    whole.inception5b.register_forward_hook(lambda module, inputs, output: kept.update(map=output))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        whole(images)
        features = backbone(images)
    assert features.shape == (2, 1024, 2, 2)
    # The factors of the input are float32 constants here and Python floats in torchvision.
    torch.testing.assert_close(features, kept["map"], rtol=1e-5, atol=1e-10)
    plain = build_backbone("torchvision/googlenet", backbone_args={"transform_input": False})
    plain.network.load_state_dict(own | {k: v for k, v in whole.state_dict().items() if k in own})
    with torch.no_grad():
        other = plain.eval().double()(images)
    assert (other - features).abs().max() > 0.1 * features.abs().max()


OWN = """
from torch import nn


class Tiny(nn.Module):
    num_features = 6

    def __init__(self, stride=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=stride, padding=1)

    def forward(self, images):
        return self.conv(images)


class Flat(Tiny):
    num_features = "six"


def no_module():
    return 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_backbones.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_backbones"
    sys.modules.pop("own_backbones", None)


def test_own_backbone_by_dotted_path(own_module):
    for path in (f"{own_module}:Tiny", f"{own_module}.Tiny"):
        backbone = build_backbone(path, backbone_args={"stride": 2})
        assert isinstance(backbone, Backbone)
        assert backbone(torch.rand(1, 3, 8, 8)).shape == (1, 6, 4, 4)


def test_own_backbone_without_the_contract(own_module):
    with pytest.raises(ConfigError, match=r"must return a torch module .*: got Flat .*='six'"):
        build_backbone(f"{own_module}:Flat")
    with pytest.raises(ConfigError, match=r"got int with num_features=None"):
        build_backbone(f"{own_module}:no_module")
    with pytest.raises(ConfigError, match=r"does not take model.backbone_args \{'size': 3\}"):
        build_backbone(f"{own_module}:Tiny", backbone_args={"size": 3})
    with pytest.raises(ConfigError, match=r"has no published weights"):
        build_backbone(f"{own_module}:Tiny", pretrained=True)


@pytest.mark.parametrize(
    ("name", "arguments", "is_safe"),
    [
        ("small_conv", {"widths": [4, 8]}, True),
        ("torchvision/googlenet", {}, True),
        ("vit_tiny_patch16_224", {"img_size": 32, "dynamic_img_size": True, "drop_rate": 0.1}, True),
        ("subprocess:run", {"args": "x"}, False),
        ("nothing.of:this", {}, False),
        ("hf-hub:someone/model", {}, False),
        ("local-dir:folder", {}, False),
        ("resnet18", {"checkpoint_path": "weights.pth"}, False),
        ("resnet18", {"pretrained": True}, False),
        ("resnet18", {"pretrained_cfg": {"file": "weights.pth"}}, False),
        ("resnet18", {"sizes": [1, "weights.pth"]}, False),
    ],
)
def test_what_needs_no_trust(name, arguments, is_safe):
    assert needs_no_trust(name, arguments) is is_safe
