"""Released state dictionaries by our names and back; what comes in computes what the authors' models compute."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from golden_replay import GoldenConfig
from maths_cases import assert_close
from released_cases import (
    DIM,
    GOLDEN_NAMES,
    NARROW,
    VIT,
    BareGoogLeNet,
    Extractor,
    PooledResNet,
    assert_same_state,
    golden_arrays,
    golden_state,
    randomise,
    settle,
    small_extractor,
    small_state,
)
from torch import Tensor, nn

from gcahng.compat import Naming, ReleasedState, from_released, naming_of_model, to_released
from gcahng.compat.graph_names import graph_name, released_graph_name
from gcahng.errors import ConfigError
from gcahng.graph import GraphNetwork
from gcahng.graph.pairs import class_major_plan
from gcahng.models import Embedder, build_embedder

GOLDEN_TOLERANCE = 1e-9
# Of embeddings in float64 behind a transform of images whose constants are held in float32: their rounding, 6e-8, grows
# on its way through 22 layers with statistics of a few images.
FLOAT32_CONSTANTS = 1e-4


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_start_goes_in_and_comes_out_as_it_was(name: str) -> None:
    state = golden_state(name)
    released = from_released(state)
    assert list(released.parts) == ["metric_model", "graph", "classifier"]
    layers = GoldenConfig.of(golden_arrays(name)["config"]).layers
    stem = "gnn.gnn.{}.node_model.layers.0.update_node.{}"
    assert set(released.unused) == {stem.format(i, leaf) for i in range(layers) for leaf in ("weight", "bias")}
    assert_same_state(to_released(released), state)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_graph_that_came_in_computes_the_golden_values(name: str) -> None:
    golden, released = golden_arrays(name), from_released(golden_state(name))
    config = GoldenConfig.of(golden["config"])
    graph = GraphNetwork(config.dim, config.training_classes, config.layers, config.heads, dropout=0.0).double()
    graph.load_state_dict(dict(released.parts["graph"]))  # strict
    head = build_embedder("small_conv", embedding_dim=config.dim, backbone_args={"widths": [config.dim]}).head.double()
    head.load_state_dict({n.removeprefix("head."): t for n, t in released.parts["metric_model"].items()})
    z = head(torch.from_numpy(golden["x0"]))
    plan = class_major_plan(config.num_classes, config.num_samples)
    output = graph(z, torch.from_numpy(golden["labels"]), plan=plan)
    size = config.num_classes * config.num_samples
    got = {
        "z": z.detach(),
        "node_logits": output.node_logits.detach(),
        "coef": output.pull_coefficients.detach().view(size * size, -1),
    }
    assert_close(got, {key: torch.from_numpy(golden[f"stage/{key}"]) for key in got}, GOLDEN_TOLERANCE)


def test_every_entry_of_a_graph_network_has_one_released_name() -> None:
    own = list(GraphNetwork(8, 5, 3, 2).state_dict())
    theirs = [released_graph_name(name) for name in own]
    assert len(set(theirs)) == len(own)
    assert [graph_name(name) for name in theirs] == own
    for name in ("node_blocks.0.other.weight", "edge_blocks.x.query.weight", "other.weight", "weight"):
        with pytest.raises(KeyError):
            released_graph_name(name)


def renamed(change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): tensor for name, tensor in small_state().items()}


def alone(state: dict[str, Tensor], extractor: str = "feature_extractor.") -> dict[str, Tensor]:
    """The metric model alone, its names beginning with `extractor`."""
    start = "feature_extractor."
    return {extractor + name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}


VARIANTS: dict[str, tuple[dict[str, Tensor], Naming]] = {
    "whole": (small_state(), Naming("gca_hng", "", "feature_extractor.", "fc.", "backbone.")),
    "DataParallel": (
        renamed(lambda name: f"module.{name}"),
        Naming("gca_hng", "module.", "feature_extractor.", "fc.", "backbone."),
    ),
    "metric model": (alone(small_state()), Naming("gca_hng", "", "feature_extractor.", "fc.", "backbone.")),
    "bare metric model": (alone(small_state(), ""), Naming("gca_hng", "", "", "fc.", "backbone.")),
    "bare, DataParallel": (alone(small_state(), "module."), Naming("gca_hng", "module.", "", "fc.", "backbone.")),
    "backbone under model": (
        renamed(lambda name: name.replace("backbone.", "backbone.model.")),
        Naming("gca_hng", "", "feature_extractor.", "fc.", "backbone.model."),
    ),
    "head as in the golden files": (
        renamed(lambda name: name.replace("extractor.fc.", "extractor.")),
        Naming("gca_hng", "", "feature_extractor.", "", "backbone."),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ways_a_file_may_name_its_entries(variant: str) -> None:
    state, naming = VARIANTS[variant]
    released = from_released(state)
    assert released.naming == naming
    want = from_released(small_state()).parts
    for part, tensors in released.parts.items():
        assert_same_state(dict(tensors), dict(want[part]))
    assert ("graph" in released.parts) == ("metric model" not in variant and "bare" not in variant)
    assert_same_state(to_released(released), state)


def load(model: Embedder, released: ReleasedState) -> Embedder:
    """In float64, as the models it is compared with."""
    model.double().load_state_dict(dict(released.parts["metric_model"]))  # strict
    return model.eval()


def images(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)).double()


def worst(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def extracted(theirs: Extractor) -> dict[str, Tensor]:
    return {f"feature_extractor.{name}": tensor for name, tensor in theirs.state_dict().items()}


@torch.no_grad()
def test_resnet50_of_gca_hng() -> None:
    theirs = Extractor(PooledResNet(), 2048).double()
    settle(theirs, images(64, 4))
    state = extracted(theirs)
    released = from_released(state)
    assert sorted(released.unused) == [f"feature_extractor.backbone.model.fc.{leaf}" for leaf in ("bias", "weight")]
    assert released.naming == naming_of_model("resnet50.tv_in1k", "bn_linear")
    ours = load(
        build_embedder("resnet50.tv_in1k", embedding_dim=DIM, pooling="avg+max", backbone_args=NARROW), released
    )
    assert worst(ours(images(64)), theirs(images(64))) < GOLDEN_TOLERANCE
    assert_same_state(to_released(released), state)


@torch.no_grad()
@pytest.mark.parametrize("aux_logits", [False, True])
def test_googlenet_of_gca_hng(aux_logits: bool) -> None:
    theirs = Extractor(BareGoogLeNet(aux_logits=aux_logits), 1024).double()
    if not aux_logits:
        settle(theirs, images(64, 4))
    state = extracted(theirs)
    released = from_released(state)
    heads = {name.split(".")[2] for name in released.unused}
    assert heads == ({"fc", "aux1", "aux2"} if aux_logits else {"fc"})
    assert released.naming == naming_of_model("torchvision/googlenet", "bn_linear")
    assert_same_state(to_released(released), state)
    if not aux_logits:
        ours = load(build_embedder("torchvision/googlenet", embedding_dim=DIM), released)
        assert worst(ours(images(64)), theirs(images(64))) < FLOAT32_CONSTANTS
        ours.backbone.transform_input = False  # type: ignore[assignment]
        assert worst(ours(images(64)), theirs(images(64))) > 100 * FLOAT32_CONSTANTS


@torch.no_grad()
def test_dino_of_gca_hng_in_float64() -> None:
    theirs = small_extractor().double()
    released = from_released(extracted(theirs))
    assert not released.unused and released.naming == naming_of_model("vit_small_patch16_224.dino", "bn_linear")
    model = build_embedder("vit_small_patch16_224.dino", embedding_dim=DIM, pooling="cls", backbone_args=VIT)
    batch = images(16)
    assert worst(load(model, released)(batch), theirs(batch)) < GOLDEN_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["resnet50", "torchvision/googlenet"])
def test_models_of_sct(backbone: str) -> None:
    if backbone == "resnet50":
        theirs: nn.Module = torchvision.models.resnet50(weights=None, width_per_group=NARROW["base_width"])
        ours = build_embedder(backbone, embedding_dim=DIM, head="linear", backbone_args=NARROW)
    else:
        theirs = torchvision.models.googlenet(weights=None, aux_logits=False, transform_input=False, init_weights=False)
        ours = build_embedder(backbone, embedding_dim=DIM, head="linear", backbone_args={"transform_input": False})
    theirs.fc = nn.Linear(theirs.fc.in_features, DIM)  # type: ignore[arg-type, union-attr]
    randomise(theirs.double())
    settle(theirs, images(64, 4))
    state = theirs.state_dict()
    released = from_released(state)
    assert released.naming == naming_of_model(backbone, "linear") == Naming("sct") and not released.unused
    assert worst(load(ours, released)(images(64)), theirs(images(64))) < GOLDEN_TOLERANCE
    assert_same_state(to_released(released), dict(state))


def test_unknown_entries_are_listed() -> None:
    odd = {"gnn.gnn.0.node_model.layers.0.att.other.weight", "feature_extractor.other.weight", "proxies"}
    with pytest.raises(ConfigError, match=r"holds 3 of \d+ entries that the authors' code does not have") as caught:
        from_released(small_state() | {name: torch.zeros(1) for name in odd})
    assert all(name in str(caught.value) for name in odd)
    half = {(f"module.{n}" if n.startswith("gnn.") else n): t for n, t in small_state().items()}
    with pytest.raises(ConfigError, match=r"module\.gnn\.dim_red\.weight"):
        from_released(half)
    with pytest.raises(ConfigError, match=r"no released checkpoint: .* got stem\.0\.weight, a, b, \.\.\."):
        from_released({name: torch.zeros(1) for name in ("stem.0.weight", "a", "b", "c")})


def test_what_the_authors_code_has_no_name_for() -> None:
    released = from_released(small_state())
    parts = released.parts | {"metric_loss": {"proxies": torch.zeros(1)}}
    with pytest.raises(ConfigError, match=r"1 entries have no name .*metric_loss\.proxies"):
        to_released(ReleasedState(released.naming, parts, {}))
    for backbone, head in (("small_conv", "bn_linear"), ("resnet18", "bn_linear"), ("vit_small_patch16_224", "linear")):
        with pytest.raises(ConfigError, match=f"no metric model of `model.backbone` {backbone}"):
            naming_of_model(backbone, head)
