"""The training step: its formula, its switches, what its draws depend on, what stops it."""

import math

import pytest
import torch
from generation_loops import diversity, similarity, synthetic_loss, synthetic_negatives
from maths_cases import assert_close
from step_cases import Case, NotingBackend, averages_of, run
from torch import Tensor, nn
from torch.nn import functional as F

from gcahng.errors import TrainingError
from gcahng.random import mixing_weights, stream_key
from gcahng.training.finite_checks import NonFiniteEmbedding

KEYS_METRIC = {"metric_loss", "total_loss"}
KEYS_GENERATION = {
    "synthetic_loss", "synthetic_weight", "pull_factor", "classifier_loss", "classification_loss",
    "similarity_loss", "generation_loss",
}  # fmt: skip
RUNS = {
    "gca_hng": (Case(), KEYS_METRIC | KEYS_GENERATION | {"node_loss", "diversity_loss"}),
    "baseline": (Case(graph=False, generate=False), KEYS_METRIC),
    "graph without generation": (Case(generate=False), KEYS_METRIC | {"node_loss"}),
    "single coefficient": (Case(graph=False, channel=False), KEYS_METRIC | KEYS_GENERATION),
    "single coefficient beside a graph": (
        Case(channel=False),
        KEYS_METRIC | KEYS_GENERATION | {"node_loss"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_reports_and_phases_of_each_kind_of_run(name: str) -> None:
    case, keys = RUNS[name]
    backend, reports = run(case, 2)
    assert set(reports[0]) == keys
    assert all(not v.requires_grad and torch.isfinite(v) for r in reports for v in r.values())
    phases = [phase.reach for phase in backend.phases[: len(backend.phases) // 2]]
    if name == "gca_hng":
        assert phases == ["metric", "classifier", "generation"]
    else:
        assert phases == (["metric", "classifier"] if case.generate else ["metric"])


@pytest.mark.parametrize("name", RUNS)
def test_the_total_is_the_sum_of_its_terms(name: str) -> None:
    case, _ = RUNS[name]
    _, (report,) = run(case)
    total = report["metric_loss"] + report.get("node_loss", 0)
    if case.generate:
        assert float(report["synthetic_weight"]) == pytest.approx(1 - math.exp(-5 / 10))
        assert float(report["pull_factor"]) == pytest.approx(math.exp(-2 / 3))
        total = total + report["synthetic_weight"] * report["synthetic_loss"]
        generation = 20 * report["classification_loss"] + 20 * report["similarity_loss"]
        generation = generation + 0.6 * report.get("diversity_loss", 0)
        assert float(report["generation_loss"]) == pytest.approx(float(generation) / 2)
    assert float(report["total_loss"]) == pytest.approx(float(total))


def iteration_by_hand(case: Case, steps: int) -> dict[str, Tensor]:
    """The method's iteration with plain torch and loops: parameters at the end."""
    modules = case.modules()
    f, graph, classifier = (modules[n] for n in ("metric_model", "graph", "classifier"))
    optimizers = {
        n: torch.optim.AdamW([p for p in modules[n].parameters() if p.requires_grad], lr=case.lr, weight_decay=0.1)
        for n in ("metric_model", "graph", "classifier")
    }
    size = case.size
    for number in range(steps):
        images, labels = case.images(number)
        keys = [stream_key(case.seed, "edge_dropout", number, p) for p in ("metric", "generation")]
        weights = [
            mixing_weights(size.num_samples, seed=case.seed, step=number, phase=p).double()
            for p in ("metric", "generation")
        ]
        z = f(images)
        output = graph(z, labels, dropout_key=keys[0])
        table = output.pull_coefficients.detach()
        synthetic = synthetic_negatives(z, labels.tolist(), table, weights[0], 2.0, 3.0)
        metric_loss = modules["metric_loss"](z, labels)
        trust = 1 - math.exp(-5 / 10)
        total = metric_loss + F.cross_entropy(output.node_logits, labels)
        total = total + trust * synthetic_loss(z, synthetic, size.num_samples)
        total.backward()
        for name in ("metric_model", "graph"):
            nn.utils.clip_grad_value_(modules[name].parameters(), 10.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
        z = z.detach()
        (10 * F.cross_entropy(classifier(z), labels)).backward()
        optimizers["classifier"].step()
        optimizers["classifier"].zero_grad()
        table = graph(z, labels, dropout_key=keys[1]).pull_coefficients
        synthetic = synthetic_negatives(z, labels.tolist(), table, weights[1], 2.0, 3.0)
        targets = labels[: size.num_classes].expand(size.batch, -1)
        cls = F.cross_entropy(classifier(synthetic).flatten(0, 1), targets.flatten())
        loss = 20 * cls + 20 * similarity(z, synthetic, size.num_classes) + 0.6 * diversity(table)
        (0.5 * loss).backward()
        optimizers["classifier"].zero_grad()
        nn.utils.clip_grad_value_(graph.parameters(), 10.0)
        optimizers["graph"].step()
        optimizers["graph"].zero_grad()
    return {f"{p}.{n}": v.detach() for p, m in modules.items() for n, v in m.named_parameters()}


def test_equals_the_iteration_written_out() -> None:
    # AdamW's first steps are signs of gradients: key biases of the edge attention, whose gradient
    # is rounding noise in a plain computation, are left out.
    case = Case()
    backend, _ = run(case, 2)
    want = iteration_by_hand(case, 2)
    got = backend.snapshot()
    names = [n for n in got if not ("edge_blocks" in n and n.endswith("key.bias"))]
    assert_close({n: got[n] for n in names}, {n: want[n] for n in names}, 1e-8)


def test_the_same_step_gives_the_same_result() -> None:
    first, reports = run(Case(), 3)
    torch.manual_seed(12345)
    torch.rand(7)
    second, again = run(Case(), 3)
    for a, b in zip(reports, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(v, second.snapshot()[n]) for n, v in first.snapshot().items())


@pytest.mark.parametrize("drawn", ["mixing weights", "dropout"])
def test_another_step_or_seed_draws_anew(drawn: str) -> None:
    case = Case(channel=drawn == "dropout", graph=drawn == "dropout")

    def losses(step: int, seed: int = 0) -> tuple[float, float]:
        this = Case(channel=case.channel, graph=case.graph, seed=seed)
        backend = this.backend()
        mixing = None
        if drawn == "dropout":
            mixing = {phase: torch.full((3, 2), 0.5) for phase in ("metric", "generation")}
        report = this.step_on(backend)(*this.images(), averages_of(), step=step, mixing=mixing)
        return float(report["synthetic_loss"]), float(report["generation_loss"])

    base = losses(4)
    assert losses(4) == base
    for other in (losses(5), losses(4, seed=1)):
        assert other[0] != base[0]
        assert other[1] != base[1]


def test_the_two_passes_draw_apart() -> None:
    case = Case(graph=False, channel=False)
    images, labels = case.images()

    def run_with(mixing: dict[str, Tensor] | None) -> dict[str, Tensor]:
        return case.step_on(case.backend())(images, labels, averages_of(), step=0, mixing=mixing)

    drawn = {
        phase: mixing_weights(3, seed=0, step=0, phase=phase, dtype=torch.float64) for phase in ("metric", "generation")
    }
    want = run_with(None)
    got = run_with(drawn)
    assert all(torch.equal(got[name], want[name]) for name in want)
    exchanged = run_with({"metric": drawn["generation"], "generation": drawn["metric"]})
    assert not torch.equal(exchanged["synthetic_loss"], want["synthetic_loss"])
    assert not torch.equal(exchanged["similarity_loss"], want["similarity_loss"])


def test_epoch_means_set_hardness_and_trust_and_are_added_to() -> None:
    case = Case()
    averages = averages_of(metric_loss=1e6, generation_loss=1e6)
    report = case.step_on(case.backend())(*case.images(), averages, step=0)
    assert float(report["pull_factor"]) == pytest.approx(1, abs=1e-5)
    assert float(report["synthetic_weight"]) == pytest.approx(5e-6, rel=1e-3)
    averages.end_epoch()
    assert averages.metric_loss == pytest.approx(float(report["metric_loss"]))
    assert averages.generation_loss == pytest.approx(float(report["generation_loss"]))
    floored = case.step_on(case.backend())(*case.images(), averages_of(0.0, 0.0), step=0)
    assert float(floored["pull_factor"]) == 0
    assert float(floored["synthetic_weight"]) == 1


def test_one_class_in_the_batch_is_finite() -> None:
    case = Case()
    backend = case.backend()
    images, _ = case.images()
    for labels in (torch.full((3,), 2), torch.full((3,), 0)):
        report = case.step_on(backend)(images[:3], labels, averages_of(), step=0)
        assert all(torch.isfinite(v) for v in report.values())
    assert all(torch.isfinite(v).all() for v in backend.snapshot().values())


def test_duplicate_images_are_finite() -> None:
    case = Case(dtype=torch.float32)
    images, labels = case.images()
    images[1] = images[0]
    images[6] = images[2]
    backend = case.backend()
    for number in range(2):
        case.step_on(backend)(images, labels, averages_of(), step=number)
    case.step_on(backend)(images[:1].expand(12, -1, -1, -1), labels, averages_of(), step=2)
    assert all(torch.isfinite(v).all() for v in backend.snapshot().values())


def untouched(backend: NotingBackend, before: dict[str, Tensor]) -> bool:
    after = backend.snapshot()
    return all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_image_that_is_not_finite_stops_the_step(bad: float) -> None:
    case = Case()
    images, labels = case.images()
    images[7, 1, 0, 1] = bad
    images[9] = bad
    backend = case.backend()
    before, averages = backend.snapshot(), averages_of()
    message = "2 embeddings of the batch are not finite, the first at position 7; no parameter"
    with pytest.raises(NonFiniteEmbedding, match=message) as caught:
        case.step_on(backend)(images, labels, averages, step=0)
    assert caught.value.positions == [7, 9]
    assert untouched(backend, before)
    assert backend.phases == []
    averages.end_epoch()
    assert (averages.metric_loss, averages.generation_loss) == (3.0, 10.0)


def test_a_norm_over_the_batch_does_not_hide_the_bad_image() -> None:
    case = Case()
    backend = case.backend()
    model = backend.modules["metric_model"]
    backend.modules["metric_model"] = nn.Sequential(model, nn.BatchNorm1d(8).double())
    images, labels = case.images()
    images[4] = math.nan
    with pytest.raises(NonFiniteEmbedding) as caught:
        case.step_on(backend)(images, labels, averages_of(), step=0)
    assert caught.value.positions == [4]


def test_diverged_weights_name_the_embeddings() -> None:
    case = Case(graph=False, generate=False)
    backend = case.backend()
    with torch.no_grad():
        next(iter(backend.modules["metric_model"].parameters())).fill_(math.inf)
    with pytest.raises(NonFiniteEmbedding, match="12 embeddings .* the first at position 0"):
        case.step_on(backend)(*case.images(), averages_of(), step=0)


def test_a_loss_that_is_not_finite_stops_the_phase() -> None:
    case = Case()
    backend = case.backend()
    with torch.no_grad():
        backend.modules["graph"].node_classifier.bias[0] = math.inf
    before = backend.snapshot()
    message = r"The metric loss is (nan|inf); no parameter was moved in this phase\. Lower"
    with pytest.raises(TrainingError, match=message):
        case.step_on(backend)(*case.images(), averages_of(), step=0)
    assert untouched(backend, before)


class SteepLoss(nn.Module):
    """Finite itself, with an infinite slope at its value 0."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return (embeddings[0] * 0).abs().sqrt().sum() + embeddings.mean()


def test_a_gradient_that_is_not_finite_stops_the_phase() -> None:
    case = Case()
    backend = case.backend()
    good = backend.modules["metric_loss"]
    backend.modules["metric_loss"] = SteepLoss()
    before = backend.snapshot()
    message = "Gradients of `metric_model` are not finite in the metric pass; no parameter was moved"
    with pytest.raises(TrainingError, match=message):
        case.step_on(backend)(*case.images(), averages_of(), step=0)
    assert untouched(backend, before)
    # Who goes on with the next batch does not carry the bad gradients along.
    backend.modules["metric_loss"] = good
    case.step_on(backend)(*case.images(), averages_of(), step=0)
    want, _ = run(case)
    assert untouched(backend, want.snapshot())


def test_the_paper_reading_of_distances_reaches_the_step() -> None:
    _, (released,) = run(Case())
    _, (paper,) = run(Case(settings={"normalised_distance": True}))
    assert not torch.equal(released["synthetic_loss"], paper["synthetic_loss"])
    assert torch.equal(released["metric_loss"], paper["metric_loss"])


@pytest.mark.parametrize(
    ("setting", "term"),
    [
        ("classification_weight", "classification_loss"),
        ("similarity_weight", "similarity_loss"),
        ("diversity_weight", "diversity_loss"),
    ],
)
def test_each_term_of_the_generation_loss_can_be_weighed(setting: str, term: str) -> None:
    others = {"classification_weight": 0.0, "similarity_weight": 0.0, "diversity_weight": 0.0}
    _, (report,) = run(Case(settings=others | {setting: 3.0}))
    assert float(report["generation_loss"]) == pytest.approx(1.5 * float(report[term]))


def test_the_classifier_loss_is_weighed() -> None:
    _, (heavy,) = run(Case())
    _, (light,) = run(Case(settings={"classifier_weight": 1.0}))
    assert float(heavy["classifier_loss"]) == pytest.approx(10 * float(light["classifier_loss"]))


def test_training_lowers_the_losses() -> None:
    case = Case(lr=5e-3)
    backend = case.backend()
    step, averages = case.step_on(backend), averages_of()
    images, labels = case.images()
    reports = [step(images, labels, averages, step=number) for number in range(25)]
    for name in ("metric_loss", "node_loss", "classifier_loss"):
        assert float(reports[-1][name]) < 0.8 * float(reports[0][name]), name
