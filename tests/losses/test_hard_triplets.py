"""Losses on hard triplets: the golden files, a loop, batches with nothing to learn from, anchors shared out."""

import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from golden_replay import Comparison
from host_waits import noted
from maths_cases import generator
from rank_group import run_ranks
from step_cases import Case, averages_of
from tensor_watch import TensorWatch
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.distributed import Ranks
from gcahng.errors import InputError
from gcahng.generation import Interpolation
from gcahng.layout import BatchLayout
from gcahng.losses import (
    HardNegativeLoss,
    SelectivelyContrastiveLoss,
    SemiHardNegativeLoss,
    hard_triplets,
    select_triplets,
)
from gcahng.training.averages import EpochAverages
from gcahng.training.hardness import HardnessRecord

GOLDEN = Path(__file__).parents[1] / "golden" / "sct.npz"
LOSSES: dict[str, HardNegativeLoss] = {
    "hn": HardNegativeLoss(),
    "shn": SemiHardNegativeLoss(),
    "sct_lam1.0": SelectivelyContrastiveLoss(),
    "sct_lam0.5": SelectivelyContrastiveLoss(lam=0.5),
}


def batch(count: int = 24, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes of one to several samples in no order, some duplicates within a class and one between two."""
    draw = generator(seed)
    labels = torch.randint(count // 3, (count,), generator=draw)
    labels[:3] = torch.tensor([0, 0, 1])
    z = torch.randn(count, dim, generator=draw, dtype=torch.float64)
    z[1], z[2] = 3 * z[0], z[0]
    return z.requires_grad_(), labels


def gradient(loss: Tensor, z: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, z)
    return found


@pytest.mark.parametrize("case", ["mixed", "duplicate", "collapsed", "easy", "four"])
def test_golden(case: str) -> None:
    with np.load(GOLDEN) as golden:
        z, labels = torch.from_numpy(golden[f"{case}/x"]).requires_grad_(), torch.from_numpy(golden[f"{case}/y"])
        compare = Comparison()
        for name, loss in LOSSES.items():
            here = f"{case}/{name}/"
            value, found = loss(z, labels), select_triplets(z, labels, semi_hard=loss.semi_hard)
            pairs = torch.stack([found.positive, found.negative], 1)
            assert torch.equal(pairs, torch.from_numpy(golden[here + "pos_neg_index"]))
            similarity = torch.stack([found.positive_similarity, found.negative_similarity], 1)
            compare.add(here + "similarity", similarity, golden[here + "pos_neg_similarity"])
            compare.add(here + "loss", value, golden[here + "loss"])
            compare.add(here + "gradient", gradient(value, z), golden[here + "grad"])
            ratio = loss.measured["hard_negative_ratio"]
            compare.add(here + "ratio", ratio, golden[here + "hard_negative_ratio"])
    errors = dict(compare.errors())
    assert len(errors) == 16
    assert max(errors.values()) < 1e-12, errors
    assert float(loss.measured["valid_triplets"]) == (15 / 18 if case == "duplicate" else 1)


def by_loop(name: str, z: Tensor, labels: Tensor) -> tuple[Tensor, float, float]:
    """The loss, the hard-negative ratio and the share of valid anchors, from the words of the method."""
    cosine = [[F.cosine_similarity(a, b, dim=0) for b in z] for a in z]
    terms, hard, valid = [], 0, 0
    for i, row in enumerate(cosine):
        same = [s for j, s in enumerate(row) if j != i and labels[j] == labels[i] and s <= 0.9999]
        other = [s for j, s in enumerate(row) if labels[j] != labels[i]]
        positive = max(same, default=None, key=Tensor.detach)
        if positive is not None and name == "shn":
            # The same vector on both sides: cosines of the two may differ in the last bit.
            other = [s for s in other if float(s.detach() - positive.detach()) <= 1e-12]
        if positive is None or not other:
            continue
        negative = max(other, key=Tensor.detach)
        valid += 1
        tied = abs(float((negative - positive).detach())) < 1e-12
        hard += bool(negative > positive and not tied)
        triplet = torch.log(1 + torch.exp((negative - positive) / 0.1))
        if not name.startswith("sct"):
            terms.append(triplet)
        elif (negative > positive and not tied) or negative > 0.8:
            terms.append(float(name.removeprefix("sct_lam")) * negative)
        elif negative < 0.8 and not tied:
            terms.append(triplet)
    return torch.stack(terms).mean(), hard / valid, valid / len(labels)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_a_loop(name: str, seed: int) -> None:
    z, labels = batch(seed=seed)
    loss = LOSSES[name]
    got = loss(z, labels)
    want, ratio, valid = by_loop(name, z, labels)
    assert 0 < valid < 1
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    assert {key: float(value) for key, value in loss.measured.items()} == {
        "hard_negative_ratio": pytest.approx(0.0 if name == "shn" else ratio),
        "valid_triplets": pytest.approx(valid),
    }
    torch.testing.assert_close(gradient(got, z), gradient(want, z), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_order_length_and_kind_of_labels_do_not_matter(name: str) -> None:
    z, labels = batch()
    # Without the samples that are alike: which of them is chosen is a matter of order.
    z, labels = z.detach()[3:].requires_grad_(), labels[3:]
    loss = LOSSES[name]
    want = loss(z, labels)
    moved = torch.randperm(len(z), generator=generator(1))
    scale = torch.logspace(-6, 6, len(z), dtype=z.dtype)[:, None]
    for got in (loss(z[moved], labels[moved]), loss(z * scale, labels), loss(z, labels.to(torch.int32) - 100)):
        torch.testing.assert_close(gradient(got, z), gradient(loss(z, labels), z), rtol=1e-9, atol=1e-12)
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)


def nothing_to_learn() -> dict[str, tuple[Tensor, Tensor]]:
    """Batches in which no anchor has a valid triplet."""
    z, labels = batch()
    z, pairs = z.detach(), torch.arange(4).repeat(2)
    return {
        "all samples of different classes": (z, torch.arange(len(z))),
        "one class": (z, torch.zeros_like(labels)),
        "all alike": (torch.ones(8, 3, dtype=z.dtype), pairs),
        "all alike but for their length": (torch.arange(1.0, 9.0, dtype=z.dtype)[:, None].expand(8, 3), pairs),
        "zero vectors": (torch.zeros(8, 3, dtype=z.dtype), pairs),
        "all positives duplicates": (torch.randn(4, 3, dtype=z.dtype, generator=generator(3)).repeat(2, 1), pairs),
        "one sample": (z[:1], labels[:1]),
        "no sample": (z[:0], labels[:0]),
    }


@pytest.mark.parametrize("kind", nothing_to_learn())
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_a_triplet_gives_a_zero_that_has_a_gradient_of_zero(name: str, kind: str) -> None:
    z, labels = nothing_to_learn()[kind]
    z = z.clone().requires_grad_()
    loss = LOSSES[name]
    value = loss(2 * z, labels)
    assert value.grad_fn is not None and value.shape == ()
    assert float(value.detach()) == 0
    assert torch.equal(gradient(value, z), torch.zeros_like(z))
    assert [float(v) for v in loss.measured.values()] == [0, 0]


@pytest.mark.parametrize("name", LOSSES)
def test_a_zero_vector_is_in_no_triplet(name: str) -> None:
    z, labels = batch()
    loss = LOSSES[name]
    nowhere = z.new_zeros(2, z.shape[1])
    nowhere[1] += 1e-14  # rounding, say
    mixed = torch.cat([z, nowhere]), torch.cat([labels, labels[:2]])
    whole = mixed[0].detach().requires_grad_()
    value = loss(whole, mixed[1])
    assert float(value.detach()) == pytest.approx(float(loss(z, labels).detach()), rel=1e-13)
    found = gradient(value, whole)
    assert found.isfinite().all() and found[:-2].abs().max() > 0
    assert not found[-2:].any()


def test_a_semi_hard_negative_may_be_missing() -> None:
    # Each is nearer to the other class than to its own.
    z = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]], dtype=torch.float64))
    labels = torch.tensor([0, 0, 1, 1])
    found = select_triplets(z, labels, semi_hard=True)
    assert found.valid.tolist() == [False, False, True, True]
    assert found.negative[2:].tolist() == [1, 0]
    assert not found.hard.any()
    assert select_triplets(z, labels).hard.all()


def test_a_sample_is_never_its_own_positive() -> None:
    e = torch.eye(3, dtype=torch.float64)
    found = select_triplets(e[[0, 1, 0, 2, 1]], torch.tensor([0, 0, 0, 1, 1]), duplicate_similarity=1.0)
    assert found.positive.tolist() == [2, 0, 0, 4, 3]
    assert found.valid.all()


def test_what_is_equal_falls_into_neither_kind_of_sct() -> None:
    # s_p = s_n = 1/2, exactly: not counted, though valid. The others' triplets are s_p = 1/2, s_n = 0.
    e = torch.eye(4, dtype=torch.float64)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    z = torch.stack([half, e[0], e[1], -e[2]]).requires_grad_()
    loss = SelectivelyContrastiveLoss(lam=3.0)
    value = loss(z, torch.tensor([0, 0, 1, 1]))
    # Sample 1: s_p = 1/2, s_n = 0. Sample 2: s_p = 0, s_n = 1/2. Sample 3: s_p = s_n = 0.
    want = (math.log(1 + math.exp(-5)) + 3 * 0.5) / 2
    assert float(value.detach()) == pytest.approx(want, rel=1e-12)
    assert float(loss.measured["valid_triplets"]) == 1
    assert float(loss.measured["hard_negative_ratio"]) == 0.25
    # A negative of just the limit is not too similar, and is not counted.
    z = torch.stack([e[0], F.normalize(e[0] + 0.1 * e[3], dim=0), half, -e[2]])
    counted = [
        float(SelectivelyContrastiveLoss(hard_similarity=limit)(z[[0, 1, 2]], torch.tensor([0, 0, 1])))
        for limit in (0.49, 0.5, 0.501)
    ]
    # Anchor 1 is more similar to `half`, with 0.547; anchor 2 has no positive.
    near = float(z[1] @ half)
    assert counted[0] == pytest.approx((0.5 + near) / 2)
    assert counted[1] == pytest.approx(near)
    assert counted[2] == pytest.approx((float(F.softplus((0.5 - z[0] @ z[1]) / 0.1)) + near) / 2)


def test_a_loss_may_be_below_zero() -> None:
    """Four directions of a tetrahedron, a little off: everything is far apart, the other class least so."""
    z = torch.tensor([[1.0, 1, 1], [-1, -1, 1.2], [1.2, -1, -1], [-1, 1, -1]], dtype=torch.float64)
    value = SelectivelyContrastiveLoss()(z, torch.tensor([0, 0, 1, 1]))
    assert -0.5 < float(value) < -0.1
    # Its epoch mean counts as 1e-6, so that GCA-HNG on top leaves its negatives at the positive's distance.
    averages = EpochAverages()
    averages.add(value, None)
    averages.end_epoch()
    assert Interpolation(5.0, averages.metric_loss).factor == 0


@pytest.mark.parametrize("name", LOSSES)
def test_slices_of_anchors_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z, labels = batch(60)
    want = LOSSES[name](z, labels)
    monkeypatch.setattr(hard_triplets, "SIMILARITIES", 5 * 60)
    with TensorWatch() as watch:
        got = LOSSES[name](z, labels)
        found = gradient(got, z)
    assert watch.largest == 5 * 60 == 60 * z.shape[1]
    assert watch.with_axes([60, 60]) == []
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-13)
    torch.testing.assert_close(found, gradient(want, z), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_neither_changes_choices_nor_reaches_the_products(name: str) -> None:
    z, labels = batch()
    z = z.detach().float().requires_grad_()
    want = LOSSES[name](z, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](z, labels), want)
    low = LOSSES[name](z.bfloat16(), labels)
    assert low.dtype == torch.float32
    assert torch.equal(low, LOSSES[name](z.bfloat16().float(), labels))


def test_nothing_waits_for_the_device_where_the_caller_has_checked() -> None:
    z, labels = batch()
    layout = BatchLayout(4, 6, torch.arange(24), labels[:4])
    for loss in LOSSES.values():
        with noted() as waits:
            loss(z, labels, layout=layout).backward()
            assert set(loss.measured) == {"hard_negative_ratio", "valid_triplets"}
        assert waits == []


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_reports_what_the_loss_has_measured_of_its_own_triplets(name: str) -> None:
    case = Case(graph=False, generate=False)
    backend = case.backend()
    backend.modules["metric_loss"] = LOSSES[name]
    record = HardnessRecord(edges=True, reduce=lambda partial: partial)
    report = case.step_on(backend)(*case.images(3), averages_of(), step=0, record=record)
    of_the_batch = record.row()["hard_negative_ratio"]
    assert of_the_batch > 0
    assert float(report["hard_negative_ratio"]) == (0 if name == "shn" else pytest.approx(of_the_batch))
    assert float(report["valid_triplets"]) > 0


class Shared(nn.Module):
    """What the tests of ranks run: a loss that notes which anchors were compared with how many samples."""

    def __init__(self, loss: HardNegativeLoss) -> None:
        super().__init__()
        self.loss = loss
        self.compared: list[tuple[int, int, int]] = []

    def forward(self, z: Tensor, labels: Tensor, ranks: Ranks) -> Tensor:
        whole = hard_triplets._choose

        def choose(unit: Tensor, labels: Tensor, own: slice, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
            with TensorWatch() as watch:
                found = whole(unit, labels, own, *rest)  # type: ignore[arg-type]
            # No similarities but those of the own anchors.
            assert watch.with_axes([len(unit), len(unit)]) == [] or ranks.size == 1
            self.compared.append((own.start, own.stop, len(found[0])))
            return found

        with patch.object(hard_triplets, "_choose", choose):
            found: Tensor = self.loss(z, labels, share=ranks.share, reduce=ranks.sum)
        return found


def over_ranks(ranks: Ranks, counts: list[int]) -> list[tuple[float, Tensor, dict[str, float], tuple[int, int, int]]]:
    """Loss, gradient over W (the rule of `gcahng.distributed`), what was measured, and the anchors compared here."""
    found = []
    for count in counts:
        z, labels = batch(count)
        for loss in LOSSES.values():
            shared = Shared(loss)
            value = shared(z, labels, ranks)
            partial = gradient(value, z) / ranks.size
            (part,) = shared.compared
            measured = {name: float(number) for name, number in loss.measured.items()}
            found.append((float(value.detach()), ranks.sum(partial), measured, part))
    return found


def test_each_rank_compares_its_own_anchors_and_all_have_the_whole_loss() -> None:
    counts = [24, 25, 4]
    wanted = over_ranks(Ranks(0, 1), counts)
    reports = run_ranks(3, over_ranks, counts)
    sizes = [count for count in counts for _ in LOSSES]
    for number, (want, count) in enumerate(zip(wanted, sizes, strict=True)):
        parts = [report[number][3] for report in reports]
        assert [start for start, _, _ in parts] == [rank * count // 3 for rank in range(3)]
        assert [stop for _, stop, _ in parts] == [(rank + 1) * count // 3 for rank in range(3)]
        assert all(rows == stop - start for start, stop, rows in parts)
        for value, whole, measured, _ in (report[number] for report in reports):
            assert value == pytest.approx(want[0], rel=1e-12)
            torch.testing.assert_close(whole, want[1], rtol=1e-11, atol=1e-14)
            assert measured == pytest.approx(want[2], rel=1e-12)


def test_more_ranks_than_anchors() -> None:
    z, labels = batch(5)
    parts: list[Tensor] = []

    def note(partial: Tensor) -> Tensor:
        parts.append(partial.detach())
        return partial

    for loss in LOSSES.values():
        parts.clear()
        valid = 0.0
        for rank in range(8):
            value = loss(z, labels, share=(rank, 8), reduce=note)
            assert gradient(value, z).isfinite().all()
            valid += float(loss.measured["valid_triplets"])  # of all samples
        total = torch.stack(parts).sum(0)
        assert float(total[0] / total[1].clamp(min=1)) == pytest.approx(float(loss(z, labels).detach()), rel=1e-12)
        assert valid == pytest.approx(float(loss.measured["valid_triplets"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lam": -0.5}, "`lam` must be a finite number of at least 0: got -0.5"),
        ({"lam": math.nan}, "`lam` must be a finite number"),
        ({"lam": "1"}, "`lam` must be a finite number of at least 0: got '1'"),
        ({"lam": True}, "`lam` .* got True"),
        ({"temperature": 0}, "`temperature` must be above 0"),
        ({"temperature": -1.0}, "`temperature` must be a finite number"),
        ({"hard_similarity": 1.5}, "`hard_similarity` must be a finite number of at least -1 and at most 1: got 1.5"),
        ({"duplicate_similarity": -2}, "`duplicate_similarity` .* got -2"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SelectivelyContrastiveLoss(**arguments)


def test_input_that_makes_no_sense() -> None:
    z, labels = batch()
    loss = HardNegativeLoss()
    with pytest.raises(InputError, match=r"`labels` must have one entry per embedding: expected shape \(24,\)"):
        loss(z, labels[:-1])
    with pytest.raises(InputError, match="`embeddings` must be finite"):
        loss(z.detach().index_fill(0, torch.tensor([3]), math.inf), labels)
    with pytest.raises(InputError, match=r"`share` must be .* got \(2, 2\)"):
        loss(z, labels, share=(2, 2), reduce=lambda x: x)
    with pytest.raises(InputError, match="`reduce` is missing: expected the sum over 2 parts"):
        loss(z, labels, share=(0, 2))
