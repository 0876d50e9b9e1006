import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from gcahng.errors import ConfigError, InputError
from gcahng.models import Backbone, Embedder, build_backbone, build_embedder


def small(**settings):
    settings = {"embedding_dim": 6} | settings
    return build_embedder("small_conv", backbone_args={"widths": (4, 8)}, **settings)


def vit(**settings):
    arguments = {"img_size": 32, "depth": 1}
    return build_embedder("vit_tiny_patch16_224", backbone_args=arguments, embedding_dim=6, **settings)


def images(count=4, size=16, dtype=torch.float32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def moments(model):
    return [
        buffer.clone()
        for module in model.backbone.modules()
        if isinstance(module, nn.BatchNorm2d)
        for buffer in (module.running_mean, module.running_var)
    ]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_forward_is_head_of_pooled_backbone():
    model = small(pooling="avg+max").eval()
    x = images()
    features = model.backbone(x)
    expected = model.head(features.mean((2, 3)) + features.amax((2, 3)))
    z = model(x)
    assert z.shape == (4, 6)
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)
    assert (z.norm(dim=1) - 1).abs().max() > 1e-3  # not normalised


def test_heads():
    assert [name for name, _ in small().head.named_children()] == ["norm", "linear"]
    assert isinstance(small().head.norm, nn.BatchNorm1d)
    assert [name for name, _ in small(head="linear").head.named_children()] == ["linear"]


def test_orthogonal_start():
    linear = small(head_init="orthogonal").head.linear
    torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(6), rtol=0, atol=1e-5)
    assert linear.bias.abs().max() == 0
    assert small().head.linear.bias.abs().max() > 0


def test_frozen_batch_norm_keeps_statistics_and_trains_affine_weights():
    model = small(freeze_batch_norm=True)
    model.eval()
    model.train()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert model.head.norm.training
    before = moments(model)
    model(images()).square().sum().backward()
    assert same(moments(model), before)
    assert all(norm.weight.grad is not None and norm.bias.grad is not None for norm in norms)


def test_batch_norm_that_is_not_frozen_moves():
    model = small()
    before = moments(model)
    model(images())
    assert not same(moments(model), before)


def test_frozen_batch_norm_survives_a_copy():
    model = copy.deepcopy(small(freeze_batch_norm=True)).train()
    before = moments(model)
    model(images())
    assert same(moments(model), before)


HEAD = {"head.norm.weight", "head.norm.bias", "head.linear.weight", "head.linear.bias"}


def test_warm_up_trains_the_head_alone():
    model = small(freeze_batch_norm=True)
    model(images()).sum().backward()
    model.set_warm_up(True)
    assert model.warm_up
    assert all(p.grad is None for p in model.backbone.parameters())  # no stale step
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.zero_grad()
    model(images()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == HEAD
    optimizer.step()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, start[name])}
    assert changed >= HEAD
    assert all(name.startswith("head.") for name in changed)
    model.set_warm_up(False)
    model(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_warm_up_leaves_no_trace_in_what_requires_gradients():
    # Wrappers that average gradients over processes look once, when they are made.
    model = small()
    for active in (True, False):
        model.set_warm_up(active)
        assert all(p.requires_grad for p in model.parameters())
    model.set_warm_up(True)
    with torch.no_grad():
        assert not model(images()).requires_grad
    assert model(images()).requires_grad


@pytest.mark.parametrize("freeze_batch_norm", [False, True])
def test_warm_up_is_training_with_a_frozen_backbone(freeze_batch_norm):
    model = small(freeze_batch_norm=freeze_batch_norm).double()
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, reference)]
    start = moments(model)
    for step in range(4):
        model.set_warm_up(step < 2)
        reference.backbone.requires_grad_(step >= 2)
        for trained, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            trained(images(dtype=torch.float64) + step).square().sum().backward()
            optimizer.step()
        assert same(model.state_dict().values(), reference.state_dict().values())
        # In the warm-up too: as in the released code.
        assert same(moments(model), start) is freeze_batch_norm
    counts = {name: int(optimizers[0].state[p]["step"]) for name, p in model.named_parameters()}
    assert counts == {name: 4 if name in HEAD else 2 for name in counts}


def test_frozen_patch_embedding_stays_frozen_after_the_warm_up():
    model = vit(pooling="cls", freeze_patch_embed=True)
    patch = {f"backbone.network.patch_embed.proj.{name}" for name in ("weight", "bias")}
    for active in (False, True, False):
        model.set_warm_up(active)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == patch
    model(images(2, 32)).sum().backward()
    assert model.backbone.network.patch_embed.proj.weight.grad is None
    assert model.backbone.network.cls_token.grad is not None


def test_autocast_gives_float32_near_to_full_precision():
    model = small().eval()
    exact = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = model(images())
    assert lower.dtype == torch.float32
    assert not torch.equal(lower, exact)
    torch.testing.assert_close(lower, exact, rtol=3e-2, atol=3e-2)  # bfloat16 has 8 bits
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images()).square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("build", [small, vit])
def test_float64(build):
    model = build(pooling="avg").double()
    z = model(images(4, 32, torch.float64))
    assert z.dtype == torch.float64
    z.sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "gem"}, r"model.pooling must be one of avg, max, avg\+max, cls: got 'gem'"),
        ({"head": "mlp"}, r"model.head must be one of bn_linear, linear: got 'mlp'"),
        ({"head_init": "zero"}, r"model.head_init must be one of default, orthogonal: got 'zero'"),
        ({"pooling": "cls"}, r"model.pooling is cls, but the backbone has no class token"),
        (
            {"freeze_patch_embed": True},
            r"freeze_patch_embed is true, but the backbone has no patch",
        ),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        small(**settings)


def test_nothing_to_freeze():
    with pytest.raises(ConfigError, match=r"freeze_batch_norm is true, but the backbone has no Batch"):
        vit(freeze_batch_norm=True)


def test_wrong_number_of_channels():
    backbone = Backbone(nn.Conv2d(3, 5, 1), num_features=7)
    with pytest.raises(InputError, match=r"`num_features`: expected 7, got 5\. Correct its"):
        Embedder(backbone, 4)(images())


def test_own_head_sees_all_of_build_embedder():
    model = build_embedder(
        "small_conv",
        embedding_dim=5,
        pooling="max",
        head="linear",
        head_init="orthogonal",
        backbone_args={"widths": (4, 8)},
        freeze_batch_norm=True,
    )
    assert (model.pooling, model.embedding_dim, model.backbone.num_features) == ("max", 5, 8)
    assert isinstance(build_backbone("small_conv"), Backbone)


@pytest.mark.parametrize("freeze_patch_embed", [False, True])
def test_what_an_own_backbone_froze_stays_frozen(freeze_patch_embed):
    layers = {"stem": nn.Conv2d(3, 4, 1), "patch_embed": nn.Conv2d(4, 4, 1), "last": nn.Conv2d(4, 5, 1)}
    layers["stem"].requires_grad_(False)
    backbone = Backbone(nn.Sequential(OrderedDict(layers)), num_features=5)
    model = Embedder(backbone, 4, freeze_patch_embed=freeze_patch_embed)

    def trained():
        return [name for name, layer in layers.items() if all(p.requires_grad for p in layer.parameters())]

    want = ["last"] if freeze_patch_embed else ["patch_embed", "last"]
    for active in (False, True, False):
        model.set_warm_up(active)
        assert trained() == want
