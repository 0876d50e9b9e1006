"""Feature variances: exact sums while images go by, every pooling, and the section of a real run."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gcahng.data.eval_loader import eval_loader
from gcahng.data.images.transforms import normalise
from gcahng.data.shards.reader import ShardSet
from gcahng.models import Embedder
from gcahng.models.backbone import Backbone
from gcahng.report.embedded import embed_runs
from gcahng.report.features import ChannelMoments, watched_features
from gcahng.report.run_data import RunData
from gcahng.report.section import Figure, Table
from gcahng.report.variance import variance_section
from gcahng.training.evaluate_checkpoint import embedding_settings, load_metric_model


@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 1, 30, 2), (40,), (0, 3, 0)])
def test_moments_of_parts_are_those_of_the_whole(sizes: Sequence[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [3e4 + torch.randn(size, 5, generator=draw) * torch.arange(1.0, 6) for size in sizes]
    moments = ChannelMoments()
    for part in parts:
        moments.add(part)
    whole = torch.cat(parts).double()
    torch.testing.assert_close(moments.mean, whole.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, whole.var(0, correction=0), rtol=1e-8, atol=1e-12)
    assert moments.count == len(whole)
    assert moments.total == pytest.approx(float(whole.var(correction=0)), rel=1e-8)
    assert moments.over_images == pytest.approx(float(whole.var(0, correction=0).mean()), rel=1e-8)


class Tokens(nn.Module):
    """Tokens of an image: two in front, then one per pixel of a 2 x 2 image."""

    def __init__(self, patches: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 6)
        self.patches = patches

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.linear(images.flatten(2).transpose(1, 2))
        return torch.cat([tokens[:, :2] * 3, tokens[:, : self.patches]], 1)


def test_tokens_are_pooled_in_every_way_and_the_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Embedder(Backbone(Tokens(), 6, 2), 4, pooling="cls").eval()
    images = torch.randn(10, 3, 2, 2)
    parts = images[:7], images[7:], images[:0]
    plain = [model(part) for part in parts]
    with watched_features(model) as found:
        watched = [model(part) for part in parts]
    assert all(torch.equal(one, other) for one, other in zip(watched, plain, strict=True))
    model(images)
    tokens = model.backbone(images).detach()
    patches = tokens[:, 2:]
    want = {
        "avg": patches.mean(1),
        "max": patches.amax(1),
        "avg+max": patches.mean(1) + patches.amax(1),
        "cls": tokens[:, 0],
    }
    assert list(found) == list(want)
    for name, features in want.items():
        assert found[name].count == 10  # what came after the block is not counted
        assert found[name].total == pytest.approx(float(features.double().var(correction=0)), rel=1e-5), name


def test_a_class_token_alone_is_not_averaged() -> None:
    model = Embedder(Backbone(Tokens(patches=0), 6, 2), 4, pooling="cls").eval()
    with watched_features(model) as found:
        model(torch.randn(3, 3, 2, 2))
    assert list(found) == ["cls"]


def test_the_section_shows_the_evaluated_images_of_each_run(report_runs: Sequence[RunData]) -> None:
    embedded = embed_runs(report_runs[1:], num_neighbours=1)
    assert variance_section(report_runs[:1], embedded) is None
    section = variance_section(report_runs, embedded)
    assert section is not None
    figure, table = section.parts
    assert isinstance(figure, Figure) and isinstance(table, Table)
    assert Image.open(io.BytesIO(figure.png)).width == 760

    run = report_runs[1]
    assert run.checkpoint is not None
    model, config = load_metric_model(run.checkpoint)
    settings, shards = embedding_settings(config), ShardSet.open(config.data.dir)
    loader = eval_loader(
        shards, shards.split_samples("test"), transform=settings.transform, batch_size=100, num_workers=0
    )
    with torch.no_grad():
        maps = torch.cat([model.backbone(normalise(images, settings.transform)) for images, *_ in loader]).double()
    average, maximum = maps.mean((2, 3)), maps.amax((2, 3))
    for row, name, features in zip(
        table.rows, ("average (used)", "maximum", "avg + max"), (average, maximum, average + maximum), strict=True
    ):
        assert row[:4] == [run.name, "small_conv", name, "48"]
        total, over = (float(features.var(correction=0)), float(features.var(0, correction=0).mean()))
        numbers = [float(features.mean()), total, over, float(features.mean(0).var(correction=0))]
        assert [float(text) for text in row[4:]] == pytest.approx(numbers, rel=6e-3)
        assert row[5] in figure.alt
    assert "How it computes a variance it does not say" in section.intro
    assert np.isclose(sum(float(text) for text in table.rows[0][6:]), float(table.rows[0][5]), rtol=2e-2)
