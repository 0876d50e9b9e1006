"""A training step with deferred checks never makes the host wait for the device."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from host_waits import noted
from maths_cases import Size
from run_cases import make_trainer
from step_cases import Case, averages_of
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.training import trainer as trainer_module
from gcahng.training.backend import PlainBackend
from gcahng.training.parts import build_parts, build_step

CASES = {
    "whole": Case(),
    "float32, one layer, odd": Case(size=Size(5, 2, 12, 1, 3, training_classes=7), dtype=torch.float32),
    "proxies": Case(proxies=True),
    "baseline": Case(graph=False, generate=False),
    "graph alone": Case(generate=False),
    "single coefficient": Case(graph=False, channel=False),
    "single coefficient beside a graph": Case(channel=False),
    "bf16": Case(dtype=torch.float32, precision="bf16"),
    "without dropout": Case(graph_options={"dropout": 0.0}),
    "sgd, no clipping": Case(optimizer="sgd", clip=None),
    "picked interpolations": Case(settings={"fusion": "pick"}),
    "paper's distances": Case(settings={"normalised_distance": True}),
}


def waits_of_a_step(case: Case) -> list[str]:
    """Of the second step, when optimisers have their state and plans are kept."""
    noting = case.backend()
    backend = PlainBackend(
        noting.modules, noting.optimizers, noting.gates, precision=case.precision, deferred_checks=case.deferred
    )
    step, averages = case.step_on(backend), averages_of()  # type: ignore[arg-type]
    step(*case.images(0), averages, step=0)
    images, labels = case.images(1)
    with noted() as waits:
        step(images, labels, averages, step=1)
    return waits


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits(name: str) -> None:
    assert waits_of_a_step(replace(CASES[name], fused=True, deferred=True)) == []


def test_immediate_checks_wait() -> None:
    places = waits_of_a_step(Case(fused=True))
    assert sum("finite_checks" in place for place in places) >= 2 * 5  # embeddings, three losses, gradients


def test_a_loss_of_ones_own_is_asked_as_it_is() -> None:
    class Own(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            return embeddings.square().mean() * int(labels.max())

    case = Case(fused=True, deferred=True)
    noting = case.backend()
    noting.modules["metric_loss"] = Own()
    step, averages = case.step_on(noting), averages_of()
    report = step(*case.images(0), averages, step=0)
    assert float(report["metric_loss"]) > 0


def test_nothing_of_a_run_but_its_log_waits(shards, tmp_path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "build_parts", partial(build_parts, fused=True))
        patch.setattr(trainer_module, "build_step", partial(build_step, deferred_checks=True))
        trainer = make_trainer(shards, tmp_path / "run", {"train.log_every": 100})
    batches = list(trainer.loader.epoch_iterator(0))[:3]
    trainer.run_step(batches[0].images, batches[0].labels, batches[0].rows)
    with noted() as waits:
        for number, batch in enumerate(batches[1:], 1):
            report = trainer.steps.run(batch.images, batch.labels, batch.rows, number, None, 0)
    assert waits == [] and report is not None
    with noted() as reads:
        values = trainer.steps.read(report)
    assert len(reads) == 1 and "tolist" in reads[0]
    assert values == {name: float(value) for name, value in report.items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_on_cuda(name: str) -> None:
    case = replace(CASES[name], fused=True, deferred=True, dtype=torch.float32)
    noting = case.backend()
    for module in noting.modules.values():
        module.cuda()
    backend = PlainBackend(
        noting.modules, noting.optimizers, noting.gates, device="cuda", precision=case.precision, deferred_checks=True
    )
    step, averages = case.step_on(backend), averages_of()  # type: ignore[arg-type]
    batches = [case.images(number) for number in range(4)]
    on_device = [(images.cuda(), labels) for images, labels in batches]
    for number, batch in enumerate(on_device[:2]):
        step(*batch, averages, step=number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in enumerate(on_device[2:], 2):
            step(*batch, averages, step=number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    backend.checks.finish()


def mixed_reads(x: Tensor) -> dict[str, object]:
    """Ways of waiting, and ways of computing the same without."""
    return {
        "item": lambda: x.sum().item(),
        "float": lambda: float(x.sum()),
        "branch": lambda: 1 if x.sum() > 0 else 0,
        "list": lambda: x.tolist(),
        "array": lambda: x.numpy(),
        "mask": lambda: x[x > 0],
        "put by mask": lambda: x.clone().index_put_((x > 0,), x[0, 0]),
        "nonzero": lambda: torch.nonzero(x),
        "where": lambda: torch.where(x > 0),
        "unique": lambda: torch.unique(x),
        "from the host": lambda: torch.tensor([1.0]),
        "like": lambda: x.new_tensor(2.0),
        "one hot": lambda: F.one_hot(torch.arange(3), 3),
        "repeat": lambda: torch.repeat_interleave(torch.arange(4)),
        "equal": lambda: torch.equal(x, x),
        "close": lambda: torch.allclose(x, x),
        "backward": lambda: (x.requires_grad_() * 1)[x.detach() > 0].sum().backward(),
    }


@pytest.mark.parametrize("way", list(mixed_reads(torch.zeros(1, 1))))
def test_the_watch_sees(way: str) -> None:
    with noted() as waits:
        mixed_reads(torch.randn(4, 3))[way]()  # type: ignore[operator]
    assert waits


def test_the_watch_lets_pass() -> None:
    x = torch.randn(4, 3)
    with noted() as waits:
        torch.where(x > 0, x, 0.0).sum()
        x.masked_fill(x > 0, 1.0)
        x[torch.arange(2)].new_full((), 3.0)
        x.index_add(0, torch.arange(4), x)
        torch.zeros(4, 3, dtype=torch.bool).scatter(1, torch.arange(3)[:, None], True)
        x[:2, 1].to("cpu", torch.float64, non_blocking=True)
        for row in x:
            row.clone()
    assert waits == []
