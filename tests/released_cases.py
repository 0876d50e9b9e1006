"""Models as the authors' code builds them (structure and names of its state dictionaries), with random weights.

The backbones are torchvision's and, in facebook's naming, a vision transformer written out here; the graph network is
that of a golden file, whose entries come from the released code itself.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = ("cub_like", "sop_like", "four_per_class")
# Sizes of small models: a golden file's D, and a vision transformer for images of 16 x 16.
DIM = 8
NARROW = {"base_width": 4}  # of a ResNet-50, as timm names it: a sixteenth of the usual width inside its blocks
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return dict(archive)


def golden_state(name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What a golden file's iterations start from: a released state dictionary whose metric model is a head alone."""
    start = {key.removeprefix("init/"): v for key, v in golden_arrays(name).items() if key.startswith("init/")}
    found = {key: torch.from_numpy(np.array(value)) for key, value in start.items()}
    return {k: t.to(dtype) if dtype is not None and t.is_floating_point() else t for k, t in found.items()}


class PooledResNet(nn.Module):
    """GCA-HNG's ResNet-50: torchvision's under `model`, its classifier in no use, average pool plus max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.resnet50(weights=None, width_per_group=NARROW["base_width"])

    def forward(self, images: Tensor) -> Tensor:
        # All but the average pool and the classifier.
        x: Tensor = nn.Sequential(*list(self.model.children())[:-2])(images)
        return x.amax((2, 3)) + nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)


class BareGoogLeNet(torchvision.models.GoogLeNet):
    """GCA-HNG's GoogLeNet: torchvision's up to its classifier, which stays in the file."""

    def __init__(self, *, aux_logits: bool = False) -> None:
        super().__init__(aux_logits=aux_logits, transform_input=True, init_weights=False)

    def forward(self, images: Tensor) -> Tensor:
        taken: list[Tensor] = []
        with self.fc.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0])):
            super().forward(images)
        return taken[0]


class _Block(nn.Module):
    """A transformer block in facebook's naming."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(dim, 3 * dim)
        self.attn.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(dim, 4 * dim)
        self.mlp.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        query, key, value = (
            t.view(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for t in self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        shares = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn.proj((shares @ value).transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class FacebookViT(nn.Module):
    """DINO's vision transformer at the size of `VIT`; its features are the class token."""

    def __init__(self, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.blocks = nn.ModuleList(_Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x)[:, 0]
        return features


class Extractor(nn.Module):
    """GCA-HNG's metric model."""

    def __init__(self, backbone: nn.Module, num_features: int, dim: int = DIM) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.BatchNorm1d(num_features), nn.Linear(num_features, dim))
        self.backbone = backbone
        randomise(self)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.fc(self.backbone(images))
        return embeddings


def randomise(model: nn.Module) -> None:
    """Weights of BatchNorm layers off their start, in evaluation mode."""
    draw = torch.Generator().manual_seed(3)
    for norm in _norms(model):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=draw))
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.fill_(12)
    model.eval()


def settle(model: nn.Module, images: Tensor) -> None:
    """Statistics of BatchNorm layers as of these images: a random start maps all images to nearly one embedding."""
    for norm in _norms(model):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    model.eval()


def _norms(model: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    return [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)]


def small_extractor(seed: int = 0) -> Extractor:
    """The metric model of `small_state`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Extractor(FacebookViT(**VIT), VIT["embed_dim"])


def small_state(seed: int = 0) -> dict[str, Tensor]:
    """A whole released state dictionary: a small vision transformer with a golden file's graph and classifier."""
    rest = golden_state("four_per_class", torch.float32)
    extractor = small_extractor(seed).state_dict()
    return {f"feature_extractor.{name}": tensor for name, tensor in extractor.items()} | {
        name: tensor for name, tensor in rest.items() if not name.startswith("feature_extractor.")
    }


# Settings of the configuration that `small_state` belongs to.
SMALL: dict[str, Any] = {
    "model.backbone": "vit_small_patch16_224.dino",
    "model.backbone_args": VIT,
    "model.pooling": "cls",
    "model.embedding_dim": DIM,
    "graph.num_layers": 2,
    "graph.num_heads": 2,
}


def assert_same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same keys, dtypes and bits."""
    assert got.keys() == want.keys()
    assert [k for k in want if got[k].dtype != want[k].dtype or not torch.equal(got[k], want[k])] == []
