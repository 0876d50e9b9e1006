"""Node attention: the softmax with one more key of logit 0, and who attends to whom."""

import math

import pytest
import torch
from maths_cases import Size, batch_of, graph_of
from torch import Tensor

from gcahng.graph import reference
from gcahng.graph.blocks import NodeBlock


def attention_by_loops(block: NodeBlock, h: Tensor, labels: Tensor) -> Tensor:
    """Head by head and node by node, in the words of the method."""
    size, dim = h.shape
    width = dim // block.num_heads
    query, key, value = block.query(h), block.key(h), block.value(h)
    rows = []
    for i in range(size):
        mixed = []
        for head in range(block.num_heads):
            part = slice(head * width, (head + 1) * width)
            others = [j for j in range(size) if labels[j] != labels[i]]
            scores = [query[i, part] @ key[j, part] / math.sqrt(width) for j in others]
            peak = max([torch.zeros((), dtype=h.dtype), *scores])
            total = torch.exp(-peak) + sum(torch.exp(s - peak) for s in scores)
            out = torch.zeros(width, dtype=h.dtype)
            for s, j in zip(scores, others, strict=True):
                out = out + torch.exp(s - peak) / total * value[j, part]
            mixed.append(out)
        rows.append(block.out(torch.cat(mixed)))
    return torch.stack(rows)


def node_block(size: Size) -> NodeBlock:
    block = graph_of(size).node_blocks[0]
    assert isinstance(block, NodeBlock)
    return block


def attend(block: NodeBlock, h: Tensor, labels: Tensor, path: str) -> Tensor:
    if path == "scatter":
        return reference.node_attention(block, h, labels)
    return block.attend(h, labels[:, None] != labels[None, :], None)


@pytest.mark.parametrize("path", ["eager", "scatter"])
@pytest.mark.parametrize("size", [Size(3, 2, 4, 1, 1), Size(4, 3, 12, 1, 3)], ids=str)
def test_equals_a_loop(size: Size, path: str) -> None:
    block = node_block(size)
    h, labels = batch_of(size)
    got = attend(block, h, labels, path)
    want = attention_by_loops(block, h, labels)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("path", ["eager", "scatter"])
def test_a_sample_does_not_attend_to_its_class(path: str) -> None:
    size = Size(3, 3, 8, 1, 2)
    block = node_block(size)
    h, labels = batch_of(size)
    h.requires_grad_()
    attended = attend(block, h, labels, path)
    for i in range(size.batch):
        (gradient,) = torch.autograd.grad(attended[i].sum(), h, retain_graph=True)
        for j in range(size.batch):
            reaches = bool(gradient[j].abs().max() > 1e-9)
            assert reaches == (labels[i] != labels[j] or i == j), (i, j)  # i itself: the query


@pytest.mark.parametrize("path", ["eager", "scatter"])
def test_one_class_alone_attends_to_nothing(path: str) -> None:
    size = Size(1, 3, 8, 1, 2)
    block = node_block(size)
    h, labels = batch_of(size)
    attended = attend(block, h, labels, path)
    torch.testing.assert_close(attended, block.out.bias.expand_as(attended), rtol=0, atol=1e-15)


def test_the_extra_key_takes_all_when_scores_are_low_and_nothing_when_high() -> None:
    index = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([[-800.0], [-900.0], [700.0], [700.0]], dtype=torch.float64)
    weights = reference.off_by_one_softmax(scores, index, 2)
    assert weights[:, 0].tolist() == [0, 0, 0.5, 0.5]
    middle = reference.off_by_one_softmax(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), 1)
    assert middle[:, 0].tolist() == [0.25] * 3


@pytest.mark.parametrize("path", ["eager", "scatter"])
def test_large_scores_stay_finite(path: str) -> None:
    size = Size(3, 2, 8, 1, 2)
    block = node_block(size).float()
    h, labels = batch_of(size)
    for scale in (1e-6, 300.0):
        scaled = (scale * h).float().requires_grad_()
        attended = attend(block, scaled, labels, path)
        attended.square().sum().backward()
        assert torch.isfinite(attended).all()
        assert scaled.grad is not None
        assert torch.isfinite(scaled.grad).all()
