"""Replays golden files in float64 and measures how far each quantity is off."""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gcahng import losses, metrics
from gcahng.compat.graph_names import graph_name
from gcahng.generation import (
    ConstantClassifier,
    Interpolation,
    LossFactors,
    Synthesis,
    generate_negatives,
    generation_loss,
    synthetic_loss,
)
from gcahng.graph import Coefficients, GraphNetwork, GraphOutput, PairPlan
from gcahng.graph.features import unit_centred
from gcahng.graph.pairs import class_major_plan
from gcahng.training.averages import EpochAverages
from gcahng.training.backend import PlainBackend
from gcahng.training.config_schema import OptimizerConfig
from gcahng.training.optimizers import build_optimizer
from gcahng.training.step import StepSettings, TrainingStep

TOLERANCE = 1e-9


@dataclass
class Comparison:
    """Quantities got and wanted; the error measure of the method's section on golden files.

    error = max|got - want| / max(max|want|, 1e-3 * largest |want| among the tensors of the same family).
    """

    rows: list[tuple[str, str, Tensor, Tensor]] = field(default_factory=list)

    def add(self, name: str, got: Tensor | float, want: np.ndarray, family: str = "") -> None:
        got = torch.as_tensor(got, dtype=torch.float64).detach()
        wanted = torch.as_tensor(np.asarray(want), dtype=torch.float64)
        if got.shape != wanted.shape:
            raise AssertionError(f"{name}: got shape {tuple(got.shape)}, golden {tuple(wanted.shape)}")
        self.rows.append((name, family or name, got, wanted))

    def errors(self) -> Iterator[tuple[str, float]]:
        largest: dict[str, float] = {}
        for _, family, _, want in self.rows:
            largest[family] = max(largest.get(family, 0.0), float(want.abs().max()))
        for name, family, got, want in self.rows:
            scale = max(float(want.abs().max()), 1e-3 * largest[family])
            difference = float((got - want).abs().max())
            if not np.isfinite(difference):
                yield name, float("inf")
            else:
                yield name, difference / scale if scale else difference


@dataclass(frozen=True)
class GoldenConfig:
    num_classes: int
    num_samples: int
    dim: int
    layers: int
    heads: int
    training_classes: int
    alpha: float
    beta: float
    similarity: float
    diversity: float
    classification: float
    mean_metric_loss: float
    mean_generation_loss: float

    @classmethod
    def of(cls, values: np.ndarray) -> "GoldenConfig":
        counts = [int(v) for v in values[:6]]
        return cls(*counts, *map(float, values[6:]))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def _state(golden: dict[str, np.ndarray], prefix: str, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    state = {}
    for key, value in golden.items():
        name = rename(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if name is not None:
            state[name] = _tensor(value)
    return state


def build_modules(golden: dict[str, np.ndarray], backend: str) -> dict[str, nn.Module]:
    """Metric model, graph and classifier of a golden file at their starting parameters."""
    config = GoldenConfig.of(golden["config"])
    metric_model = nn.Sequential(nn.BatchNorm1d(config.dim), nn.Linear(config.dim, config.dim))
    graph = GraphNetwork(
        config.dim,
        config.training_classes,
        config.layers,
        config.heads,
        dropout=0.0,
        backend=backend,
    )
    classifier = nn.Linear(config.dim, config.training_classes)
    modules: dict[str, nn.Module] = {
        "metric_model": metric_model,
        "graph": graph,
        "classifier": classifier,
    }
    for name, prefix, rename in _PARTS:
        modules[name].double().load_state_dict(_state(golden, f"init/{prefix}", rename))
    return modules


_PARTS: tuple[tuple[str, str, Callable[[str], str | None]], ...] = (
    ("metric_model", "feature_extractor.", str),
    ("graph", "gnn.", graph_name),
    ("classifier", "softmax_classifier.", str),
)


@dataclass(frozen=True)
class Stage:
    """A golden file's first pass: the graph on the starting parameters."""

    golden: dict[str, np.ndarray]
    config: GoldenConfig
    graph: GraphNetwork
    plan: PairPlan
    weights: Tensor
    labels: Tensor
    z: Tensor
    output: GraphOutput

    @classmethod
    def of(cls, golden: dict[str, np.ndarray], backend: str) -> "Stage":
        config = GoldenConfig.of(golden["config"])
        modules = build_modules(golden, backend)
        graph = modules["graph"]
        assert isinstance(graph, GraphNetwork)
        labels = _tensor(golden["labels"])
        plan = class_major_plan(config.num_classes, config.num_samples)
        weights = _tensor(golden["stage/draws"]).view(config.num_samples, config.num_samples - 1)
        z = modules["metric_model"](_tensor(golden["x0"])).detach().requires_grad_()
        return cls(golden, config, graph, plan, weights, labels, z, graph(z, labels, plan=plan))

    @property
    def coefficients(self) -> Coefficients:
        assert self.output.coefficients is not None
        return self.output.coefficients

    @property
    def synthesis(self) -> Synthesis:
        rule = Interpolation(self.config.alpha, self.config.mean_metric_loss)
        return Synthesis(self.config.num_samples, rule, self.weights)

    def synthesise(self, table: Tensor) -> Tensor:
        return generate_negatives(
            self.z,
            self.labels,
            table,
            alpha=self.config.alpha,
            mean_metric_loss=self.config.mean_metric_loss,
            weights=self.weights,
        )


def replay_stage(golden: dict[str, np.ndarray], backend: str, compare: Comparison) -> None:
    """One pass from the starting parameters: edges, read-outs, synthetic negatives, losses and gradients."""
    stage = Stage.of(golden, backend)
    size = stage.config.num_classes * stage.config.num_samples
    compare.add("z", stage.z, golden["stage/z"])
    x = unit_centred(stage.z.detach())
    edges = x[:, None] * x[None, :]
    compare.add("edges0", edges.view(size * size, -1), golden["stage/edges0"])
    table = stage.output.pull_coefficients
    compare.add("node_logits", stage.output.node_logits, golden["stage/node_logits"])
    compare.add("coef", table.view(size * size, -1), golden["stage/coef"])
    compare.add("synthetic", stage.synthesise(table).view(-1, stage.config.dim), golden["stage/synthetic"])
    _metric_losses(stage, compare)
    _synthetic_losses(stage, compare)
    _diversity(stage, compare)


def _metric_losses(stage: Stage, compare: Comparison) -> None:
    metric_loss = losses.NPairPlusLoss()(stage.z, stage.labels)
    compare.add("loss_npair", metric_loss, stage.golden["stage/loss_npair"])
    (gradient,) = torch.autograd.grad(metric_loss, stage.z)
    compare.add("grad_npair_z", gradient, stage.golden["stage/grad_npair_z"])
    proxy_anchor = losses.ProxyAnchorLoss(stage.config.training_classes, stage.config.dim).double()
    with torch.no_grad():
        proxy_anchor.proxies.copy_(_tensor(stage.golden["stage/proxies"]))
    loss = proxy_anchor(stage.z, stage.labels)
    compare.add("loss_proxy_anchor", loss, stage.golden["stage/loss_proxy_anchor"])
    gradients = torch.autograd.grad(loss, [stage.z, proxy_anchor.proxies])
    compare.add("grad_pa_z", gradients[0], stage.golden["stage/grad_pa_z"], "grad_pa")
    compare.add("grad_pa_proxies", gradients[1], stage.golden["stage/grad_pa_proxies"], "grad_pa")


def _synthetic_losses(stage: Stage, compare: Comparison) -> None:
    """J_syn from the full table, with gradient through the coefficients, and chunk by chunk, without."""
    z, table = stage.z, stage.output.pull_coefficients
    by_table = losses.synthetic_n_pair_loss(z, stage.synthesise(table))
    by_output = synthetic_loss(z, stage.coefficients, stage.synthesis)
    for name, loss in (("table", by_table), ("output", by_output)):
        compare.add(f"loss_syn_npair ({name})", loss, stage.golden["stage/loss_syn_npair"])
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        compare.add(f"grad_syn_z ({name})", gradient, stage.golden["stage/grad_syn_z"])
    constant = stage.graph(z, stage.labels, plan=stage.plan, coefficient_gradient=False).coefficients
    assert constant is not None
    by_table = losses.synthetic_n_pair_loss(z, stage.synthesise(table.detach()))
    by_chunks = synthetic_loss(z, constant, stage.synthesis)
    compare.add("loss_syn_npair (chunks)", by_chunks, stage.golden["stage/loss_syn_npair"])
    for name, loss in (("table", by_table), ("chunks", by_chunks)):
        (gradient,) = torch.autograd.grad(loss, z)
        compare.add(f"grad_syn_z_coef_detached ({name})", gradient, stage.golden["stage/grad_syn_z_coef_detached"])


def _diversity(stage: Stage, compare: Comparison) -> None:
    """J_div and its gradient in every parameter, from the full table and as a part of the generation loss."""
    named = {n: p for n, p in stage.graph.named_parameters() if p.requires_grad}
    classifier = ConstantClassifier(torch.zeros(stage.config.training_classes, stage.config.dim).double(), None)
    labels = torch.arange(stage.config.num_classes)
    # Half of twice J_div and nothing else.
    found = generation_loss(
        stage.z, stage.coefficients, stage.synthesis, classifier, labels, LossFactors(0.0, 0.0, 2.0)
    )
    for name, loss in (("table", losses.diversity_loss(stage.output.pull_coefficients)), ("chunks", found.total)):
        compare.add(f"loss_diversity ({name})", loss, stage.golden["stage/loss_diversity"])
        gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        got = dict(zip(named, gradients, strict=True))
        for key in [k for k in stage.golden if k.startswith("stage/grad_div/")]:
            ours = graph_name(key.removeprefix("stage/grad_div/"))
            if ours is None:
                continue
            value = got[ours]
            assert value is not None, f"{ours} has no gradient"
            compare.add(f"grad_div ({name}) {ours}", value, stage.golden[key], f"grad_div {name}")


def _golden_backend(golden: dict[str, np.ndarray], backend: str) -> PlainBackend:
    modules = build_modules(golden, backend)
    rates = dict(zip(("metric_model", "classifier", "graph"), golden["lrs"], strict=True))
    optimizers, gates = {}, {}
    for name, module in modules.items():
        decay = 1e-2 if name == "classifier" else 1e-4
        settings = OptimizerConfig(lr=float(rates[name]), weight_decay=decay)
        clip = None if name == "classifier" else 10.0
        optimizers[name], gates[name] = build_optimizer(module, settings, clip_value=clip)
    return PlainBackend(modules | {"metric_loss": losses.NPairPlusLoss()}, optimizers, gates)


def replay_iterations(golden: dict[str, np.ndarray], graph_backend: str, compare: Comparison) -> None:
    """Whole iterations with AdamW, then the parameters they end at."""
    config = GoldenConfig.of(golden["config"])
    backend = _golden_backend(golden, graph_backend)
    settings = StepSettings(
        seed=0,
        num_samples=config.num_samples,
        alpha=config.alpha,
        beta=config.beta,
        classification_weight=config.classification,
        similarity_weight=config.similarity,
        diversity_weight=0.01 * config.diversity,
    )
    step = TrainingStep(backend, settings)
    averages = EpochAverages()
    averages.metric_loss, averages.generation_loss = (
        config.mean_metric_loss,
        config.mean_generation_loss,
    )
    number = 0
    while f"iter{number}/x" in golden:
        here = f"iter{number}/"
        draws = _tensor(golden[here + "draws"]).view(2, config.num_samples, config.num_samples - 1)
        mixing = {"metric": draws[0], "generation": draws[1]}
        report = step(
            _tensor(golden[here + "x"]),
            _tensor(golden[here + "labels"]),
            averages,
            step=number,
            mixing=mixing,
        )
        got = {
            "J_m": report["metric_loss"],
            "J_gnnce": report["node_loss"],
            "J_syn": report["synthetic_loss"] * report["synthetic_weight"],
            "J_metric": report["total_loss"],
            "J_softce": report["classifier_loss"],
            "J_div": 0.01 * report["diversity_loss"],
            "J_gence": config.classification * report["classification_loss"],
            "J_gen": report["generation_loss"],
            "e_bj": 1 - report["synthetic_weight"],
        }
        for name, value in got.items():
            compare.add(here + name, value, golden[here + name])
        number += 1
    assert number, "the golden file holds no iterations"
    for part, prefix, rename in _PARTS:
        state = backend.module(part).state_dict()
        for key in [k for k in golden if k.startswith(f"final/{prefix}")]:
            ours = rename(key.removeprefix(f"final/{prefix}"))
            if ours is not None:
                compare.add(f"final {part} {ours}", state[ours].double(), golden[key], _family(part, ours))


def _family(part: str, name: str) -> str:
    kind = "buffer" if "running" in name or "num_batches" in name else "parameter"
    return f"final {part} {kind} {name}" if kind == "buffer" else f"final {part} {kind}"


def replay_retrieval(golden: dict[str, np.ndarray], compare: Comparison) -> None:
    """Self-retrieval and query/gallery metrics."""
    own = metrics.retrieval(
        _tensor(golden["self_x"]),
        _tensor(golden["self_y"]),
        ks=tuple(int(k) for k in golden["self_k"]),
    )
    cross = metrics.retrieval(
        _tensor(golden["query_x"]),
        _tensor(golden["query_y"]),
        _tensor(golden["gallery_x"]),
        _tensor(golden["gallery_y"]),
        ks=tuple(int(k) for k in golden["qg_k"]),
    )
    for name, result in (("self", own), ("qg", cross)):
        shares = [result.recall_at_k[int(k)] for k in golden[f"{name}_k"]]
        compare.add(
            f"{name} recall_at_k",
            torch.tensor(shares, dtype=torch.float64),
            golden[f"{name}_recall"],
        )
        compare.add(f"{name} r_precision", result.r_precision, golden[f"{name}_r_precision"])
        compare.add(f"{name} map_at_r", result.map_at_r, golden[f"{name}_map_at_r"])


def replay(path: Path) -> list[tuple[str, float]]:
    """Every quantity of a golden file with its error; the kind is told by the content.

    Raises:
        ValueError: The file is of no kind that can be replayed.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("missing, or no whole .npz archive")
    with np.load(path) as archive:
        golden = dict(archive)
    rows: list[tuple[str, float]] = []
    if "config" in golden:
        for backend in ("eager", "scatter"):
            compare = Comparison()
            replay_stage(golden, backend, compare)
            replay_iterations(golden, backend, compare)
            rows += [(f"[{backend}] {name}", error) for name, error in compare.errors()]
        return rows
    if "self_x" in golden:
        compare = Comparison()
        replay_retrieval(golden, compare)
        return list(compare.errors())
    raise ValueError(f"{path}: neither a configuration file (`config`) nor a retrieval file (`self_x`)")
