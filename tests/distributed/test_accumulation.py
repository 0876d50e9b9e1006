"""Cached accumulation on one process: the numbers of the whole batch, in the memory of a small one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accumulation_cases import AccumulationCase, Trace, kept_graphs, trace
from maths_cases import Size, assert_close
from step_cases import Case, averages_of
from torch import Tensor, nn

from gcahng.errors import ConfigError, InputError
from gcahng.training import accumulation
from gcahng.training.accumulation import cached_embeddings

K2, K3 = Size(4, 2, 8, 1, 2, training_classes=6), Size(5, 3, 8, 2, 2, training_classes=6)
# K = 2: 8 images as 4 + 4 and as 3 + 3 + 2; K = 3: 15 images as 4 + 4 + 4 + 3 and one by one.
EXACT = {
    "two equal parts": (AccumulationCase(size=K2), 4),
    "an uneven last part": (AccumulationCase(size=K2, head="linear"), 3),
    "three samples per class": (AccumulationCase(size=K3), 4),
    "single images": (AccumulationCase(size=K3, proxies=True), 1),
    "frozen BatchNorm": (AccumulationCase(size=K3, backbone="frozen"), 4),
    "no graph": (AccumulationCase(size=K3, graph=False, channel=False), 6),
    "binding clip": (AccumulationCase(size=K3, clip=1e-2), 4),
    "SGD": (AccumulationCase(size=K2, optimizer="sgd"), 3),
    "warm-up": (AccumulationCase(size=K3, warm_up=True), 4),
    "more than there are": (AccumulationCase(size=K2, backbone="dropout"), 9),
}
# Small batches draw other masks and have other statistics than the whole: compared with small batches that keep their
# graphs.
REPLAYED = {
    "dropout and stochastic depth": (AccumulationCase(size=K3, backbone="dropout"), 4),
    "live BatchNorm": (AccumulationCase(size=K3, backbone="live"), 5),
    "live BatchNorm in the warm-up": (AccumulationCase(size=K3, backbone="live", warm_up=True), 5),
    "a buffer that decides the output": (AccumulationCase(size=K3, backbone="shift"), 4),
}


def assert_same(got: Trace, want: Trace) -> None:
    for number, (mine, others) in enumerate(zip(got.reports, want.reports, strict=True)):
        assert_close(
            {f"step {number} {k}": v for k, v in mine.items()}, {f"step {number} {k}": v for k, v in others.items()}
        )
    for mine, others in zip(got.gradients, want.gradients, strict=True):
        assert_close(*({f"gradient {name}": value for name, value in side.items()} for side in (mine, others)))
    for mine, others in zip(got.parameters, want.parameters, strict=True):
        assert_close(mine, others)
    assert_close(got.buffers, want.buffers)


@pytest.mark.parametrize("name", EXACT)
def test_small_batches_give_the_numbers_of_the_whole(name: str) -> None:
    case, micro_batch = EXACT[name]
    whole = trace(case)
    assert_same(trace(case.with_micro_batch(micro_batch)), whole)
    moved = (whole.parameters[-1][n] - whole.parameters[0][n] for n in whole.parameters[0] if "network.0" in n)
    assert any(float(m.abs().max()) > 1e-3 for m in moved) is not case.warm_up
    assert not any("unused" in name for gradients in whole.gradients for name in gradients)


@pytest.mark.parametrize("name", REPLAYED)
def test_the_second_pass_repeats_the_first(name: str) -> None:
    case, micro_batch = REPLAYED[name]
    want = trace(case.with_micro_batch(micro_batch, reference=True))
    got = trace(case.with_micro_batch(micro_batch))
    assert_same(got, want)
    # Whatever draws after the step draws what it would have drawn.
    assert got.draws == want.draws


def test_the_reference_of_small_batches_differs_from_the_whole_batch() -> None:
    case, micro_batch = REPLAYED["live BatchNorm"]
    small, whole = trace(case.with_micro_batch(micro_batch, reference=True), 1), trace(case, 1)
    assert float(abs(small.reports[0]["metric_loss"] - whole.reports[0]["metric_loss"])) > 1e-3


# Height and width of the images and of the feature maps.
MAPS = ((2, 2), (3, 3))


class Held:
    """Bytes of feature maps that autograd keeps for backward passes: now, and most so far."""

    def __init__(self) -> None:
        self.now = self.most = 0

    @contextmanager
    def counted(self) -> Iterator["Held"]:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: _Kept(x, self), lambda kept: kept.x):
            yield self


class _Kept:
    """One saved tensor."""

    def __init__(self, x: Tensor, held: Held) -> None:
        # Not weights, and not the graph's chunks of edges.
        is_map = x.dim() == 4 and x.shape[2:] in MAPS and not (x.is_leaf and x.requires_grad)
        # Detached: the graph would hold itself.
        self.x, self.held, self.size = x.detach(), held, x.numel() * x.element_size() if is_map else 0
        held.now += self.size
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self.held.now -= self.size


def test_one_small_batch_of_feature_maps_is_kept_at_a_time() -> None:
    case = AccumulationCase(size=Size(12, 2, 8, 1, 2, training_classes=12), backbone="frozen")
    most = []
    for run in (case, case.with_micro_batch(12), case.with_micro_batch(2)):
        step = run.step_on(run.backend())
        with Held().counted() as held:
            step(*run.images(), averages_of(), step=0)
        assert held.now == 0
        most.append(held.most)
    assert most[1] == most[0] // 2
    assert most[2] == most[0] // 12


def test_a_part_that_fits_is_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_: Any) -> None:
        raise AssertionError("a second pass")

    monkeypatch.setattr(accumulation, "_cached_features", unwanted)
    trace(AccumulationCase(size=K2).with_micro_batch(8), 1)
    with pytest.raises(AssertionError, match="a second pass"):
        trace(AccumulationCase(size=K2).with_micro_batch(7), 1)


def test_hooks_of_parameters_see_one_gradient() -> None:
    """What wrappers hang on parameters (reductions over ranks) fires once a step."""
    case = AccumulationCase(size=K3).with_micro_batch(2)
    backend = case.backend()
    weight = dict(backend.modules["metric_model"].named_parameters())["backbone.network.0.weight"]
    seen: list[str] = []
    weight.register_hook(lambda gradient: seen.append("tensor"))
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    case.step_on(backend)(*case.images(), averages_of(), step=0)
    assert seen == ["tensor", "accumulated"]


def test_bf16_runs_both_passes_in_the_same_precision() -> None:
    case = AccumulationCase(size=K3, dtype=torch.float32, precision="bf16", clip=None).with_micro_batch(4)
    backend = case.backend()
    dtypes: list[torch.dtype] = []
    first = backend.modules["metric_model"].backbone.network[0]
    first.register_forward_hook(lambda layer, images, maps: dtypes.append(maps.dtype))
    case.step_on(backend)(*case.images(), averages_of(), step=0)
    assert dtypes == 8 * [torch.bfloat16]
    want = trace(case.with_micro_batch(4, reference=True), 1).gradients[0]
    for name, gradient in backend.phases[0].gradients.items():
        # Equal but for where sums over small batches are rounded.
        error = float((gradient - want[name]).abs().max() / want[name].abs().max().clamp_min(1e-3))
        assert error < (1e-2 if "backbone" in name else 1e-5), name


def test_gradients_are_scaled_as_the_loss_is() -> None:
    class Scaler:
        def scale(self, loss: Tensor) -> Tensor:
            return loss * 2.0**12

    def gradients(scaled: bool) -> dict[str, Tensor]:
        case = AccumulationCase(size=K3).with_micro_batch(4)
        backend = case.backend()
        step = case.step_on(backend)
        z = step._embed(case.images()[0])
        if scaled:
            backend.scaler = Scaler()  # type: ignore[assignment]
        backend.backward(z.square().sum())
        factor = 2.0**12 if scaled else 1.0
        return {n: p.grad / factor for n, p in backend.parameters().items() if p.grad is not None}

    assert_close(gradients(True), gradients(False), 1e-14)


def test_live_batch_norm_is_refused() -> None:
    case = AccumulationCase(backbone="live", settings={"micro_batch": 4})
    with pytest.raises(ConfigError, match=r"2 BatchNorms of the backbone.*`network.1`.*microbatch_statistics=true"):
        case.step_on(case.backend())


def test_batch_norm_that_comes_alive_later_is_refused() -> None:
    case = AccumulationCase(backbone="live", settings={"micro_batch": 4})
    backend = case.backend()
    backend.modules["metric_model"].eval()
    step = case.step_on(backend)
    backend.modules["metric_model"].train()
    with pytest.raises(ConfigError, match="2 BatchNorms"):
        step(*case.images(), averages_of(), step=0)


def test_batch_norm_over_ranks_is_refused_in_the_backbone() -> None:
    case = AccumulationCase(backbone="live").with_micro_batch(4)
    backend = case.backend()
    network = backend.modules["metric_model"].backbone.network
    network[1] = nn.SyncBatchNorm(network[1].num_features)
    with pytest.raises(ConfigError, match=r"`network.1` of the backbone takes its statistics over all ranks"):
        case.step_on(backend)


def test_a_model_without_the_two_stages_is_refused() -> None:
    case = Case(settings={"micro_batch": 4})
    with pytest.raises(ConfigError, match=r"Sequential has no `backbone`, `features`, `embed_features`"):
        case.step_on(case.backend())


def test_no_images_at_once_are_refused() -> None:
    case = AccumulationCase(settings={"micro_batch": 0})
    with pytest.raises(ConfigError, match="at least 1 or null: got 0"):
        case.step_on(case.backend())


def test_features_that_are_not_one_row_per_image_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = AccumulationCase(size=K2).with_micro_batch(4)
    backend = case.backend()
    step = case.step_on(backend)
    monkeypatch.setattr(backend.modules["metric_model"], "features", lambda images: images.flatten())
    with pytest.raises(InputError, match=r"expected 4 rows, got \(48,\)"):
        step(*case.images(), averages_of(), step=0)


class Drawing(nn.Module):
    """Draws whole layers: some small batches do without one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 6, 1) for _ in range(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers[self.calls % 2](x)


def test_parameters_that_only_later_parts_use_are_an_error_and_not_lost() -> None:
    case = AccumulationCase(size=K2, dtype=torch.float32).with_micro_batch(4)
    backend = case.backend()
    backend.modules["metric_model"].backbone.network = Drawing()
    with pytest.raises(InputError, match="other parameters for one small batch than for another, such as"):
        case.step_on(backend)(*case.images(), averages_of(), step=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_masks_are_drawn_again_on_each_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    case = AccumulationCase(size=K3, backbone="dropout")
    model, images = case.modules()["metric_model"].to(device), case.images()[0].to(device)

    def gradients(embed: Callable[..., Tensor], *arguments: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        embed(model, images, *arguments).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_close(gradients(cached_embeddings, 4, False), gradients(kept_graphs, 4))
