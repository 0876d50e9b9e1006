"""The generator and the losses on what it makes: against plain loops, by any number of anchors at a time."""

from functools import partial

import pytest
import torch
from generation_loops import classification, synthetic_loss, synthetic_negatives
from maths_cases import OWN_PATHS, Size, batch_of, errors, randomise
from torch import Tensor, nn

from gcahng.errors import InputError
from gcahng.generation import ConstantClassifier, Interpolation, Synthesis, generate_negatives, single_pull
from gcahng.generation.generated_losses import GeneratorFactors, generated_synthetic_loss, generator_loss
from gcahng.generation.generator import HDML_EPS, FeatureGenerator
from gcahng.generation.row_map import Affine, Normalise, RowMap
from gcahng.generation.single_pull import SinglePull

SIZE = Size(3, 3, 5, 1, 1, training_classes=7)
FEATURES = 6
ALPHA, MEAN_LOSS = 2.0, 3.0
FACTORS = GeneratorFactors(0.7, 1.3)


class World:
    """A batch, its features, a generator, a head and a classifier, all float64 and random."""

    def __init__(self, *, hidden: tuple[int, ...] = (5,), normalised: bool = False, head_norm: bool = True) -> None:
        z, labels = batch_of(SIZE)
        draw = torch.Generator().manual_seed(3)
        self.z = z.requires_grad_()
        self.labels = labels
        self.features = (3 * torch.randn(SIZE.batch, FEATURES, generator=draw, dtype=torch.float64)).requires_grad_()
        self.weights = torch.rand(SIZE.num_samples, SIZE.num_samples - 1, generator=draw, dtype=torch.float64)
        self.normalised, self.head_norm = normalised, head_norm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.generator = FeatureGenerator(SIZE.dim, FEATURES, hidden).double()
            self.norm = nn.BatchNorm1d(FEATURES, eps=1e-4).double()
            self.linear = nn.Linear(FEATURES, SIZE.dim).double()
            self.classifier = nn.Linear(FEATURES, SIZE.training_classes).double()
            self.of_embeddings = nn.Linear(SIZE.dim, SIZE.training_classes).double()
        for number, module in enumerate((self.generator, self.norm, self.linear)):
            randomise(module, number)
        self.synthesis = Synthesis(SIZE.num_samples, Interpolation(ALPHA, MEAN_LOSS, normalised), self.weights)

    def head(self, features: Tensor) -> RowMap:
        affine = Affine(self.linear.weight, self.linear.bias)
        if not self.head_norm:
            return RowMap((affine,), FEATURES)
        norm = Normalise.of_batch(features, self.norm.weight, self.norm.bias, self.norm.eps)
        return RowMap((norm, affine), FEATURES)

    def leaves(self) -> dict[str, Tensor]:
        parts = {"generator": self.generator, "norm": self.norm, "linear": self.linear}
        named = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
        return {"z": self.z, "features": self.features} | named


def normalise(row: Tensor, batch: list[Tensor], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """One row as BatchNorm normalises the rows of `batch`."""
    mean = sum(batch) / len(batch)
    variance = sum((other - mean) ** 2 for other in batch) / len(batch)
    return (row - mean) / torch.sqrt(variance + eps) * weight + bias


def plain_features(world: World, rows: list[Tensor]) -> list[Tensor]:
    """The generator row by row, the real batch going through it beside them."""
    real = list(world.z)
    for linear, norm in zip(world.generator.hidden, world.generator.norms, strict=True):
        weight, bias = linear.weight, linear.bias
        real = [torch.clamp_min(weight @ row + bias, 0) for row in real]
        rows = [torch.clamp_min(weight @ row + bias, 0) for row in rows]
        step = partial(normalise, batch=list(real), weight=norm.weight, bias=norm.bias, eps=HDML_EPS)
        real, rows = [step(row) for row in real], [step(row) for row in rows]
    last = world.generator.last
    return [last.weight @ row + last.bias for row in rows]


def plain_embedding(world: World, feature: Tensor) -> Tensor:
    if world.head_norm:
        batch, norm = list(world.features), world.norm
        feature = normalise(feature, batch, norm.weight, norm.bias, norm.eps)
    return world.linear.weight @ feature + world.linear.bias


def plain_negatives(world: World) -> Tensor:
    labels = world.labels.tolist()
    return synthetic_negatives(
        world.z, labels, None, world.weights, ALPHA, MEAN_LOSS, normalised_distance=world.normalised
    )


def plain_synthetic_loss(world: World) -> Tensor:
    pulled = plain_negatives(world)
    generated = [plain_embedding(world, row) for row in plain_features(world, list(pulled.flatten(0, 1)))]
    return synthetic_loss(world.z, torch.stack(generated).view_as(pulled), SIZE.num_samples)


def our_synthetic_loss(world: World) -> Tensor:
    to_embeddings = world.generator.on_batch(world.z).then(world.head(world.features))
    return generated_synthetic_loss(world.z, world.synthesis, to_embeddings)


def our_generator_loss(world: World, by: str = "features") -> dict[str, Tensor]:
    by_features = by == "features"
    classifier = world.classifier if by_features else world.of_embeddings
    found = generator_loss(
        world.z,
        world.features,
        world.labels,
        world.synthesis,
        world.generator.on_batch(world.z),
        RowMap((), FEATURES) if by_features else world.head(world.features),
        ConstantClassifier(classifier.weight, classifier.bias),
        FACTORS,
    )
    return {"recon": found.reconstruction, "soft": found.classification, "total": found.total}


def plain_generator_loss(world: World, by: str = "features") -> dict[str, Tensor]:
    rebuilt = plain_features(world, list(world.z))
    recon = sum(((a - b) ** 2).sum() for a, b in zip(rebuilt, world.features, strict=True)) / SIZE.batch
    generated = plain_features(world, list(plain_negatives(world).flatten(0, 1)))
    classifier = world.classifier
    if by == "embeddings":
        rebuilt = [plain_embedding(world, row) for row in rebuilt]
        generated = [plain_embedding(world, row) for row in generated]
        classifier = world.of_embeddings
    weight, bias = classifier.weight.detach(), classifier.bias.detach()
    table = torch.stack(generated).view(SIZE.batch, SIZE.num_classes, -1)
    soft = classification(table, world.labels[: SIZE.num_classes].tolist(), weight, bias)
    for row, label in zip(rebuilt, world.labels.tolist(), strict=True):
        logits = weight @ row + bias
        soft = soft + torch.log(torch.exp(logits - logits[label]).sum()) / SIZE.batch
    return {"recon": recon, "soft": soft, "total": 0.7 * recon + 1.3 * soft}


def gradients(world: World, loss: Tensor) -> dict[str, Tensor]:
    leaves = world.leaves()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {f"d/{name}": g for name, g in zip(leaves, found, strict=True) if g is not None}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(errors(got, want).values())


@pytest.mark.parametrize("normalised", [False, True])
def test_interpolations_are_those_without_coefficients(normalised: bool) -> None:
    world = World(normalised=normalised)
    want = generate_negatives(
        world.z,
        world.labels,
        None,
        alpha=ALPHA,
        mean_metric_loss=MEAN_LOSS,
        weights=world.weights,
        normalised_distance=normalised,
    )
    got = SinglePull(world.z, world.synthesis).negatives(slice(0, SIZE.batch))
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slope = [torch.autograd.grad((value * upstream).sum(), world.z)[0] for value in (got, want)]
    assert worst({"z": got, "d": slope[0]}, {"z": want, "d": slope[1]}) < OWN_PATHS
    some = SinglePull(world.z, world.synthesis).negatives(slice(2, 6))
    assert worst({"z": some}, {"z": want[2:6]}) < OWN_PATHS


@pytest.mark.parametrize(
    "options", [{}, {"hidden": (5, 4), "normalised": True}, {"hidden": (), "head_norm": False}], ids=str
)
def test_the_synthetic_loss_equals_a_loop(options: dict[str, object]) -> None:
    world = World(**options)  # type: ignore[arg-type]
    results = []
    for function in (our_synthetic_loss, plain_synthetic_loss):
        loss = function(world)
        results.append({"loss": loss} | gradients(world, loss))
    assert worst(*results) < OWN_PATHS
    reached = {"z", "linear.weight", "linear.bias"} | ({"features", "norm.weight"} if world.head_norm else set())
    assert {f"d/{name}" for name in reached} <= results[0].keys()


@pytest.mark.parametrize("by", ["features", "embeddings"])
def test_the_generator_loss_equals_a_loop(by: str) -> None:
    world = World(hidden=(5, 4))
    results = []
    for function in (our_generator_loss, plain_generator_loss):
        losses = function(world, by)
        results.append(losses | gradients(world, losses["total"]))
    assert worst(*results) < OWN_PATHS


@pytest.mark.parametrize("anchors", [1, 5])
def test_losses_do_not_depend_on_how_many_anchors_go_at_once(anchors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()

    def everything() -> dict[str, Tensor]:
        losses = {"synthetic": our_synthetic_loss(world), "generator": our_generator_loss(world)["total"]}
        slopes = {f"{k} {name}": g for k, loss in losses.items() for name, g in gradients(world, loss).items()}
        return losses | slopes

    whole = everything()
    monkeypatch.setattr(single_pull, "CHUNK_NUMBERS", anchors * SIZE.batch * SIZE.dim)
    ranges: list[slice] = []
    negatives = SinglePull.negatives

    def noting(self: SinglePull, some: slice) -> Tensor:
        ranges.append(some)
        return negatives(self, some)

    monkeypatch.setattr(SinglePull, "negatives", noting)
    assert worst(everything(), whole) < OWN_PATHS
    assert {some.stop - some.start for some in ranges} == ({1} if anchors == 1 else {4, 5})
    # Each loss made its negatives twice: in the backward pass again, instead of keeping them.
    assert len(ranges) == 2 * 2 * len({some.start for some in ranges})


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_of_the_anchors_add_up(size: int) -> None:
    world = World()
    pull = SinglePull(world.z, world.synthesis)
    taken: list[int] = []

    def part(anchors: slice) -> Tensor:
        taken.extend(range(anchors.start, anchors.stop))
        return pull.negatives(anchors).sum(0)

    parts = [pull.sum_over(part, FEATURES, (rank, size)) for rank in range(size)]
    assert sorted(taken) == list(range(SIZE.batch))
    assert worst({"sum": sum(parts)}, {"sum": pull.negatives(slice(0, SIZE.batch)).sum(0)}) < OWN_PATHS


def test_real_rows_go_through_as_a_batch_norm_sends_them() -> None:
    """The real batch itself is normalised as in torch's training pass; other rows leave it alone."""
    world = World(hidden=(5,))
    linear, norm = world.generator.hidden[0], world.generator.norms[0]
    reference = nn.Sequential(linear, nn.ReLU(), norm, world.generator.last)
    want = reference.train()(world.z)
    assert worst({"y": world.generator(world.z)}, {"y": want}) < OWN_PATHS
    rows = world.generator.on_batch(world.z)
    strange = torch.cat([world.z, 50 + world.z])
    assert worst({"y": rows(strange)[: SIZE.batch]}, {"y": want}) < OWN_PATHS
    assert list(world.generator.buffers()) == []


def test_constants_have_no_gradient_and_the_rest_does() -> None:
    world = World()
    loss = world.generator.on_batch(world.z, constant=True)(world.z).square().sum()
    found = gradients(world, loss)
    assert set(found) == {"d/z"}


def test_it_starts_as_the_released_code_does() -> None:
    torch.manual_seed(0)
    generator = FeatureGenerator(128, 1024)
    assert [tuple(p.shape) for p in generator.parameters()] == [
        *[(512, 128), (512,)],
        *[(512,), (512,)],
        *[(1024, 512), (1024,)],
    ]
    for layer in (generator.hidden[0], generator.last):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.99 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.any()


def test_widths_below_one_are_refused() -> None:
    with pytest.raises(InputError, match=r"`hidden`, `dim` and `num_features` must be at least 1: got \[4, 0, 9\]"):
        FeatureGenerator(4, 9, (0,))
