import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from gcahng.errors import ConfigError
from gcahng.models import build_backbone
from gcahng.models.weights import load_weights, read_weight_file


def small(widths=(4, 8)):
    return build_backbone("small_conv", backbone_args={"widths": widths}).network


@pytest.fixture
def state():
    torch.manual_seed(5)
    return {name: torch.randn_like(t.float()).to(t.dtype) for name, t in small().state_dict().items()}


def test_whole_safetensors_file_through_the_builder(tmp_path, state, caplog):
    state["fc.weight"], state["fc.bias"] = torch.zeros(3, 8), torch.zeros(3)
    file = str(tmp_path / "w.safetensors")
    save_file(state, file)
    with caplog.at_level(logging.INFO, logger="gcahng"):
        backbone = build_backbone("small_conv", weights=file, backbone_args={"widths": (4, 8)})
    for name, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert backbone.weight_source == f"`{file}`: {len(state) - 2} tensors, dropped `fc.bias`, `fc.weight`"
    assert backbone.weight_source in caplog.text


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_torch_files_alone_or_wrapped(tmp_path, state, suffix, wrapper):
    renamed = {f"module.{name}": tensor for name, tensor in state.items()}
    content = state if wrapper is None else {wrapper: renamed, "epoch": 3}
    torch.save(content, tmp_path / f"w{suffix}")
    network = small()
    load_weights(network, str(tmp_path / f"w{suffix}"))
    assert all(torch.equal(t, state[name]) for name, t in network.state_dict().items())


def test_files_without_batch_counters(state):
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    report = load_weights(small(), old)
    assert report == f"downloaded weights: {len(old)} tensors"


def test_mismatches_are_all_named(state):
    wide = small(widths=(6, 8)).state_dict()
    bad = {("other.weight" if k == "stem.1.bias" else k): v for k, v in wide.items()}
    network = small()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_weights(network, bad)
    message = str(caught.value)
    assert "missing `stem.1.bias`" in message
    assert "unknown `other.weight`" in message
    assert "`stem.0.weight` is (6, 3, 3, 3), expected (4, 3, 3, 3)" in message
    assert "Give the file of this architecture (model.weights)" in message
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_many_mismatches_are_counted():
    with pytest.raises(ConfigError, match=r"missing (`[\w.]+`, ){4}`[\w.]+` and \d+ more"):
        load_weights(small(), {"fc.weight": torch.zeros(1)})


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_pickles_are_not_run(tmp_path):
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w.pth` holds other things than tensors, .*best as .safet"):
        read_weight_file(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_unreadable_files(tmp_path, state):
    with pytest.raises(ConfigError, match=r"none.pth` does not exist\. Correct model.weights"):
        read_weight_file(tmp_path / "none.pth")
    save_file(state, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ConfigError, match=r"cut.safetensors` is no whole safetensors file: .*Fetch"):
        read_weight_file(tmp_path / "cut.safetensors")
    torch.save(state, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"cut.pth` cannot be read: .*Fetch it again"):
        read_weight_file(tmp_path / "cut.pth")
    for content, kind in (([1], "list"), ({}, "dict"), ({"a": 3}, "dict")):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ConfigError, match=rf"must hold a state dictionary .*: got {kind}\. Save"):
            read_weight_file(tmp_path / "odd.pth")


def test_published_torchvision_names_fit_timms_resnet(tmp_path):
    whole = timm.create_model("resnet18", pretrained=False)  # with fc, named as torchvision does
    save_file(whole.state_dict(), tmp_path / "r.safetensors")
    backbone = build_backbone("resnet18.tv_in1k", pretrained=True, weights=str(tmp_path / "r.safetensors"))
    assert torch.equal(backbone.network.conv1.weight, whole.conv1.weight)
    assert "dropped `fc.bias`, `fc.weight`" in backbone.weight_source


def test_transformer_file_is_fitted_to_another_image_size(tmp_path):
    whole = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    torch.save(whole.state_dict(), tmp_path / "v.pth")
    arguments = {"img_size": 32, "depth": 1}
    backbone = build_backbone("vit_tiny_patch16_224", weights=str(tmp_path / "v.pth"), backbone_args=arguments)
    assert torch.equal(backbone.network.blocks[0].attn.qkv.weight, whole.blocks[0].attn.qkv.weight)
    assert backbone.network.pos_embed.shape == (1, 1 + 4, 192)


def test_auxiliary_heads_of_googlenet_are_dropped(tmp_path):
    state = dict(build_backbone("torchvision/googlenet").network.state_dict())
    extra = {
        "aux1.conv.conv.weight": torch.zeros(2),
        "aux2.fc1.bias": torch.zeros(2),
        "fc.bias": torch.zeros(3),
    }
    torch.save(state | extra, tmp_path / "g.pth")
    backbone = build_backbone("torchvision/googlenet", pretrained=True, weights=str(tmp_path / "g.pth"))
    assert torch.equal(backbone.network.conv1.conv.weight, state["conv1.conv.weight"])
    assert "dropped `aux1.conv.conv.weight`, `aux2.fc1.bias`, `fc.bias`" in backbone.weight_source


def test_conversion_that_fails_is_reported(state):
    def convert(tensors: dict[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
        return {"a": tensors["not_there"]}

    with pytest.raises(ConfigError, match=r"not in a known form .* raised KeyError: 'not_there'\. Give"):
        load_weights(small(), state, convert=convert)
