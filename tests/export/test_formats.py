"""Files of every kind of backbone give the embeddings of the model, at any batch size."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.data.images.transform_settings import transform_settings
from gcahng.errors import InputError
from gcahng.export.check import agreement
from gcahng.export.formats import FORMATS, OPSET, capture
from gcahng.export.model import ExportedModel
from gcahng.models import Backbone, Embedder, build_embedder

ROOT = Path(__file__).parents[2]
SIZE = 32
TRANSFORM = transform_settings("gca_hng", image_size=SIZE)
# Each kind of the configurations, small, with every pooling.
BACKBONES: dict[str, dict[str, Any]] = {
    "small_conv": {"backbone_args": {"widths": [4, 8]}, "pooling": "avg+max"},
    "resnet10t": {"pooling": "avg+max", "freeze_batch_norm": True},
    "torchvision/googlenet": {"pooling": "max"},
    "vit_tiny_patch16_224.augreg_in21k": {
        "backbone_args": {"img_size": SIZE, "depth": 1},
        "pooling": "cls",
        "head_init": "orthogonal",
    },
    "deit_tiny_distilled_patch16_224": {"backbone_args": {"img_size": SIZE, "depth": 1}, "pooling": "avg"},
}
METADATA = {"backbone": "the backbone", "mean": [0.5, 0.25], "step": 7}


def trained_like(embedder: Embedder) -> Embedder:
    """Running statistics and weights of BatchNorm as after training: fresh ones say nothing."""
    draws = torch.Generator().manual_seed(3)
    for module in embedder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=draws)
            module.running_var.uniform_(0.5, 2, generator=draws)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=draws)
    return embedder


def make_embedder(backbone: str) -> Embedder:
    torch.manual_seed(0)
    return trained_like(build_embedder(backbone, embedding_dim=6, **BACKBONES[backbone]))


def images(count: int) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )


def exact(embedder: Embedder, pixels: Tensor) -> Tensor:
    """The embeddings in float64, from the definition of the transform."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (TRANSFORM.mean, TRANSFORM.std))
    training = embedder.training
    with torch.no_grad():
        z = embedder.double().eval()((pixels.double() / 255 - mean) / std)
    embedder.float().train(training)
    return z


def assert_same_embeddings(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32
    # float32 in another order of sums; see gcahng.export.check.TOLERANCE.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("backbone", "name", "options"),
    [
        ("small_conv", "onnx", False),
        ("small_conv", "torch-export", True),
        ("resnet10t", "onnx", True),
        ("torchvision/googlenet", "onnx", True),
        ("vit_tiny_patch16_224.augreg_in21k", "onnx", True),
        ("deit_tiny_distilled_patch16_224", "torch-export", False),
    ],
)
def test_a_file_gives_the_embeddings_of_the_model(backbone: str, name: str, options: bool, tmp_path: Path) -> None:
    """`options`: bytes in, unit vectors out."""
    embedder = make_embedder(backbone)
    model = ExportedModel(embedder, TRANSFORM, preprocess=options, l2_normalise=options)
    path = tmp_path / f"model{FORMATS[name].suffix}"
    FORMATS[name].write(capture(model, model.inputs(images(8)), "it"), path, METADATA)
    embed = FORMATS[name].open(path)
    for count in (1, 3, 8):
        pixels = images(count)
        want = exact(embedder, pixels)
        assert_same_embeddings(embed(model.inputs(pixels)), F.normalize(want, dim=1) if options else want)
    assert str(ROOT).encode() not in path.read_bytes(), "paths of this machine are nobody's business"


def test_an_onnx_file_says_what_it_holds(tmp_path: Path) -> None:
    model = ExportedModel(make_embedder("small_conv"), TRANSFORM, preprocess=True)
    FORMATS["onnx"].write(capture(model, model.inputs(images(8)), "it"), tmp_path / "m.onnx", METADATA)
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    graph = onnx.load(tmp_path / "m.onnx")
    assert [(e.domain, e.version) for e in graph.opset_import] == [("", OPSET)]
    (entry,), (result,) = graph.graph.input, graph.graph.output
    assert (entry.name, result.name) == ("images", "embeddings")
    shape = [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
    assert shape == ["batch", SIZE, SIZE, 3] and entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    held = {prop.key: prop.value for prop in graph.metadata_props}
    assert held == {"backbone": "the backbone", "mean": "[0.5, 0.25]", "step": "7"}


class Own(nn.Module):
    num_features = 3


class Decomposing(Own):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x[:, :, :3, :3])[..., None]


class OfTwo(Own):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3, SIZE, SIZE)


class Deciding(Own):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


class LeavingTorch(Own):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


REFUSED = {
    Decomposing: "Backbone `own` cannot be exported to ONNX: ONNX has no counterpart of the operator aten._linalg_eigh",
    OfTwo: "Backbone `own` cannot be exported: its code works for batches of 2 images only",
    Deciding: "Backbone `own` cannot be exported: what it computes depends on the values of a tensor",
    LeavingTorch: "Backbone `own` cannot be exported: RuntimeError: .numpy",
}


@pytest.mark.parametrize("backbone", REFUSED)
def test_a_backbone_that_cannot_be_exported_is_named_with_the_reason(backbone: type[Own], tmp_path: Path) -> None:
    model = ExportedModel(Embedder(Backbone(backbone(), 3), 6), TRANSFORM)
    with pytest.raises(InputError) as refused:
        FORMATS["onnx"].write(capture(model, model.inputs(images(2)), "own"), tmp_path / "m.onnx", {"backbone": "own"})
    assert str(refused.value).startswith(REFUSED[backbone])
    assert not list(tmp_path.iterdir())


def test_a_file_that_onnxruntime_cannot_run_is_an_error_of_input(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="onnxruntime cannot run the exported model: InvalidProtobuf"):
        FORMATS["onnx"].open(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ([[3.0, 4.001], [0.3, 0.4]], "by more than the tolerance 1.0e-04. pictures: largest difference 2.5e-04 of the"),
        (
            [[3.0, 4.0], [0.3, 0.4001]],
            "largest difference 2.5e-04 of the",
        ),  # small embeddings have a scale of their own
        ([[3.0, 4.0], [0.3, float("nan")]], "largest difference nan"),
        ([[3.0, 4.0]], r"expected \(2, 2\) torch.float32, got \(1, 2\)"),
    ],
)
def test_a_difference_is_refused(got: list[list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        agreement("pictures", torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor(got))


def test_what_agrees_is_put_in_numbers() -> None:
    want = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    found = agreement("pictures", want, want + torch.tensor([[2e-4, 0.0], [0.0, 0.0]]))
    assert found.difference == pytest.approx(5e-5, rel=1e-2)
    assert agreement("unit", want[:1], want[:1]).cosine == pytest.approx(1, abs=1e-12)
    with pytest.raises(InputError, match="of pictures are not finite: the checkpoint diverged"):
        agreement("pictures", want * float("inf"), want)
